//! Finding the machines that an earlier `mashined` left running, and taking charge of them again.
//!
//! The VMM says what it is. A machine that was given away stays so: its fate is settled by the control plane. A copy that was being
//! received and never ran is dropped, which is also the promise that it never will run here; one that may have run, and whose VMM is
//! gone, is remembered as lost, so that the promise is not given. A machine that was paused by a
//! migration, and not given away, is this host's and goes on. Of a machine whose VMM is gone (it died with the last `mashined`, or it had
//! moved and only its forward route stood) routes and proxy entries are removed, then its directory.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use wire::fleet::HostPhase;
use wire::ids::{Epoch, MachineId};
use wire::vmm::Phase;

use super::Host;
use super::machine::{Machine, Vm};
use crate::net::{HostNetwork, tap_name};
use crate::shard::VmmRequest;
use crate::vm::VmmError;
use crate::vm::claim::Lost;
use crate::vm::process::{MachineDir, VmmProcess};
use crate::vm::setup::{Adopted, Setup};

/// A machine found running.
pub(super) struct Survivor {
    process: VmmProcess,
    socket: std::os::fd::OwnedFd,
    /// What it says of itself.
    pub adopted: Adopted,
}

/// What earlier `mashined`s left behind.
pub(super) struct Found {
    /// Machines that run.
    pub survivors: Vec<Survivor>,
    /// Machines that were moved here, may have run, and are gone.
    pub lost: Lost,
    /// Directories of machines whose VMM is gone.
    remains: Vec<MachineDir>,
}

/// Finds all machines of this host that still run, and what is left of those that do not. Blocks.
pub(super) fn find(state: &Path) -> Found {
    let mut found = Found { survivors: Vec::new(), lost: Lost::open(state), remains: Vec::new() };
    for id in MachineDir::list(state) {
        let dir = MachineDir::of(state, id);
        match find_one(id, &dir) {
            Fate::Runs(survivor) => found.survivors.push(*survivor),
            Fate::NeverRan => found.remains.push(dir),
            // Without the note of its loss the directory stays for the next `mashined`, claim and all.
            Fate::Unknown => match note_loss(&mut found.lost, id, &dir) {
                Ok(()) => found.remains.push(dir),
                Err(error) => tracing::error!(machine = %id, %error, "cannot note that a machine was lost"),
            },
        }
    }
    found
}

impl Found {
    /// Clears away what is left of machines that are no more. What cannot be removed is tried again by the next `mashined`.
    pub async fn clear_remains(&mut self, net: &HostNetwork) {
        for dir in std::mem::take(&mut self.remains) {
            let released = match dir.addresses() {
                Some(addresses) => net.release(&addresses).await,
                None => Ok(()),
            };
            match released {
                Ok(()) => dir.remove(),
                Err(error) => {
                    let error = format!("{:#}", anyhow::Error::from(error));
                    tracing::warn!(?dir, error, "cannot remove the routes of a machine that is no more");
                }
            }
        }
    }
}

/// What became of a machine while no `mashined` ran.
enum Fate {
    /// Its VMM says that it is owned here.
    Runs(Box<Survivor>),
    /// Its VMM said that it never ran, and was ended.
    NeverRan,
    /// There is no VMM that could say.
    Unknown,
}

fn note_loss(lost: &mut Lost, id: MachineId, dir: &MachineDir) -> Result<(), VmmError> {
    match dir.may_have_run() {
        Some(epoch) => lost.add(id, epoch),
        None => Ok(()),
    }
}

fn find_one(id: MachineId, dir: &MachineDir) -> Fate {
    let Some(process) = VmmProcess::find(dir) else { return Fate::Unknown };
    let found = Setup::connect(&dir.socket()).and_then(|mut setup| Ok((setup.adopt()?, setup)));
    match found {
        // One that never ran holds nothing that anybody owns.
        Ok((Some(adopted), setup)) if adopted.epoch > Epoch::default() => {
            Fate::Runs(Box::new(Survivor { process, socket: setup.into_socket(), adopted }))
        }
        Ok(_) => {
            tracing::info!(machine = %id, "dropping a machine that was never run here");
            process.kill();
            Fate::NeverRan
        }
        Err(error) => {
            tracing::warn!(machine = %id, %error, "a VMM does not answer; ending it");
            process.kill();
            Fate::Unknown
        }
    }
}

impl Host {
    pub(super) async fn adopt(self: &Rc<Self>, survivors: Vec<Survivor>) {
        for survivor in survivors {
            let id = survivor.adopted.spec.id;
            if let Err(error) = self.adopt_one(survivor).await {
                tracing::warn!(machine = %id, error = format!("{error:#}"), "cannot take charge of a machine again");
            }
        }
    }

    async fn adopt_one(self: &Rc<Self>, survivor: Survivor) -> anyhow::Result<()> {
        let Survivor { process, socket, adopted } = survivor;
        let Adopted { spec, phase, epoch, disowned, ended, memory, tap } = adopted;
        let id = spec.id;
        // What runs is held, whatever the limit says now.
        let _over_the_limit = self.ledger.borrow_mut().hold(&spec);
        let host_phase = match (phase, &disowned) {
            (_, Some(_)) => HostPhase::GivenAway,
            (Phase::Ended, _) => HostPhase::Ended,
            _ => HostPhase::Starting,
        };
        let machine = Rc::new(Machine::new(spec, epoch, host_phase));
        machine.set_migration(disowned.as_ref().map(|d| d.migration));
        let addresses = machine.addresses();
        let tap_index = self.net.attach(&tap_name(id), &addresses).await?;
        let (process, memory, tap) = (Arc::new(process), Arc::new(memory), Arc::new(tap));
        machine.set_vm(Vm { process, memory, tap, tap_index });
        self.machines.borrow_mut().insert(id, machine.clone());
        self.attach(&machine, socket).await.map_err(|refusal| anyhow::anyhow!(refusal.detail))?;
        if let Some(end) = ended {
            self.guest_ended(&machine, end);
        }
        if host_phase != HostPhase::GivenAway {
            self.own_disks(machine.spec());
        }
        if host_phase == HostPhase::Starting {
            self.ask_vmm(id, VmmRequest::Run(epoch)).await?;
            machine.set_phase(HostPhase::Running);
            self.ask_vmm(id, VmmRequest::StopDirtyLog).await?;
            self.net.route_to_tap(tap_index, &addresses).await?;
            self.net.answer_for(&addresses).await?;
            self.announce(addresses);
        }
        tracing::info!(machine = %id, %epoch, phase = ?machine.phase(), "took charge again");
        Ok(())
    }
}
