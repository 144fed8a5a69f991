//! Console output of machines, with one count of bytes over all boots and hosts.
//!
//! A host counts from the machine's boot, and the ring travels with the machine, so that an offset means the same before and
//! after a migration. When a machine stops, the end of its output is kept here, and the next boot continues the count.

use tokio::sync::oneshot;
use wire::fleet::{Answer, Command, ToHost};
use wire::ids::MachineId;

use super::dispatch::{IN_FLIGHT_MAX, InFlight};
use super::{Core, MachineRef};
use crate::api::{Problem, ProblemCode};
use crate::store::records::{ConsolePosition, Lifecycle};

/// Bytes kept of a stopped machine's output: enough for a kernel's last words, little enough for thousands of machines.
const KEPT_BYTES_MAX: usize = 64 << 10;

/// A stretch of console output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogAnswer {
    /// Offset of the first byte over all boots; above the one asked for when older output is gone.
    pub offset: u64,
    /// The output.
    pub bytes: Vec<u8>,
    /// Whether more may come by itself.
    pub live: bool,
}

/// How a log request is answered.
#[derive(Debug)]
pub enum LogRead {
    /// Here it is.
    Now(LogAnswer),
    /// The host was asked; its offsets count from `base`.
    Asked {
        /// Offset of the present boot's first byte.
        base: u64,
        /// Its answer; an error when the link broke first.
        answer: oneshot::Receiver<Answer>,
    },
}

impl Core {
    /// Reads console output from `offset` on, at most `bytes_max` bytes.
    ///
    /// # Errors
    /// [`ProblemCode::NoSuchMachine`]; [`ProblemCode::HostUnreachable`] and [`ProblemCode::Busy`] when the host cannot be asked now.
    pub fn read_log(
        &mut self,
        machine: &MachineRef,
        offset: u64,
        bytes_max: u32,
    ) -> Result<LogRead, Problem> {
        let record = self.find(machine)?;
        let (id, console) = (record.id, record.console);
        let kept_from = console.base - console.kept_bytes.min(console.base);
        let running = !matches!(record.lifecycle, Lifecycle::Stopped | Lifecycle::Failed | Lifecycle::Gone);
        if offset < console.base && console.kept_bytes > 0 {
            let from = offset.max(kept_from);
            let kept = self.store.console(id).map_err(|error| self.internal(&error))?.unwrap_or_default();
            let skip = usize::try_from(from - kept_from).unwrap_or(usize::MAX).min(kept.len());
            let take = usize::try_from(bytes_max).unwrap_or(usize::MAX).min(kept.len() - skip);
            let bytes = kept[skip..skip + take].to_vec();
            if !bytes.is_empty() {
                return Ok(LogRead::Now(LogAnswer { offset: from, bytes, live: running }));
            }
        }
        let host = record.host.clone().filter(|_| running);
        let Some(host) = host else {
            let offset = offset.max(kept_from).min(console.base);
            return Ok(LogRead::Now(LogAnswer { offset, bytes: Vec::new(), live: false }));
        };
        if matches!(record.lifecycle, Lifecycle::Creating | Lifecycle::Starting) {
            let offset = offset.max(console.base);
            return Ok(LogRead::Now(LogAnswer { offset, bytes: Vec::new(), live: true }));
        }
        let op = self.dispatch.number();
        let link = self.hosts.get_mut(&host).and_then(|runtime| runtime.link.as_mut()).ok_or_else(|| {
            Problem::new(
                ProblemCode::HostUnreachable,
                format!("host {host}, which has the console, is not in sight"),
                "try again when `mashines host ls` shows it online",
            )
        })?;
        let (reply, answer) = oneshot::channel();
        let command =
            Command::ReadConsole { machine: id, offset: offset.saturating_sub(console.base), bytes_max };
        let busy = link.in_flight.len() >= IN_FLIGHT_MAX;
        if busy || link.sender.try_send(ToHost::Command { op, command }).is_err() {
            return Err(Problem::new(
                ProblemCode::Busy,
                format!("host {host} has {IN_FLIGHT_MAX} commands under way"),
                "try again in a second",
            ));
        }
        link.in_flight.insert(op, InFlight::Query(reply));
        Ok(LogRead::Asked { base: console.base, answer })
    }

    /// Keeps the end of the output of a machine that is being stopped.
    pub(super) fn console_answered(&mut self, id: MachineId, answer: Answer) {
        let Some(record) = self.model.machine_mut(id) else { return };
        let Lifecycle::Stopping { console_saved, .. } = &mut record.lifecycle else { return };
        *console_saved = true;
        let Answer::Console { offset, bytes, .. } = answer else { return };
        let from = bytes.len().saturating_sub(KEPT_BYTES_MAX);
        let kept = bytes[from..].to_vec();
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        record.console = ConsolePosition {
            base: record.console.base.saturating_add(offset).saturating_add(length),
            kept_bytes: u64::try_from(kept.len()).unwrap_or(u64::MAX),
        };
        self.model.put_console(id, Some(kept));
    }
}
