//! What migration sessions have the agent do: routes, and the ends of VMMs.

use std::rc::Rc;

use wire::fleet::HostPhase;

use super::Host;
use super::machine::Machine;
use crate::shard::{ShardOrder, Work};

impl Host {
    /// Does one thing for a session; `Err` is one line for people. The number is that of held packets, for `Forward`.
    pub(super) async fn do_work(self: &Rc<Self>, machine: &Rc<Machine>, work: Work) -> Result<u64, String> {
        let line = |error: anyhow::Error| format!("{error:#}");
        match work {
            Work::InstallRoute => {
                self.route_here(machine).await.map_err(line)?;
                // What a flush has promised the guest on the source holds here before it runs here.
                if let Some(vm) = machine.vm().filter(|vm| !vm.memory.disks.is_empty()) {
                    let synced = tokio::task::spawn_blocking(move || vm.memory.sync_disks()).await;
                    synced
                        .map_err(|e| e.to_string())?
                        .map_err(|e| format!("a disk cannot be synced: {e}"))?;
                }
            }
            Work::RemoveRoute => {
                let _order = machine.net_turn.lock().await;
                self.net.release(&machine.addresses()).await.map_err(|e| line(e.into()))?;
            }
            Work::Forward { migration } => return self.forward(machine, migration).await.map_err(line),
            Work::Unforward => {
                self.route_here(machine).await.map_err(line)?;
                let _order = machine.net_turn.lock().await;
                self.net.answer_for(&machine.addresses()).await.map_err(|e| line(e.into()))?;
                self.announce(machine.addresses());
            }
            Work::Release => {
                self.end_vm(machine).await;
                self.remove_disks(machine.id());
                // How it came here is of no interest any more, and what received it holds on to its RAM.
                self.forget_arrival(machine);
                self.ledger.borrow_mut().release(machine.id());
                self.note_change();
            }
            Work::Discard => self.clear_away(machine).await,
            Work::RenewVmm => self.renew(machine).await?,
        }
        Ok(0)
    }

    async fn route_here(&self, machine: &Machine) -> anyhow::Result<()> {
        let _order = machine.net_turn.lock().await;
        let tap = machine.vm().ok_or_else(|| anyhow::anyhow!("the VMM is gone"))?.tap_index;
        Ok(self.net.route_to_tap(tap, &machine.addresses()).await?)
    }

    async fn forward(&self, machine: &Machine, migration: wire::ids::MigrationId) -> anyhow::Result<u64> {
        let _order = machine.net_turn.lock().await;
        let outgoing = self.outgoing.borrow().get(&migration).cloned();
        let outgoing = outgoing.ok_or_else(|| anyhow::anyhow!("{migration} is not known"))?;
        let vm = machine.vm().ok_or_else(|| anyhow::anyhow!("the VMM is gone"))?;
        let held = self.net.forward(&machine.addresses(), &outgoing.forward_to, &vm.tap).await?;
        outgoing.held.set(held);
        Ok(held)
    }

    /// A fresh VMM over the RAM of a machine that is still being received.
    async fn renew(self: &Rc<Self>, machine: &Rc<Machine>) -> Result<(), String> {
        let _turn = machine.turn.lock().await;
        let vm = machine.take_vm().ok_or("the VMM is gone")?;
        if machine.phase() != HostPhase::Incoming {
            return Err("the machine is not being received any more".to_owned());
        }
        let home = self.shards.at(self.shards.home_of(machine.id()));
        home.send(ShardOrder::Detach { machine: machine.id() }).await.map_err(|e| e.to_string())?;
        let process = vm.process.clone();
        tokio::task::spawn_blocking(move || process.kill()).await.map_err(|e| e.to_string())?;
        self.start_vmm(machine, vm.memory, vm.tap, vm.tap_index, |_| Ok(())).await.map_err(|e| e.detail)
    }
}
