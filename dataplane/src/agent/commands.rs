//! Commands of the control plane: which function carries out which.

use std::rc::Rc;

use wire::fleet::{Answer, Command, RefusalCode};
use wire::ids::MachineId;

use super::Host;
use super::moves::MoveOrder;

/// Most bytes of serial output in one answer.
const CONSOLE_BYTES_MAX: u32 = 1 << 20;

/// A command that was refused.
#[derive(Debug, thiserror::Error)]
#[error("{detail}")]
pub(super) struct Refusal {
    pub code: RefusalCode,
    pub detail: String,
}

impl Refusal {
    pub fn new(code: RefusalCode, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into() }
    }

    /// A failure of this host: the whole chain of causes in one line.
    pub fn host(error: impl Into<anyhow::Error>) -> Self {
        Self::new(RefusalCode::HostError, format!("{:#}", error.into()))
    }
}

impl Host {
    /// Carries out a command; every command is safe to repeat.
    pub(super) async fn carry_out(self: &Rc<Self>, command: Command) -> Answer {
        let done = |()| Answer::Done;
        let outcome = match command {
            Command::Launch { spec, epoch, disks } => self.launch(spec, epoch, disks).await.map(done),
            Command::Destroy { machine, epoch, keep_disks } => {
                self.destroy(machine, epoch, keep_disks).await.map(done)
            }
            Command::PowerButton { machine } => self.power_button(machine).await.map(done),
            Command::Prepare { migration, spec, epoch, source } => {
                self.prepare(migration, spec, epoch, source).await
            }
            Command::Migrate {
                migration,
                machine,
                epoch,
                target,
                addresses,
                forward_to,
                downtime_budget_us,
                bandwidth_limit: bytes_per_s_max,
            } => {
                let order = MoveOrder {
                    migration,
                    epoch,
                    target,
                    addresses,
                    forward_to,
                    downtime_budget_us,
                    bytes_per_s_max,
                };
                self.migrate(machine, order).map(done)
            }
            Command::Cancel { migration } => self.cancel(migration).await,
            Command::Forget { migration } => self.forget(migration).await.map(done),
            Command::Fence { machine, epoch, state } => Ok(self.fence(machine, epoch, state).await),
            Command::Reclaim { machine, epoch } => self.reclaim(machine, epoch).await.map(done),
            Command::Inquire { migration } => Ok(self.inquire(migration)),
            Command::ReadConsole { machine, offset, bytes_max } => {
                Ok(self.read_console(machine, offset, bytes_max))
            }
        };
        outcome.unwrap_or_else(|Refusal { code, detail }| Answer::Refused { code, detail })
    }

    fn read_console(&self, machine: MachineId, offset: u64, bytes_max: u32) -> Answer {
        let Some(vm) = self.machine(machine).and_then(|m| m.vm()) else { return Answer::Unknown };
        let text = vm.memory.console.read(offset, bytes_max.min(CONSOLE_BYTES_MAX).into());
        let live = self.machine(machine).is_some_and(|m| m.end().is_none());
        Answer::Console { offset: text.offset, bytes: text.bytes, live }
    }
}
