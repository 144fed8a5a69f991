//! From requests to the machine and back: the custody record decides, the machine does, the answer says how it went.
//!
//! A request that fails leaves the record as it was. There is one exception, which is not the request's doing: the guest may end at any
//! time.

use std::error::Error;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use wire::vmm::{Code, FromVmm, GuestEnd, MachineSpec, Notice, Phase, Reply, Request, VERSION};

use crate::kvm::KvmError;
use crate::kvm::log::LogError;
use crate::machine::{CreateError, Descriptors, Machine, MachineBootError, PauseError, PauseReport};
use crate::phase::{Action, Custody};

/// The record and what it is about.
#[derive(Default)]
pub struct Supervisor {
    custody: Custody,
    /// Whether the guest's end has been told.
    end_noticed: bool,
    machine: Option<Machine>,
    /// For the machine's vsock, once it is made.
    vsock: Option<UnixListener>,
}

/// An answer, with descriptors.
pub struct Answer {
    /// The reply.
    pub reply: Reply,
    /// Descriptors that go with it.
    pub descriptors: Vec<OwnedFd>,
    /// Whether the process ends once it has been sent.
    pub quit: bool,
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Self { reply, descriptors: Vec::new(), quit: false }
    }
}

/// A refusal on its way to become a reply.
struct Refused {
    code: Code,
    detail: String,
}

impl Refused {
    /// `error` and its causes in one line.
    fn new(code: Code, error: &dyn Error) -> Self {
        let mut detail = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Transparent errors repeat their cause's text.
            if !detail.ends_with(&text) {
                detail.push_str(": ");
                detail.push_str(&text);
            }
            cause = error.source();
        }
        Self { code, detail }
    }

    fn argument(detail: impl Into<String>) -> Self {
        Self { code: Code::BadArgument, detail: detail.into() }
    }
}

impl From<KvmError> for Refused {
    fn from(error: KvmError) -> Self {
        let code = match &error {
            KvmError::TscFrequency { .. } | KvmError::Feature(_) => Code::BadArgument,
            _ => Code::Host,
        };
        Self::new(code, &error)
    }
}

impl From<LogError> for Refused {
    fn from(error: LogError) -> Self {
        let code = match &error {
            LogError::Off | LogError::Range { .. } => Code::BadArgument,
            LogError::Kvm(_) => Code::Host,
        };
        Self::new(code, &error)
    }
}

impl Supervisor {
    /// A record of nothing yet; clients of the machine's ports will come through `vsock`.
    pub fn new(vsock: Option<UnixListener>) -> Self {
        Self { vsock, ..Self::default() }
    }

    /// The machine, once created.
    pub const fn machine(&self) -> Option<&Machine> {
        self.machine.as_ref()
    }

    /// Whether vCPUs and devices run.
    pub fn is_running(&self) -> bool {
        self.custody.phase == Phase::Running
    }

    /// Answers a request.
    pub fn handle(&mut self, request: Request, descriptors: Vec<OwnedFd>) -> Answer {
        let (action, next) = match self.custody.next(&request) {
            Ok(decided) => decided,
            Err(refusal) => {
                return Reply::Refused { code: refusal.code(), detail: refusal.to_string() }.into();
            }
        };
        match self.perform(action, request, descriptors) {
            Ok(mut answer) => {
                self.custody = next;
                if let Reply::Hello { phase, .. } = &mut answer.reply {
                    *phase = self.custody.phase;
                }
                answer
            }
            Err(Refused { code, detail }) => Reply::Refused { code, detail }.into(),
        }
    }

    fn perform(&mut self, action: Action, request: Request, fds: Vec<OwnedFd>) -> Result<Answer, Refused> {
        let reply = match (action, request) {
            (Action::Create, Request::Create(spec)) => self.create(spec, fds)?,
            (Action::Quit, _) => return Ok(Answer { quit: true, ..Reply::Done.into() }),
            (_, Request::Hello { version: 0 }) => return Err(Refused::argument("there is no version 0")),
            (_, Request::Hello { version }) => {
                Reply::Hello { version: version.min(VERSION), phase: self.custody.phase }
            }
            (_, Request::Describe) => return self.describe(),
            (action, request) => match &mut self.machine {
                Some(machine) => on_machine(machine, action, request, fds, &mut self.custody)?,
                None => return Err(Refused { code: Code::WrongPhase, detail: "no machine".to_owned() }),
            },
        };
        Ok(reply.into())
    }

    fn create(&mut self, spec: MachineSpec, descriptors: Vec<OwnedFd>) -> Result<Reply, Refused> {
        let count = descriptors.len();
        let mut fds = descriptors.into_iter();
        let (Some(kvm), Some(ram), Some(dirty), Some(console)) =
            (fds.next(), fds.next(), fds.next(), fds.next())
        else {
            return Err(Refused::argument(format!(
                "{count} descriptors came with Create; it takes kvm, ram, dirty bitmap, console and, for a network interface, tap"
            )));
        };
        if !(1..=wire::units::VCPUS_MAX).contains(&spec.vcpus) {
            return Err(Refused::argument(format!(
                "{} vCPUs; 1 to {} are possible",
                spec.vcpus,
                wire::units::VCPUS_MAX
            )));
        }
        let checked = wire::units::RamSize::from_bytes(spec.ram.bytes());
        if let Err(error) = checked {
            return Err(Refused::new(Code::BadArgument, &error));
        }
        let wanted: usize = spec.disks.iter().map(|disk| 1 + usize::from(disk.base.is_some())).sum();
        let mut rest: Vec<File> = fds.map(File::from).collect();
        let with_tap = rest.len() == wanted + 1;
        if !with_tap && rest.len() != wanted || spec.disks.len() > wire::space::DISKS_MAX {
            return Err(Refused::argument(format!(
                "{count} descriptors came with Create, which do not fit a machine with {} disks",
                spec.disks.len()
            )));
        }
        let mut of_disks = rest.split_off(usize::from(with_tap)).into_iter();
        let mut disks = Vec::with_capacity(spec.disks.len());
        for disk in &spec.disks {
            let Some(overlay) = of_disks.next() else { break };
            let base = if disk.base.is_some() { of_disks.next() } else { None };
            disks.push((overlay, base));
        }
        let descriptors = Descriptors {
            kvm,
            ram: File::from(ram),
            dirty: File::from(dirty),
            console: File::from(console),
            tap: rest.pop(),
            vsock: self.vsock.as_ref().and_then(|listener| listener.try_clone().ok()),
            disks,
        };
        let created = Machine::create(spec, descriptors);
        let code = |error: &CreateError| match error {
            CreateError::Profile(_) | CreateError::Kvm(KvmError::Feature(_)) => Code::BadArgument,
            _ => Code::Host,
        };
        self.machine = Some(created.map_err(|error| Refused::new(code(&error), &error))?);
        Ok(Reply::Done)
    }

    fn describe(&self) -> Result<Answer, Refused> {
        let custody = &self.custody;
        let files = self.machine.as_ref().map(Machine::files).unwrap_or_default();
        let descriptors = files.into_iter().map(|file| file.try_clone().map(OwnedFd::from)).collect();
        let descriptors: Result<Vec<_>, std::io::Error> = descriptors;
        let reply = Reply::Description {
            spec: self.machine.as_ref().map(|machine| machine.spec().clone()),
            phase: custody.phase,
            epoch: custody.epoch,
            disowned: custody.disowned.clone(),
            dirty_log: self.machine.as_ref().is_some_and(Machine::dirty_log_on),
            ended: custody.ended.clone(),
        };
        let descriptors = descriptors.map_err(|error| Refused::new(Code::Host, &error))?;
        Ok(Answer { descriptors, ..reply.into() })
    }

    /// A vCPU has said that the guest ended. Gives the notice, once.
    pub fn guest_ended(&mut self) -> Option<FromVmm> {
        let machine = self.machine.as_mut()?;
        // A leftover wake-up: the event was counted already.
        let _drained = machine.ended_event().read();
        let end = machine.ended()?;
        if self.custody.phase == Phase::Running {
            let end = match machine.collect() {
                Ok(()) => end,
                Err(error) => GuestEnd::Crash(format!("{end:?}, and then: {error}")),
            };
            self.custody = self.custody.guest_ended(end);
        }
        // A pause may have found out before.
        let end = self.custody.ended.clone().filter(|_| !self.end_noticed)?;
        self.end_noticed = true;
        Some(FromVmm::Notice(Notice::GuestEnded(end)))
    }
}

/// Requests that need a machine.
fn on_machine(
    machine: &mut Machine,
    action: Action,
    request: Request,
    descriptors: Vec<OwnedFd>,
    custody: &mut Custody,
) -> Result<Reply, Refused> {
    match (action, request) {
        (Action::Boot, Request::Boot { initrd, cmdline }) => boot(machine, initrd, &cmdline, descriptors)?,
        (Action::Restore, Request::Restore(bytes)) => machine.restore(&bytes).map_err(|error| {
            let code = if error.is_bad_state() { Code::BadState } else { Code::Host };
            Refused::new(code, &error)
        })?,
        (Action::Run, _) => machine.run()?,
        (Action::Pause | Action::PauseAgain, Request::Pause { harvest }) => {
            let paused =
                if action == Action::Pause { machine.pause(harvest) } else { machine.harvest(harvest) };
            return paused.map(paused_reply).map_err(|error| pause_failed(error, custody));
        }
        (Action::Save, _) => {
            return machine.save().map(Reply::State).map_err(|error| Refused::new(Code::Host, &error));
        }
        (Action::DirtyLog, Request::DirtyLog { on }) => machine.dirty_log(on)?,
        (Action::DirtySync, _) => return Ok(Reply::Dirty { pages: machine.dirty_sync()? }),
        (Action::DirtyTake, Request::DirtyTake { first, count }) => {
            return Ok(Reply::Dirty { pages: machine.dirty_take(first.0, count)? });
        }
        (Action::SerialInput, Request::SerialInput(bytes)) => {
            machine.serial_input(&bytes).map_err(|error| Refused::new(Code::BadArgument, &error))?
        }
        (Action::PowerButton, _) => {
            machine.power_button().map_err(|error| Refused::new(Code::Host, &error))?
        }
        // All other requests only change the record.
        _ => {}
    }
    Ok(Reply::Done)
}

fn boot(
    machine: &mut Machine,
    initrd: bool,
    cmdline: &str,
    descriptors: Vec<OwnedFd>,
) -> Result<(), Refused> {
    let count = descriptors.len();
    let mut files = descriptors.into_iter().map(File::from);
    let (kernel, disk) = (files.next(), files.next());
    let (Some(mut kernel), true) = (kernel, disk.is_some() == initrd) else {
        return Err(Refused::argument(format!(
            "{count} descriptors came with Boot; it takes the kernel and, if announced, the initrd"
        )));
    };
    let mut disk = disk;
    machine.boot(&mut kernel, disk.as_mut(), cmdline).map_err(|error| {
        let code = match &error {
            MachineBootError::Kernel(_) => Code::BadKernel,
            _ => Code::Host,
        };
        Refused::new(code, &error)
    })
}

const fn paused_reply(report: PauseReport) -> Reply {
    let PauseReport { stop_us, harvest_us, dirty_pages } = report;
    Reply::Paused { stop_us, harvest_us, dirty_pages }
}

fn pause_failed(error: PauseError, custody: &mut Custody) -> Refused {
    match error {
        PauseError::Ended(end) => {
            *custody = custody.guest_ended(end.clone());
            Refused { code: Code::WrongPhase, detail: PauseError::Ended(end).to_string() }
        }
        PauseError::Kvm(error) => error.into(),
        PauseError::Log(error) => error.into(),
    }
}
