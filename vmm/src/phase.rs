//! Who owns the machine and where in its life it is: the record that keeps a machine from running twice.
//!
//! ```text
//!            Create          Boot, Restore          Run{e}              guest ends
//!   Empty ----------> Created ------------> Paused <=======> Running ------------> Ended
//!                                            |  ^    Pause
//!                                  Disown{e} |  | Reclaim{e' > e}
//!                                            v  |
//!                                          Disowned
//! ```
//!
//! [`Custody::next`] is total and pure: for every record and request it says either what is to be done and which record
//! holds once that has succeeded, or why not. The supervisor does it and then adopts the record; a failure leaves the record as it
//! was. There is no other way to change it, and no way from `Disowned` to `Running` but a `Reclaim` with a higher epoch.
//!
//! The epoch never goes down. Requests that may be repeated after a lost answer are answered again instead of refused.

use wire::ids::Epoch;
use wire::vmm::{Code, Disowned, GuestEnd, Phase, Request};

/// The record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Custody {
    /// Where in its life the machine is.
    pub phase: Phase,
    /// Highest epoch seen.
    pub epoch: Epoch,
    /// To whom it was given.
    pub disowned: Option<Disowned>,
    /// How the guest ended.
    pub ended: Option<GuestEnd>,
}

/// What has to be done for a request before its record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing: the request is only a question or a change of the record.
    None,
    /// Make the VM.
    Create,
    /// Load a kernel.
    Boot,
    /// Load a state archive.
    Restore,
    /// Start vCPUs and devices.
    Run,
    /// Stop vCPUs and devices.
    Pause,
    /// Say again how the pause went.
    PauseAgain,
    /// Save all state.
    Save,
    /// Switch the dirty log.
    DirtyLog,
    /// Look at the dirty log.
    DirtySync,
    /// Take from the dirty log.
    DirtyTake,
    /// Write to the serial port.
    SerialInput,
    /// Press the power button.
    PowerButton,
    /// End the process.
    Quit,
}

/// Why not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The request does not belong in this phase.
    #[error("{what} is not possible in phase {phase:?}; it is in {allowed}")]
    WrongPhase {
        /// The request's name.
        what: &'static str,
        /// The phase.
        phase: Phase,
        /// Where it is possible.
        allowed: &'static str,
    },
    /// The guest has ended.
    #[error("the guest has ended ({0:?}); quit this VMM and boot the machine anew")]
    Ended(GuestEnd),
    /// The machine was given away.
    #[error("the machine was given to host {} by {} under {}; only a reclaim above that epoch takes it back", .0.target, .0.migration, .0.epoch)]
    Disowned(Box<Disowned>),
    /// The epoch is an old one.
    #[error("epoch {got} is not above the machine's, {seen}: the caller is out of date")]
    StaleEpoch {
        /// The caller's.
        got: Epoch,
        /// The highest seen.
        seen: Epoch,
    },
}

impl Refusal {
    /// The code that says it to programs.
    pub const fn code(&self) -> Code {
        match self {
            Self::WrongPhase { .. } | Self::Ended(_) => Code::WrongPhase,
            Self::Disowned(_) => Code::Disowned,
            Self::StaleEpoch { .. } => Code::StaleEpoch,
        }
    }
}

impl Default for Custody {
    fn default() -> Self {
        Self { phase: Phase::Empty, epoch: Epoch(0), disowned: None, ended: None }
    }
}

impl Custody {
    /// What `request` asks to be done in this state, and the record that holds afterwards.
    ///
    /// # Errors
    /// [`Refusal`] when it is not allowed now.
    pub fn next(&self, request: &Request) -> Result<(Action, Self), Refusal> {
        match request {
            Request::Hello { .. } | Request::Describe => self.same(Action::None),
            Request::Quit => self.same(Action::Quit),
            Request::Create(_) => {
                self.only_in(Phase::Empty, "Create", "Empty")?;
                self.to(Action::Create, Phase::Created)
            }
            Request::Boot { .. } => {
                self.only_in(Phase::Created, "Boot", "Created")?;
                self.to(Action::Boot, Phase::Paused)
            }
            Request::Restore(_) => {
                self.only_in(Phase::Created, "Restore", "Created")?;
                self.to(Action::Restore, Phase::Paused)
            }
            Request::Run { epoch } => self.run(*epoch),
            Request::Pause { .. } => match self.phase {
                Phase::Running => self.to(Action::Pause, Phase::Paused),
                Phase::Paused => self.same(Action::PauseAgain),
                _ => Err(self.refuse("Pause", "Running and Paused")),
            },
            Request::Save => {
                self.only_in(Phase::Paused, "Save", "Paused")?;
                self.same(Action::Save)
            }
            Request::DirtyLog { .. } => self.once_created(Action::DirtyLog, "DirtyLog"),
            Request::DirtySync => self.once_created(Action::DirtySync, "DirtySync"),
            Request::DirtyTake { .. } => self.once_created(Action::DirtyTake, "DirtyTake"),
            Request::Disown(record) => self.disown(record),
            Request::Reclaim { epoch } => self.reclaim(*epoch),
            Request::SerialInput(_) => match self.phase {
                Phase::Paused | Phase::Running => self.same(Action::SerialInput),
                _ => Err(self.refuse("SerialInput", "Paused and Running")),
            },
            Request::PowerButton => match self.phase {
                Phase::Paused | Phase::Running => self.same(Action::PowerButton),
                _ => Err(self.refuse("PowerButton", "Paused and Running")),
            },
        }
    }

    /// The record once the guest has ended by itself. Only a running guest can.
    #[must_use]
    pub fn guest_ended(&self, end: GuestEnd) -> Self {
        if self.phase != Phase::Running {
            return self.clone();
        }
        Self { phase: Phase::Ended, ended: Some(end), ..self.clone() }
    }

    fn run(&self, epoch: Epoch) -> Result<(Action, Self), Refusal> {
        let action = match self.phase {
            Phase::Paused => Action::Run,
            Phase::Running => Action::None,
            _ => return Err(self.refuse("Run", "Paused")),
        };
        if epoch < self.epoch {
            return Err(Refusal::StaleEpoch { got: epoch, seen: self.epoch });
        }
        Ok((action, Self { phase: Phase::Running, epoch, ..self.clone() }))
    }

    fn disown(&self, record: &Disowned) -> Result<(Action, Self), Refusal> {
        if self.disowned.as_ref() == Some(record) {
            return self.same(Action::None);
        }
        self.only_in(Phase::Paused, "Disown", "Paused")?;
        if record.epoch <= self.epoch {
            return Err(Refusal::StaleEpoch { got: record.epoch, seen: self.epoch });
        }
        let disowned = Some(record.clone());
        let next = Self { phase: Phase::Disowned, epoch: record.epoch, disowned, ended: None };
        Ok((Action::None, next))
    }

    fn reclaim(&self, epoch: Epoch) -> Result<(Action, Self), Refusal> {
        let repeated = matches!(self.phase, Phase::Paused | Phase::Running) && epoch == self.epoch;
        if repeated {
            return self.same(Action::None);
        }
        if self.phase != Phase::Disowned {
            return Err(self.refuse("Reclaim", "Disowned"));
        }
        if epoch <= self.epoch {
            return Err(Refusal::StaleEpoch { got: epoch, seen: self.epoch });
        }
        Ok((Action::None, Self { phase: Phase::Paused, epoch, disowned: None, ended: None }))
    }

    #[expect(clippy::unnecessary_wraps, reason = "the common tail of next()")]
    fn same(&self, action: Action) -> Result<(Action, Self), Refusal> {
        Ok((action, self.clone()))
    }

    #[expect(clippy::unnecessary_wraps, reason = "the common tail of next()")]
    fn to(&self, action: Action, phase: Phase) -> Result<(Action, Self), Refusal> {
        Ok((action, Self { phase, ..self.clone() }))
    }

    fn only_in(&self, phase: Phase, what: &'static str, allowed: &'static str) -> Result<(), Refusal> {
        if self.phase == phase { Ok(()) } else { Err(self.refuse(what, allowed)) }
    }

    fn once_created(&self, action: Action, what: &'static str) -> Result<(Action, Self), Refusal> {
        if self.phase == Phase::Empty {
            return Err(self.refuse(what, "every phase from Created on"));
        }
        self.same(action)
    }

    fn refuse(&self, what: &'static str, allowed: &'static str) -> Refusal {
        match (&self.disowned, &self.ended) {
            (Some(record), _) => Refusal::Disowned(Box::new(record.clone())),
            (_, Some(end)) => Refusal::Ended(end.clone()),
            _ => Refusal::WrongPhase { what, phase: self.phase, allowed },
        }
    }
}

#[cfg(test)]
mod tests;
