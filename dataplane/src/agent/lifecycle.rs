//! Making and ending machines.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use wire::fleet::{DiskStart, FromHost, HostPhase, RefusalCode};
use wire::ids::{Epoch, MachineId};
use wire::vmm::{Code, GuestEnd, MachineSpec};

use super::capacity::Lacking;
use super::commands::Refusal;
use super::machine::{Machine, Vm};
use super::{Host, disks};
use crate::memory::{DiskOverlay, MachineMemory};
use crate::net::{Addresses, GATEWAY_IP4, GATEWAY_IP6, Tap, tap_name};
use crate::shard::{ShardOrder, VmmRequest};
use crate::vm::VmmError;
use crate::vm::initrd::with_config;
use crate::vm::process::{MachineDir, VmmProcess};
use crate::vm::setup::Setup;

/// When to announce a machine that has arrived, after the first time: past Linux's `locktime` of a second, and once more in case
/// the announcement was lost. Until a peer heard it, the forward route serves that peer.
const ANNOUNCE_AGAIN: [Duration; 2] = [Duration::from_millis(1200), Duration::from_secs(3)];

impl Host {
    /// Creates and boots a machine; done when its vCPUs run.
    pub(super) async fn launch(
        self: &Rc<Self>,
        spec: MachineSpec,
        epoch: Epoch,
        disks: DiskStart,
    ) -> Result<(), Refusal> {
        let id = spec.id;
        self.check_fence(id, epoch)?;
        if let Some(old) = self.machine(id) {
            match old.phase() {
                HostPhase::Running if old.epoch() == epoch => return Ok(()),
                HostPhase::Ended | HostPhase::GivenAway if old.epoch() < epoch => self.clear_away(&old).await,
                phase => return Err(already_here(&old, phase)),
            }
        }
        self.ledger.borrow_mut().hold(&spec).map_err(lacking)?;
        self.lost.borrow_mut().forget_below(id, epoch);
        let machine = Rc::new(Machine::new(spec, epoch, HostPhase::Starting));
        self.machines.borrow_mut().insert(id, machine.clone());
        self.note_change();
        let _turn = machine.turn.lock().await;
        let launched = self.boot(&machine, epoch, disks).await;
        if launched.is_err() {
            self.clear_away(&machine).await;
            if disks == DiskStart::Fresh {
                self.remove_disks(id);
            }
        }
        launched
    }

    async fn boot(
        self: &Rc<Self>,
        machine: &Rc<Machine>,
        epoch: Epoch,
        disks: DiskStart,
    ) -> Result<(), Refusal> {
        let spec = machine.spec();
        let kernel = self.open_file(&spec.boot.kernel).await?;
        let mut initrd = match &spec.boot.initrd {
            Some(file) => Some(self.open_file(file).await?),
            None => None,
        };
        if !spec.boot.guest_config.is_empty() {
            initrd = Some(with_config(initrd, &spec.boot.guest_config).map_err(Refusal::host)?);
        }
        let kernel_cmdline = cmdline(spec);
        let disks = self.open_disks(spec, disks, disks::OWNED).await?;
        self.create(machine, disks, move |setup| setup.boot(kernel, initrd, kernel_cmdline)).await?;
        let addresses = machine.addresses();
        let tap = machine.vm().map_or(0, |vm| vm.tap_index);
        self.net.route_to_tap(tap, &addresses).await.map_err(Refusal::host)?;
        self.net.answer_for(&addresses).await.map_err(Refusal::host)?;
        self.ask_vmm(machine.id(), VmmRequest::Run(epoch)).await.map_err(Refusal::host)?;
        machine.set_phase(HostPhase::Running);
        self.announce(addresses);
        Ok(())
    }

    /// Makes memory, tap and VMM of a machine, has `load` do the rest of the setting up, and gives it to its home shard.
    pub(super) async fn create(
        self: &Rc<Self>,
        machine: &Rc<Machine>,
        disks: Vec<DiskOverlay>,
        load: impl FnOnce(&mut Setup) -> Result<(), VmmError> + Send + 'static,
    ) -> Result<(), Refusal> {
        let id = machine.id();
        let dir = MachineDir::of(&self.config.state, id);
        dir.create(&machine.addresses()).map_err(Refusal::host)?;
        let tap = Arc::new(Tap::open(&tap_name(id)).map_err(Refusal::host)?);
        let tap_index = self.net.attach(&tap_name(id), &machine.addresses()).await.map_err(Refusal::host)?;
        let memory =
            Arc::new(MachineMemory::with_disks(machine.spec().space(), disks).map_err(Refusal::host)?);
        self.start_vmm(machine, memory, tap, tap_index, load).await
    }

    /// Starts a VMM process over existing memory and tap.
    pub(super) async fn start_vmm(
        self: &Rc<Self>,
        machine: &Rc<Machine>,
        memory: Arc<MachineMemory>,
        tap: Arc<Tap>,
        tap_index: u32,
        load: impl FnOnce(&mut Setup) -> Result<(), VmmError> + Send + 'static,
    ) -> Result<(), Refusal> {
        let (spec, program) = (machine.spec().clone(), self.config.vmm.clone());
        let dir = MachineDir::of(&self.config.state, spec.id);
        let (memory_there, tap_there) = (memory.clone(), tap.clone());
        let started = tokio::task::spawn_blocking(move || {
            let process = VmmProcess::spawn(&program, &dir)?;
            let set_up = || {
                let mut setup = Setup::connect(&dir.socket())?;
                setup.create(&spec, &memory_there, &tap_there)?;
                load(&mut setup)?;
                Ok(setup.into_socket())
            };
            match set_up() {
                Ok(socket) => Ok((process, socket)),
                Err(error) => {
                    process.kill();
                    Err(error)
                }
            }
        });
        let (process, socket) = started.await.map_err(Refusal::host)?.map_err(boot_refusal)?;
        let process = Arc::new(process);
        machine.set_vm(Vm { process, memory, tap, tap_index });
        self.attach(machine, socket).await
    }

    /// Gives a control socket to the machine's home shard.
    pub(super) async fn attach(
        &self,
        machine: &Machine,
        socket: std::os::fd::OwnedFd,
    ) -> Result<(), Refusal> {
        let (answer, attached) = oneshot::channel();
        let id = machine.id();
        let pid = machine.vm().map_or(0, |vm| vm.process.pid());
        let home = self.shards.at(self.shards.home_of(id));
        home.send(ShardOrder::Attach { machine: id, pid, socket, answer }).await.map_err(Refusal::host)?;
        attached.await.map_err(Refusal::host)?.map_err(Refusal::host)
    }

    /// Asks a machine's VMM through its home shard.
    pub(super) async fn ask_vmm(&self, id: MachineId, request: VmmRequest) -> Result<(), VmmError> {
        let (answer, asked) = oneshot::channel();
        let gone = || VmmError::Gone { waiting_for: "the shard", source: None };
        let home = self.shards.at(self.shards.home_of(id));
        home.send(ShardOrder::Vmm { machine: id, request, answer }).await.map_err(|_| gone())?;
        asked.await.map_err(|_| gone())?
    }

    /// Ends a machine and clears away all of it, forward routes included; its disks, too, unless they are to be kept.
    pub(super) async fn destroy(
        self: &Rc<Self>,
        id: MachineId,
        epoch: Epoch,
        keep_disks: bool,
    ) -> Result<(), Refusal> {
        let Some(machine) = self.machine(id) else {
            if !keep_disks {
                self.remove_disks(id);
            }
            return Ok(());
        };
        let _turn = machine.turn.lock().await;
        if machine.epoch() > epoch && machine.phase() != HostPhase::GivenAway {
            let detail = format!("it is here under {}, above {epoch}", machine.epoch());
            return Err(Refusal::new(RefusalCode::Stale, detail));
        }
        self.clear_away(&machine).await;
        if !keep_disks {
            self.remove_disks(id);
        }
        self.settle_doubt(&machine);
        self.tell_sessions_of_end(&machine);
        Ok(())
    }

    /// Presses the machine's power button.
    pub(super) async fn power_button(&self, id: MachineId) -> Result<(), Refusal> {
        let here = self.machine(id).filter(|machine| machine.phase() != HostPhase::GivenAway);
        here.ok_or_else(|| Refusal::new(RefusalCode::WrongState, format!("{id} does not run on this host")))?;
        self.ask_vmm(id, VmmRequest::PowerButton).await.map_err(Refusal::host)
    }

    /// Ends the VMM, frees memory and tap, removes routes, the entry and the directory, unless routes are left that it speaks of. Disks go if they are those
    /// of a copy that is not the machine.
    pub(super) async fn clear_away(self: &Rc<Self>, machine: &Rc<Machine>) {
        self.end_vm(machine).await;
        if matches!(machine.phase(), HostPhase::Incoming | HostPhase::GivenAway) {
            self.remove_disks(machine.id());
        }
        let released = {
            let _order = machine.net_turn.lock().await;
            self.net.release(&machine.addresses()).await
        };
        if let Err(error) = &released {
            tracing::warn!(machine = %machine.id(), error = format!("{error:#}"), "cannot remove routes");
        }
        if machine.phase() != HostPhase::Incoming {
            self.forget_arrival(machine);
        }
        let mut machines = self.machines.borrow_mut();
        if machines.get(&machine.id()).is_some_and(|current| Rc::ptr_eq(current, machine)) {
            machines.remove(&machine.id());
            self.ledger.borrow_mut().release(machine.id());
            if released.is_ok() {
                MachineDir::of(&self.config.state, machine.id()).remove();
            }
        }
        drop(machines);
        self.note_change();
    }

    /// Ends the VMM and frees memory and tap.
    pub(super) async fn end_vm(&self, machine: &Rc<Machine>) {
        let id = machine.id();
        let Some(vm) = machine.take_vm() else { return };
        // Whatever it answers: it is waited for, and killed if need be.
        let _asked = self.ask_vmm(id, VmmRequest::Quit).await;
        let process = vm.process.clone();
        let _ended = tokio::task::spawn_blocking(move || process.end()).await;
        let home = self.shards.at(self.shards.home_of(id));
        let _shard_gone = home.send(ShardOrder::Detach { machine: id }).await;
    }

    /// The VMM hung up without being told to end: it is dead, or as good as; make sure of it.
    pub(super) async fn bury(self: &Rc<Self>, machine: Rc<Machine>) {
        let Some(vm) = machine.vm() else { return };
        let process = vm.process.clone();
        let _killed = tokio::task::spawn_blocking(move || process.kill()).await;
        let pid = vm.process.pid();
        self.guest_ended(
            &machine,
            GuestEnd::Crash(format!("the VMM process {pid} has died; see its vmm.log")),
        );
    }

    /// Notes and reports that a guest is no more.
    pub(super) fn guest_ended(&self, machine: &Rc<Machine>, end: GuestEnd) {
        if machine.set_ended(end.clone()) {
            tracing::info!(machine = %machine.id(), ?end, "guest ended");
            self.say(FromHost::GuestEnded { machine: machine.id(), epoch: machine.epoch(), end });
            self.note_change();
        }
        self.tell_sessions_of_end(machine);
    }

    /// Announces a machine now and again.
    pub(super) fn announce(self: &Rc<Self>, addresses: Addresses) {
        let host = self.clone();
        tokio::task::spawn_local(async move {
            for pause in std::iter::once(Duration::ZERO).chain(ANNOUNCE_AGAIN) {
                tokio::time::sleep(pause).await;
                if !host.answers_for(&addresses) {
                    return;
                }
                if let Err(error) = host.net.announce(&addresses) {
                    tracing::warn!(ip4 = %addresses.ip4, %error, "cannot announce a machine");
                }
            }
        });
    }

    fn answers_for(&self, addresses: &Addresses) -> bool {
        let here = |m: &Rc<Machine>| m.addresses() == *addresses && m.phase() != HostPhase::GivenAway;
        self.machines.borrow().values().any(here)
    }

    pub(super) fn check_fence(&self, id: MachineId, epoch: Epoch) -> Result<(), Refusal> {
        match self.fences.borrow().get(&id) {
            Some(fence) if epoch <= *fence => {
                Err(Refusal::new(RefusalCode::Stale, format!("{id} is fenced up to {fence} here")))
            }
            _ => Ok(()),
        }
    }
}

/// What the guest is told on its command line, after what the user wants there.
fn cmdline(spec: &MachineSpec) -> String {
    let Addresses { ip4, ip6, .. } = Addresses::from(spec);
    let own = format!(
        "mashine.id={} mashine.vcpus={} mashine.ip4={ip4}/32 mashine.gw4={GATEWAY_IP4} mashine.ip6={ip6}/128 \
         mashine.gw6={GATEWAY_IP6}",
        spec.id, spec.vcpus
    );
    if spec.boot.cmdline.is_empty() { own } else { format!("{} {own}", spec.boot.cmdline) }
}

pub(super) fn lacking(lack: Lacking) -> Refusal {
    let code = match &lack {
        Lacking::Ram { .. } => RefusalCode::NoRam,
        Lacking::Features(_) => RefusalCode::CpuFeature,
        Lacking::Tsc { .. } => RefusalCode::Tsc,
    };
    Refusal::new(code, lack.to_string())
}

fn already_here(machine: &Machine, phase: HostPhase) -> Refusal {
    let detail = format!("{} is here already ({phase:?}, {})", machine.spec().name, machine.epoch());
    Refusal::new(RefusalCode::Stale, detail)
}

/// A kernel that is none is the user's affair, everything else this host's.
fn boot_refusal(error: VmmError) -> Refusal {
    match &error {
        VmmError::Refused { code: Code::BadKernel | Code::BadArgument, detail } => {
            Refusal::new(RefusalCode::BadBoot, detail.clone())
        }
        _ => Refusal::host(error),
    }
}
