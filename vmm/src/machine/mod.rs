//! The machine: memory, VM, vCPUs and devices put together, and what can be done with it.
//!
//! All methods are called by the event loop, which is also the only thread that works on device queues. So once
//! [`Machine::pause`] has returned, nothing in this process touches guest RAM: vCPUs have stopped, and the event loop
//! has to be told to listen to the devices again.

pub mod clock;
mod snapshot;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvm_ioctls::IoEventAddress;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;
use wire::cpu::UnknownProfile;
use wire::vmm::{DiskSpec, GuestEnd, MachineSpec};

use crate::acpi::{self, AcpiError};
use crate::boot::{self, BootError, Load};
use crate::bus::Bus;
use crate::console::ConsoleRing;
use crate::dirty::DirtyBitmap;
use crate::kvm::log::{DirtyLog, LogError};
use crate::kvm::{Attempt, KvmError, Vm};
use crate::memory::{MemoryError, Ram};
use crate::platform::{self, Platform};
use crate::serial::{self, BacklogFull, IrqLine, SerialPort};
use crate::shm::ShmError;
use crate::vcpu::{Shared, Vcpus};
use crate::virtio::blk::Blk;
use crate::virtio::blk::overlay::{DiskError, Overlay};
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::virtio::{self, Device, Resources, Transport};

pub use snapshot::SnapshotError;

/// Offset of the register by which a driver notifies a queue.
const QUEUE_NOTIFY: u64 = 0x50;

/// The descriptors of a machine, as `mashined` hands them over.
#[derive(Debug)]
pub struct Descriptors {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// RAM memfd.
    pub ram: File,
    /// Dirty bitmap memfd.
    pub dirty: File,
    /// Console memfd.
    pub console: File,
    /// Tap; a machine without one has no network interface.
    pub tap: Option<File>,
    /// Where clients of the guest's ports come in.
    pub vsock: Option<UnixListener>,
    /// Of each disk its overlay and, if it has one, its base.
    pub disks: Vec<(File, Option<File>)>,
}

/// Why a machine cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The CPU profile.
    #[error(transparent)]
    Profile(#[from] UnknownProfile),
    /// A shared memory descriptor.
    #[error(transparent)]
    Shm(#[from] ShmError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// More devices than there are places for.
    #[error("the machine has more than {} virtio devices", virtio::SLOTS_MAX)]
    Slots,
    /// The operating system.
    #[error("the machine's events cannot be made")]
    Events(#[source] std::io::Error),
}

/// How a pause went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PauseReport {
    /// Until all had stopped, in microseconds.
    pub stop_us: u64,
    /// Harvesting the dirty log, in microseconds.
    pub harvest_us: u64,
    /// Pages in the shared bitmap; 0 without harvest.
    pub dirty_pages: u64,
}

/// Why a pause failed.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// A vCPU.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The dirty log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The guest ended in the same moment.
    #[error("the guest ended while it was being paused ({0:?})")]
    Ended(GuestEnd),
}

/// A machine.
pub struct Machine {
    spec: MachineSpec,
    // Threads and KVM before the memory they use.
    vcpus: Vcpus,
    shared: Arc<Shared>,
    bus: Arc<Bus>,
    vm: Arc<Vm>,
    log: DirtyLog,
    ram: Ram,
    files: Files,
    last_pause: PauseReport,
    /// Set by a restore until the first run.
    resume_devices: bool,
    /// A save that the pause has begun.
    begun: Option<snapshot::Begun>,
}

/// Kept open to be handed out again.
#[derive(Debug)]
struct Files {
    ram: File,
    dirty: File,
    console: File,
    tap: Option<File>,
    disks: Vec<(File, Option<File>)>,
}

fn elapsed_us(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl Machine {
    /// Makes the VM, its vCPUs and devices. Nothing runs.
    ///
    /// # Errors
    /// [`CreateError`].
    pub fn create(spec: MachineSpec, descriptors: Descriptors) -> Result<Self, CreateError> {
        let Descriptors { kvm, ram: ram_file, dirty: dirty_file, console: console_file, tap, vsock, disks } =
            descriptors;
        let space = spec.space();
        let dirty = Arc::new(DirtyBitmap::new(&dirty_file, space.pages())?);
        let ram = Ram::new(&ram_file, spec.ram, &dirty)?;
        let vm = Arc::new(Vm::new(kvm, &ram)?);
        let files = Files { ram: ram_file, dirty: dirty_file, console: console_file, tap, disks };
        let overlays = open_disks(&spec, &files, &dirty)?;
        let bus = Arc::new(make_bus(&spec, &vm, &ram, &files, vsock, &overlays)?);
        let ended_event =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(CreateError::Events)?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(true),
            ended: Mutex::new(None),
            ended_event,
            bus: Arc::clone(&bus),
        });
        let profile = spec.cpu.name.parse()?;
        let vcpus = Vcpus::new(&vm, spec.vcpus, profile, spec.cpu.tsc_khz, &shared)?;
        let log = DirtyLog::new(dirty, &space, overlays);
        let last_pause = PauseReport { stop_us: 0, harvest_us: 0, dirty_pages: 0 };
        Ok(Self {
            spec,
            vcpus,
            shared,
            bus,
            vm,
            log,
            ram,
            files,
            last_pause,
            resume_devices: false,
            begun: None,
        })
    }

    /// What was created.
    pub const fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    /// The devices.
    pub const fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    /// Readable when the guest has ended.
    pub fn ended_event(&self) -> &EventFd {
        &self.shared.ended_event
    }

    /// How the guest ended, if it did.
    pub fn ended(&self) -> Option<GuestEnd> {
        self.shared.ended.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// RAM, dirty bitmap, console, tap, and of each disk its overlay and base, in this order.
    pub fn files(&self) -> Vec<&File> {
        let Files { ram, dirty, console, tap, disks } = &self.files;
        let disks = disks.iter().flat_map(|(overlay, base)| std::iter::once(overlay).chain(base));
        [ram, dirty, console].into_iter().chain(tap).chain(disks).collect()
    }

    /// Loads a kernel.
    ///
    /// # Errors
    /// [`BootError`] when it cannot be booted.
    pub fn boot(
        &mut self,
        kernel: &mut File,
        initrd: Option<&mut File>,
        cmdline: &str,
    ) -> Result<(), MachineBootError> {
        let slots = 0..self.bus.slots();
        let words: Vec<String> = slots.clone().filter_map(virtio::cmdline_of).collect();
        let devices: Vec<_> = slots.filter_map(virtio::acpi_of).collect();
        let device_words = &words.join(" ");
        let memory = self.ram.memory();
        let load = Load { kernel, initrd, cmdline, device_words, rsdp: acpi::RSDP };
        let entry = boot::load(memory, load)?;
        acpi::write(memory, u8::try_from(self.vcpus.count()).unwrap_or(u8::MAX), &devices)?;
        self.write_firmware().map_err(AcpiError::from)?;
        self.vm.mask_pics()?;
        Ok(self.vcpus.boot(entry)?)
    }

    /// What firmware leaves behind besides tables: the generation id, and code to restart the machine.
    fn write_firmware(&self) -> Result<(), vm_memory::GuestMemoryError> {
        let id = self.bus.platform().generation();
        let memory = self.ram.memory();
        memory.write_slice(&id, GuestAddress(acpi::GENERATION_PAGE))?;
        memory.write_slice(&platform::RESET_CODE, GuestAddress(platform::RESET_VECTOR))
    }

    /// Presses the guest's power button.
    ///
    /// # Errors
    /// [`std::io::Error`] when the interrupt cannot be raised.
    pub fn power_button(&self) -> std::io::Result<()> {
        self.bus.platform().press_power_button()
    }

    /// Lets the vCPUs run. The event loop listens to the devices from now on.
    ///
    /// # Errors
    /// [`KvmError`] when a vCPU's thread is gone.
    pub fn run(&mut self) -> Result<(), KvmError> {
        self.begun = None;
        self.vcpus.run()?;
        if std::mem::take(&mut self.resume_devices) {
            self.bus.platform().resume();
            for slot in 0..self.bus.slots() {
                if let Some(mut transport) = self.bus.transport(slot) {
                    transport.resume();
                }
            }
        }
        Ok(())
    }

    /// Stops the vCPUs, and publishes the dirty log if `harvest`. The event loop must not work on devices any more.
    ///
    /// # Errors
    /// [`PauseError`]; [`PauseError::Ended`] when there is nothing left to pause.
    pub fn pause(&mut self, harvest: bool) -> Result<PauseReport, PauseError> {
        let begin = Instant::now();
        self.vcpus.stop()?;
        self.last_pause = PauseReport { stop_us: elapsed_us(begin), harvest_us: 0, dirty_pages: 0 };
        if let Some(end) = self.ended() {
            return Err(PauseError::Ended(end));
        }
        for slot in 0..self.bus.slots() {
            if let Some(mut transport) = self.bus.transport(slot) {
                transport.quiesce();
            }
        }
        self.last_pause.stop_us = elapsed_us(begin);
        self.harvest(harvest)
    }

    /// How the last pause went; with `harvest` also when that one was without.
    ///
    /// # Errors
    /// [`PauseError::Log`].
    pub fn harvest(&mut self, harvest: bool) -> Result<PauseReport, PauseError> {
        if harvest {
            if self.begun.is_none() {
                // Who harvests is about to move the machine, and will ask for its state next.
                self.begin_save()?;
            }
            let begin = Instant::now();
            self.log.harvest(&self.vm, &self.ram)?;
            self.last_pause.dirty_pages = self.log.shared_pages();
            self.last_pause.harvest_us = elapsed_us(begin);
        }
        Ok(self.last_pause)
    }

    /// Collects the vCPUs after one of them has reported the guest's end.
    ///
    /// # Errors
    /// [`KvmError`] when one does not stop.
    pub fn collect(&mut self) -> Result<(), KvmError> {
        self.vcpus.stop()
    }

    /// Whether the dirty log is on.
    pub const fn dirty_log_on(&self) -> bool {
        self.log.is_on()
    }

    /// Switches the dirty log.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn dirty_log(&mut self, on: bool) -> Result<(), KvmError> {
        self.log.switch(&self.vm, &self.ram, on)
    }

    /// See [`DirtyLog::sync`].
    ///
    /// # Errors
    /// [`LogError`].
    pub fn dirty_sync(&mut self) -> Result<u64, LogError> {
        self.log.sync(&self.vm, &self.ram)
    }

    /// See [`DirtyLog::take`].
    ///
    /// # Errors
    /// [`LogError`].
    pub fn dirty_take(&mut self, first: u64, count: u64) -> Result<u64, LogError> {
        self.log.take(&self.vm, &self.ram, first, count)
    }

    /// Input for the serial port.
    ///
    /// # Errors
    /// [`BacklogFull`].
    pub fn serial_input(&self, bytes: &[u8]) -> Result<(), BacklogFull> {
        self.bus.serial().input(bytes)
    }
}

/// Why a kernel was not booted.
#[derive(Debug, thiserror::Error)]
pub enum MachineBootError {
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] BootError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The vCPU.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// Opens the disks over the files that came with the machine.
fn open_disks(
    spec: &MachineSpec,
    files: &Files,
    dirty: &Arc<DirtyBitmap>,
) -> Result<Vec<Arc<Overlay>>, CreateError> {
    let space = spec.space();
    let open = |(index, (disk, (overlay, base))): (usize, (&DiskSpec, &(File, Option<File>)))| {
        let overlay = overlay.try_clone().map_err(CreateError::Events)?;
        let base = base.as_ref().map(File::try_clone).transpose().map_err(CreateError::Events)?;
        let first_page = space.disk_start(index).0;
        Ok(Arc::new(Overlay::open(disk, (overlay, base), Arc::clone(dirty), first_page)?))
    };
    spec.disks.iter().zip(&files.disks).enumerate().map(open).collect()
}

/// Makes the devices and wires them to KVM.
fn make_bus(
    spec: &MachineSpec,
    vm: &Vm,
    ram: &Ram,
    files: &Files,
    vsock: Option<UnixListener>,
    overlays: &[Arc<Overlay>],
) -> Result<Bus, CreateError> {
    let serial = SerialPort::new(irq_line(vm, serial::GSI)?, ConsoleRing::new(&files.console)?);
    let mut generation = [0; 16];
    rustix::rand::getrandom(&mut generation, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| CreateError::Events(error.into()))?;
    let platform = Platform::new(irq_line(vm, platform::GSI)?, generation);

    let mut devices: Vec<Box<dyn Device>> = Vec::new();
    if let Some(tap) = &files.tap {
        rustix::io::ioctl_fionbio(tap, true).map_err(|e| CreateError::Events(e.into()))?;
        let tap = tap.try_clone().map_err(CreateError::Events)?;
        devices.push(Box::new(Net::new(tap, spec.mac)));
    }
    devices.push(Box::new(Rng));
    devices.push(Box::new(Vsock::new(vsock).map_err(CreateError::Events)?));
    for (disk, overlay) in spec.disks.iter().zip(overlays) {
        let blk = Blk::new(Arc::clone(overlay), disk.name.to_string(), Arc::clone(ram.memory()));
        devices.push(Box::new(blk.map_err(CreateError::Events)?));
    }

    let mut transports = Vec::new();
    for (slot, device) in devices.into_iter().enumerate() {
        let gsi = virtio::gsi_of(slot).ok_or(CreateError::Slots)?;
        let resources = Resources::new(device.queue_sizes().len()).map_err(CreateError::Events)?;
        vm.fd.register_irqfd(&resources.interrupt, gsi).attempt("wiring a device's interrupt")?;
        for (queue, notify) in (0u32..).zip(&resources.notify) {
            let address = IoEventAddress::Mmio(virtio::base_of(slot) + QUEUE_NOTIFY);
            vm.fd.register_ioevent(notify, &address, queue).attempt("wiring a device's notification")?;
        }
        let transport = Transport::new(device, Arc::clone(ram.memory()), resources);
        transports.push(Arc::new(Mutex::new(transport)));
    }
    Ok(Bus::new(serial, platform, transports))
}

/// An interrupt line of a device that raises it by itself.
fn irq_line(vm: &Vm, gsi: u32) -> Result<IrqLine, CreateError> {
    let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(CreateError::Events)?;
    vm.fd.register_irqfd(&line, gsi).attempt("wiring an interrupt")?;
    Ok(IrqLine::new(line))
}
