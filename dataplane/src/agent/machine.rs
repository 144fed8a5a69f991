//! A machine as its host knows it: what it is, what it does here, and the processes and memory that are it.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Mutex;
use wire::fleet::{HostPhase, MachineReport};
use wire::ids::{Epoch, MachineId, MigrationId};
use wire::vmm::{GuestEnd, MachineSpec};

use crate::memory::MachineMemory;
use crate::net::{Addresses, Tap};
use crate::vm::process::VmmProcess;

/// The parts of a machine that take resources. Shared with sessions on shards; the last one to let go frees them.
#[derive(Clone)]
pub(super) struct Vm {
    pub process: Arc<VmmProcess>,
    pub memory: Arc<MachineMemory>,
    pub tap: Arc<Tap>,
    /// Interface index of the tap.
    pub tap_index: u32,
}

/// A machine on this host. The entry outlives its [`Vm`]: a machine that was given away leaves a forward route.
pub(super) struct Machine {
    spec: MachineSpec,
    epoch: Cell<Epoch>,
    phase: Cell<HostPhase>,
    running_since: Cell<Option<Instant>>,
    end: RefCell<Option<GuestEnd>>,
    vm: RefCell<Option<Vm>>,
    /// The migration that brought it here or takes it away, while that is of interest.
    migration: Cell<Option<MigrationId>>,
    /// Creating and ending, one at a time.
    pub turn: Mutex<()>,
    /// Changes of its routes, in the order they were asked for.
    pub net_turn: Mutex<()>,
}

impl Machine {
    pub fn new(spec: MachineSpec, epoch: Epoch, phase: HostPhase) -> Self {
        Self {
            spec,
            epoch: Cell::new(epoch),
            phase: Cell::new(phase),
            running_since: Cell::new(None),
            end: RefCell::default(),
            vm: RefCell::default(),
            migration: Cell::new(None),
            turn: Mutex::new(()),
            net_turn: Mutex::new(()),
        }
    }

    pub fn id(&self) -> MachineId {
        self.spec.id
    }

    pub fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    pub fn addresses(&self) -> Addresses {
        Addresses::from(&self.spec)
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch.get()
    }

    pub fn set_epoch(&self, epoch: Epoch) {
        self.epoch.set(self.epoch.get().max(epoch));
    }

    pub fn phase(&self) -> HostPhase {
        self.phase.get()
    }

    /// Moves on to another phase. A guest that has ended stays ended.
    pub fn set_phase(&self, phase: HostPhase) {
        if self.phase.get() == HostPhase::Ended {
            return;
        }
        let was_running = matches!(self.phase.get(), HostPhase::Running | HostPhase::MigratingOut);
        if phase == HostPhase::Running && !was_running {
            self.running_since.set(Some(Instant::now()));
        }
        self.phase.set(phase);
    }

    pub fn end(&self) -> Option<GuestEnd> {
        self.end.borrow().clone()
    }

    /// Notes that the guest has ended; whether this is news.
    pub fn set_ended(&self, end: GuestEnd) -> bool {
        let news = self.phase.get() != HostPhase::Ended;
        if news {
            self.phase.set(HostPhase::Ended);
            self.end.replace(Some(end));
        }
        news
    }

    pub fn vm(&self) -> Option<Vm> {
        self.vm.borrow().clone()
    }

    pub fn set_vm(&self, vm: Vm) {
        self.vm.replace(Some(vm));
    }

    pub fn take_vm(&self) -> Option<Vm> {
        self.vm.take()
    }

    pub fn migration(&self) -> Option<MigrationId> {
        self.migration.get()
    }

    pub fn set_migration(&self, migration: Option<MigrationId>) {
        self.migration.set(migration);
    }

    pub fn report(&self) -> MachineReport {
        let runs = matches!(self.phase.get(), HostPhase::Running | HostPhase::MigratingOut);
        let since = self.running_since.get().filter(|_| runs);
        MachineReport {
            machine: self.id(),
            epoch: self.epoch(),
            phase: self.phase(),
            vmm_pid: self.vm.borrow().as_ref().map_or(0, |vm| vm.process.pid()),
            running_ms: since
                .map_or(0, |since| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)),
        }
    }
}
