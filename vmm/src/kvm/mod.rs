//! The VM as KVM holds it: memory slots, interrupt chips, timer, clock, dirty log. vCPUs are in [`crate::vcpu`].
//!
//! Everything costly (8 ms for a VM) happens in [`Vm::new`], long before a pause. Nothing here is undone on failure: a
//! VM that could not be made ends with its process.

pub mod caps;
pub mod cpuid;
pub mod features;
pub mod ioctl;
pub mod log;
pub mod probe;
pub mod profile;

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_irqchip,
    kvm_pit_config, kvm_pit_state2, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::errno;
use wire::state::{IrqchipState, PitState};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::memory::{Ram, Slot};
use caps::{Caps, CapsError};

/// Where KVM may keep a task state segment and an identity map of its own, within the hole for devices.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Why KVM could not do it.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The host's KVM is not usable.
    #[error("this host cannot run machines")]
    Caps(#[from] CapsError),
    /// An ioctl failed.
    #[error("KVM: {what} failed")]
    Ioctl {
        /// What was attempted.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: errno::Error,
    },
    /// A structure in a state archive has another size than this kernel's.
    #[error("`{what}` has {have} bytes in the state archive, {want} are needed")]
    Size {
        /// Which structure.
        what: &'static str,
        /// Its size in the archive.
        have: usize,
        /// The size here.
        want: usize,
    },
    /// The host cannot give the guest's TSC its frequency.
    #[error("the guest's TSC runs at {want} kHz and this host's at {have} kHz, which its KVM cannot change")]
    TscFrequency {
        /// The guest's.
        want: u32,
        /// The host's.
        have: u32,
    },
    /// KVM does not take an MSR's value.
    #[error("this host's KVM refuses MSR {index:#x} = {value:#x}, which the guest uses")]
    Msr {
        /// Its number.
        index: u32,
        /// The guest's value.
        value: u64,
    },
    /// A CPU feature is missing.
    #[error("the machine's CPU profile does not fit this host")]
    Feature(#[from] cpuid::MissingFeature),
    /// A vCPU thread did not answer.
    #[error("vCPU {0} did not answer within its time")]
    VcpuSilent(u32),
    /// A thread could not be started.
    #[error("a vCPU thread cannot be started")]
    Thread(#[source] std::io::Error),
}

/// Makes an ioctl's failure a [`KvmError`] that says what was attempted.
pub trait Attempt<T> {
    /// Adds `what` to the failure.
    ///
    /// # Errors
    /// The same failure, named.
    fn attempt(self, what: &'static str) -> Result<T, KvmError>;
}

impl<T> Attempt<T> for Result<T, errno::Error> {
    fn attempt(self, what: &'static str) -> Result<T, KvmError> {
        self.map_err(|source| KvmError::Ioctl { what, source })
    }
}

/// The bytes of one of KVM's structures, for an archive.
pub fn to_bytes<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

/// One of KVM's structures from an archive.
///
/// # Errors
/// [`KvmError::Size`] when the bytes are not exactly as long.
pub fn from_bytes<T: FromBytes>(bytes: &[u8], what: &'static str) -> Result<T, KvmError> {
    T::read_from_bytes(bytes).map_err(|_| KvmError::Size { what, have: bytes.len(), want: size_of::<T>() })
}

/// A VM without vCPUs.
#[derive(Debug)]
pub struct Vm {
    /// Its descriptor.
    pub fd: Arc<VmFd>,
    /// What this KVM can do.
    pub caps: Caps,
    /// CPUID leaves that this KVM supports.
    pub supported_cpuid: CpuId,
    /// MSRs that make up a vCPU's state here.
    pub msr_indices: Vec<u32>,
}

impl Vm {
    /// Makes a VM with `ram`, interrupt chips and timer.
    ///
    /// # Errors
    /// [`KvmError`] when the host cannot.
    pub fn new(kvm: OwnedFd, ram: &Ram) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned and given up here; whether it is /dev/kvm shows at the first ioctl.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        caps::require(&kvm)?;
        let fd = kvm.create_vm().attempt("creating a VM")?;
        let caps = Caps::probe(&fd);
        let vm = Self {
            fd: Arc::new(fd),
            caps,
            supported_cpuid: kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).attempt("asking for CPUID")?,
            msr_indices: kvm.get_msr_index_list().attempt("asking for MSRs")?.as_slice().to_vec(),
        };
        vm.fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).attempt("placing the identity map")?;
        vm.fd.set_tss_address(TSS_ADDRESS).attempt("placing the TSS")?;
        vm.fd.create_irq_chip().attempt("making interrupt chips")?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.fd.create_pit2(pit).attempt("making the timer")?;
        if caps.manual_dirty_protect != 0 {
            let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
            let flags = u64::from(caps.manual_dirty_protect & wanted);
            let cap = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                args: [flags, 0, 0, 0],
                ..Default::default()
            };
            vm.fd.enable_cap(&cap).attempt("enabling manual dirty log protection")?;
        }
        for slot in ram.slots() {
            vm.set_slot(ram, slot, false)?;
        }
        Ok(vm)
    }

    /// Tells KVM about a piece of RAM, with or without a dirty log.
    ///
    /// # Errors
    /// [`KvmError`] when KVM refuses.
    pub fn set_slot(&self, ram: &Ram, slot: &Slot, log: bool) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot: slot.number,
            flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: slot.guest_start,
            memory_size: slot.pages * wire::units::PAGE_BYTES,
            userspace_addr: ram.host_address(slot) as u64,
        };
        // SAFETY: the memory is `ram`'s mapping, which the machine keeps until its VM and vCPUs are gone, and Rust
        // code only touches it by volatile access.
        let done = unsafe { self.fd.set_user_memory_region(region) };
        done.attempt("giving the VM its RAM")
    }

    /// Makes vCPU number `id`.
    ///
    /// # Errors
    /// [`KvmError`] when KVM refuses.
    pub fn create_vcpu(&self, id: u32) -> Result<VcpuFd, KvmError> {
        self.fd.create_vcpu(id.into()).attempt("making a vCPU")
    }

    /// Reads the interrupt chips.
    ///
    /// # Errors
    /// [`KvmError`] when KVM refuses.
    pub fn save_irqchip(&self) -> Result<IrqchipState, KvmError> {
        let get = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd.get_irqchip(&mut chip).attempt("reading an interrupt chip")?;
            Ok::<_, KvmError>(to_bytes(&chip))
        };
        Ok(IrqchipState {
            pic_master: get(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: get(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: get(KVM_IRQCHIP_IOAPIC)?,
        })
    }

    /// Writes the interrupt chips.
    ///
    /// # Errors
    /// [`KvmError`] when the state does not fit or KVM refuses.
    pub fn restore_irqchip(&self, state: &IrqchipState) -> Result<(), KvmError> {
        let chips = [
            (KVM_IRQCHIP_PIC_MASTER, &state.pic_master),
            (KVM_IRQCHIP_PIC_SLAVE, &state.pic_slave),
            (KVM_IRQCHIP_IOAPIC, &state.ioapic),
        ];
        for (chip_id, bytes) in chips {
            let chip: kvm_irqchip = from_bytes(bytes, "kvm_irqchip")?;
            self.fd.set_irqchip(&kvm_irqchip { chip_id, ..chip }).attempt("writing an interrupt chip")?;
        }
        Ok(())
    }

    /// Masks both PICs, as firmware leaves them to a kernel that will not use them: unmasked, an edge on a line below 16 would
    /// reach vCPU 0 through its local APIC's first pin with the vectors of a PIC that nobody has set up.
    ///
    /// # Errors
    /// [`KvmError`] when KVM refuses.
    pub fn mask_pics(&self) -> Result<(), KvmError> {
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd.get_irqchip(&mut chip).attempt("reading an interrupt chip")?;
            chip.chip.pic.imr = 0xff;
            self.fd.set_irqchip(&chip).attempt("writing an interrupt chip")?;
        }
        Ok(())
    }

    /// Reads the timer.
    ///
    /// # Errors
    /// [`KvmError`] when KVM refuses.
    pub fn save_pit(&self) -> Result<PitState, KvmError> {
        Ok(PitState { bytes: to_bytes(&self.fd.get_pit2().attempt("reading the timer")?) })
    }

    /// Writes the timer.
    ///
    /// # Errors
    /// [`KvmError`] when the state does not fit or KVM refuses.
    pub fn restore_pit(&self, state: &PitState) -> Result<(), KvmError> {
        let pit: kvm_pit_state2 = from_bytes(&state.bytes, "kvm_pit_state2")?;
        self.fd.set_pit2(&pit).attempt("writing the timer")
    }
}
