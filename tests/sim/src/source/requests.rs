//! Requests to the source's VMM.

use wire::ids::Epoch;
use wire::migration::messages::ConsoleBytes;
use wire::migration::source::{SourceEvent, SourceOperation};

use super::SourceReply;
use crate::guest::{Phase, Vmm};
use crate::options::Mutation;
use crate::world::{Event, World, trace};

/// Requests to the VMM, carried out in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "named after the actions that cause them")]
pub enum SourceOp {
    StartLog,
    StopLog,
    Count { round: u32 },
    Pause,
    Save { console_from: u64 },
    Disown { epoch: Epoch },
    Run { epoch: Epoch },
    Reclaim { epoch: Epoch },
    Kill,
}

impl World {
    pub(super) fn ask_source_vmm(&mut self, op: SourceOp) {
        let at = self.now.max(self.source.vmm_free_at) + self.rng.between(5, 300);
        self.source.vmm_free_at = at;
        let (process, daemon) = (self.source.vmm.process, self.source.daemon);
        self.at(at, Event::SourceVmm { process, daemon, op });
    }

    /// The VMM carries out a request, whoever may still wait for the answer.
    pub fn source_vmm(&mut self, process: u32, daemon: u32, op: SourceOp) {
        if self.source.vmm.process != process || self.source.vmm.phase == Phase::Dead {
            if op == SourceOp::Kill && daemon == self.source.daemon {
                self.source_reply(SourceReply::Event(SourceEvent::Released));
            }
            return;
        }
        let fails = self.may_fail();
        let console = match op {
            SourceOp::Save { console_from } => self.read_console(console_from),
            _ => ConsoleBytes::default(),
        };
        if op == SourceOp::StartLog
            && !fails
            && daemon == self.source.daemon
            && let Some(ledger) = &mut self.source.ledger
        {
            ledger.clear();
        }
        let ran_before = self.source.vmm.phase == Phase::Running;
        let answer = carry_out(&mut self.source.vmm, op, fails, self.options.mutation, console);
        trace!(self, "source VMM: {op:?} by {daemon} -> {answer:?}");
        if !ran_before && self.source.vmm.phase == Phase::Running {
            let memory = self.source.vmm.memory;
            self.check_run("the source", &memory);
        }
        if let Some(answer) = answer
            && daemon == self.source.daemon
        {
            self.source_reply(SourceReply::Event(answer));
        }
    }
}

fn failed(operation: SourceOperation) -> SourceEvent {
    SourceEvent::OperationFailed { operation, detail: "injected".to_owned() }
}

/// What a VMM does and answers.
fn carry_out(
    vmm: &mut Vmm,
    op: SourceOp,
    fails: bool,
    mutation: Option<Mutation>,
    console: ConsoleBytes,
) -> Option<SourceEvent> {
    let answer = |result: Result<(), &str>, event, operation| match result {
        Ok(()) if !fails => event,
        _ => failed(operation),
    };
    let no_pause = mutation == Some(Mutation::NoPause);
    let dirty = u64::from(vmm.dirty.count_ones());
    Some(match op {
        SourceOp::StartLog if fails => failed(SourceOperation::StartDirtyLog),
        SourceOp::StartLog => {
            vmm.log = true;
            vmm.dirty = u64::MAX;
            SourceEvent::DirtyLogStarted
        }
        SourceOp::StopLog => {
            vmm.log = false;
            return None;
        }
        SourceOp::Count { round } => SourceEvent::Dirty { round, pages: dirty },
        SourceOp::Pause => {
            let event = SourceEvent::Paused { stop_us: 50, harvest_us: 10, dirty_pages: dirty };
            let result = if no_pause { Ok(()) } else { vmm.pause() };
            answer(result, event, SourceOperation::Pause)
        }
        SourceOp::Save { .. } => {
            let still = vmm.phase == Phase::Paused || no_pause;
            let state = vmm.memory.cpu.to_le_bytes().to_vec();
            let event = SourceEvent::Saved { state, console, us: 80 };
            answer(still.then_some(()).ok_or("runs"), event, SourceOperation::Save)
        }
        SourceOp::Disown { .. } if mutation == Some(Mutation::CommitBeforeDisown) => SourceEvent::Disowned,
        SourceOp::Disown { .. } if fails => failed(SourceOperation::Disown),
        SourceOp::Disown { epoch } => {
            if no_pause {
                vmm.phase = Phase::Paused;
            }
            vmm.disown(epoch).map_or_else(|_| failed(SourceOperation::Disown), |()| SourceEvent::Disowned)
        }
        SourceOp::Run { epoch } => {
            vmm.run(epoch).map_or_else(|_| failed(SourceOperation::ResumeGuest), |_| SourceEvent::Resumed)
        }
        SourceOp::Reclaim { epoch } => vmm
            .reclaim(epoch)
            .and_then(|()| vmm.run(epoch))
            .map_or_else(|_| failed(SourceOperation::Reclaim), |_| SourceEvent::Reclaimed),
        SourceOp::Kill => {
            vmm.die();
            SourceEvent::Released
        }
    })
}
