//! Saving and restoring the machine: which components there are, and in which order.
//!
//! Saving is on the clock of every migration: the guest stands still. It begins with the pause ([`Machine::begin_save`]), so
//! that vCPUs save on their own threads while the dirty log is harvested and the caller is answered. Interrupt chips are read before the
//! vCPUs' local APICs: an edge that arrives in between is then in one of the two, never in neither. Restoring sets the chips before the vCPUs' local APICs, and the clock last, when all else has been set.

use wire::state::{
    BlkState, ClockState, Component, IrqchipState, NetState, PitState, PlatformState, RngState, ShapeState,
    StateArchive, StateError, VsockState,
};

use super::{Machine, clock};
use crate::kvm::KvmError;
use crate::platform::BadPlatformState;
use crate::serial::BadSerialState;
use crate::vcpu::SaveError;
use crate::virtio::TransportError;

/// Why the machine cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The archive.
    #[error(transparent)]
    State(#[from] StateError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A virtio device.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The serial port.
    #[error(transparent)]
    Serial(#[from] BadSerialState),
    /// The platform's registers.
    #[error(transparent)]
    Platform(#[from] BadPlatformState),
    /// The state of another machine.
    #[error("this is the state of machine {got}, not of {want}")]
    Machine {
        /// In the archive.
        got: wire::ids::MachineId,
        /// Here.
        want: wire::ids::MachineId,
    },
    /// The state of a machine of another shape.
    #[error("the state is of a machine with {what} {got}, this one has {want}")]
    Shape {
        /// What differs.
        what: &'static str,
        /// In the archive.
        got: String,
        /// Here.
        want: String,
    },
}

impl From<SaveError> for SnapshotError {
    fn from(error: SaveError) -> Self {
        match error {
            SaveError::Kvm(error) => Self::Kvm(error),
            SaveError::Archive(error) => Self::State(error),
        }
    }
}

/// What [`Machine::begin_save`] has read.
#[derive(Debug)]
pub(super) struct Begun {
    clock: ClockState,
    irqchip: IrqchipState,
    pit: PitState,
}

impl SnapshotError {
    /// Whether it is the archive's fault and not the host's.
    pub const fn is_bad_state(&self) -> bool {
        !matches!(
            self,
            Self::Kvm(
                KvmError::Ioctl { .. } | KvmError::VcpuSilent(_) | KvmError::Thread(_) | KvmError::Caps(_)
            )
        )
    }
}

/// A disk's number in the archive: that of its slot, which every release gives in the same order.
fn index_of(slot: usize) -> u32 {
    u32::try_from(slot).unwrap_or(u32::MAX)
}

impl Machine {
    /// Begins to save, right after a pause: reads clock and chips, and sets the vCPUs' threads to work.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn begin_save(&mut self) -> Result<(), KvmError> {
        let begun = Begun {
            clock: clock::save(&self.vm)?,
            irqchip: self.vm.save_irqchip()?,
            pit: self.vm.save_pit()?,
        };
        self.vcpus.begin_save()?;
        self.begun = Some(begun);
        Ok(())
    }

    /// Saves all that the guest can observe besides RAM. Nothing runs.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn save(&mut self) -> Result<Vec<u8>, SnapshotError> {
        if self.begun.is_none() {
            self.begin_save()?;
        }
        let Some(begun) = self.begun.take() else { return Err(KvmError::VcpuSilent(0).into()) };
        let mut archive = StateArchive::new(self.spec.id);
        archive.add(0, &self.shape())?;
        archive.add(0, &begun.irqchip)?;
        archive.add(0, &begun.pit)?;
        archive.add(0, &begun.clock)?;
        archive.add(0, &self.bus.serial().save())?;
        archive.add(0, &self.bus.platform().save())?;
        for slot in 0..self.bus.slots() {
            let Some(transport) = self.bus.transport(slot) else { continue };
            let virtio = transport.save();
            match transport.name() {
                NetState::NAME => archive.add(0, &NetState { virtio, mac: self.spec.mac })?,
                VsockState::NAME => archive.add(0, &VsockState { virtio })?,
                BlkState::NAME => archive.add(index_of(slot), &BlkState { virtio })?,
                _ => archive.add(0, &RngState { virtio })?,
            }
        }
        // Last, because these come from other threads.
        for vcpu in self.vcpus.save()? {
            archive.push(vcpu);
        }
        Ok(archive.encode()?)
    }

    /// Restores what [`Machine::save`] saved into a machine that has not run.
    ///
    /// # Errors
    /// [`SnapshotError`]; the machine must not run then.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<(), SnapshotError> {
        let mut archive = StateArchive::decode(bytes)?;
        if archive.machine() != self.spec.id {
            return Err(SnapshotError::Machine { got: archive.machine(), want: self.spec.id });
        }
        let shape: ShapeState = archive.take(0)?;
        self.check_shape(&shape)?;
        let vcpus = (0..self.vcpus.count()).map(|id| archive.take(id)).collect::<Result<Vec<_>, _>>()?;
        let irqchip = archive.take(0)?;
        let pit = archive.take(0)?;
        let clock = archive.take(0)?;
        let serial = archive.take(0)?;
        let platform: Option<PlatformState> = archive.take_if_there(0)?;
        for slot in 0..self.bus.slots() {
            let Some(mut transport) = self.bus.transport(slot) else { continue };
            let virtio = match transport.name() {
                NetState::NAME => archive.take::<NetState>(0)?.virtio,
                VsockState::NAME => archive.take::<VsockState>(0)?.virtio,
                BlkState::NAME => archive.take::<BlkState>(index_of(slot))?.virtio,
                _ => archive.take::<RngState>(0)?.virtio,
            };
            transport.restore(&virtio)?;
        }
        archive.finish()?;

        self.vm.restore_irqchip(&irqchip)?;
        self.vm.restore_pit(&pit)?;
        {
            let mut port = self.bus.serial();
            port.restore(&serial)?;
            port.console().set_offset(shape.console_offset);
        }
        // The first release had no such chip; its guests know nothing of it.
        if let Some(platform) = platform {
            self.bus.platform().restore(&platform)?;
        }
        let plan = clock::restore(&self.vm, &clock, shape.tsc_khz)?;
        self.vcpus.restore(vcpus, plan)?;
        self.resume_devices = true;
        Ok(())
    }

    fn shape(&self) -> ShapeState {
        let name = |slot| self.bus.transport(slot).map_or(String::new(), |t| t.name().to_owned());
        ShapeState {
            vcpus: self.vcpus.count(),
            ram_bytes: self.spec.ram.bytes(),
            devices: (0..self.bus.slots()).map(name).collect(),
            tsc_khz: self.vcpus.tsc_khz(),
            console_offset: self.bus.serial().console().offset(),
        }
    }

    fn check_shape(&self, got: &ShapeState) -> Result<(), SnapshotError> {
        let want = self.shape();
        let check = |what, got: String, want: String| {
            if got == want { Ok(()) } else { Err(SnapshotError::Shape { what, got, want }) }
        };
        check("vCPUs", got.vcpus.to_string(), want.vcpus.to_string())?;
        check("bytes of RAM", got.ram_bytes.to_string(), want.ram_bytes.to_string())?;
        check("devices", got.devices.join(" "), want.devices.join(" "))
    }
}
