//! vCPUs: one thread each, commanded by the event loop.
//!
//! ```text
//!  event loop                      vCPU thread
//!  Run ------------------------->  KVM_RUN until asked to stop or the guest ends
//!  stop flag, signal ------------> (the signal makes KVM_RUN return)
//!      <------------- Stopped ---  any exit is completed first, then the thread waits
//!  Save, Restore --------------->  on its own thread, all vCPUs at once; Save while the event loop does other things
//! ```
//!
//! After `Stopped`, the thread touches neither the vCPU nor RAM until the next command. An answer that does not come
//! within [`ANSWER_TIME`] is an error; the guest is then neither saved nor resumed by us.

mod run;
mod setup;
mod state;
mod thread;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::Killable;
use wire::cpu::Profile;
use wire::state::{Blob, StateError, VcpuState};
use wire::vmm::GuestEnd;

use crate::bus::Bus;
use crate::kvm::{Attempt, KvmError, Vm};

pub use setup::{Entry, LINUX_GDT, Protocol, set_boot_state};
pub use state::TscPlan;

/// How long a vCPU thread may take to answer. KVM leaves the guest within microseconds of a signal, unless the host is swapping.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// What vCPU threads and the event loop share.
#[derive(Debug)]
pub struct Shared {
    /// Set to make running vCPUs stop.
    pub stop: AtomicBool,
    /// How the guest ended; the first vCPU to say so wins.
    pub ended: Mutex<Option<GuestEnd>>,
    /// Wakes the event loop when `ended` was set.
    pub ended_event: EventFd,
    /// Where exits go.
    pub bus: Arc<Bus>,
}

impl Shared {
    /// Notes that the guest has ended, stops the other vCPUs at their next exit and wakes the event loop.
    fn end(&self, how: GuestEnd) {
        let mut ended = self.ended.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        ended.get_or_insert(how);
        drop(ended);
        self.stop.store(true, Ordering::Release);
        // An eventfd write only fails when its counter is full, and then it is readable anyway.
        let _full = self.ended_event.write(1);
    }
}

/// What the event loop tells a vCPU thread.
enum Command {
    Boot(Entry),
    Run,
    Save,
    Restore(Box<VcpuState>, TscPlan),
}

/// What the thread answers; one answer per command.
enum Answer {
    Done(Result<(), KvmError>),
    Stopped,
    Saved(Result<Blob, SaveError>),
}

/// Why a vCPU's state cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The archive.
    #[error(transparent)]
    Archive(#[from] StateError),
}

struct Handle {
    commands: SyncSender<Command>,
    answers: Receiver<Answer>,
    thread: JoinHandle<()>,
}

/// All vCPUs of the machine.
pub struct Vcpus {
    handles: Vec<Handle>,
    shared: Arc<Shared>,
    /// Whether the threads have been told to save, and their answers are still to be fetched.
    saving: bool,
    tsc_khz: u32,
}

impl Vcpus {
    /// Makes `count` vCPUs with their CPUID and starts their threads, which wait.
    ///
    /// # Errors
    /// [`KvmError`] when KVM refuses or a thread cannot be started.
    pub fn new(
        vm: &Arc<Vm>,
        count: u32,
        profile: Profile,
        tsc_khz: u32,
        shared: &Arc<Shared>,
    ) -> Result<Self, KvmError> {
        thread::register_kick()?;
        let mut handles = Vec::new();
        let mut khz = 0;
        for id in 0..count {
            let (vcpu, cpuid) = setup::create(vm, id, count, profile, tsc_khz)?;
            khz = vcpu.get_tsc_khz().attempt("asking for the TSC frequency")?;
            // One command is outstanding at a time, so that a slot of one never blocks.
            let (commands, command_receiver) = sync_channel(1);
            let (answer_sender, answers) = sync_channel(1);
            let worker = thread::Worker::new(id, vcpu, cpuid, Arc::clone(vm), Arc::clone(shared));
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .stack_size(256 << 10)
                .spawn(move || worker.serve(&command_receiver, &answer_sender))
                .map_err(KvmError::Thread)?;
            handles.push(Handle { commands, answers, thread });
        }
        Ok(Self { handles, shared: Arc::clone(shared), saving: false, tsc_khz: khz })
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        u32::try_from(self.handles.len()).unwrap_or(u32::MAX)
    }

    /// Frequency of their TSCs, in kHz.
    pub const fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Gives vCPU 0 the state that a kernel is entered with.
    ///
    /// # Errors
    /// [`KvmError`] when KVM refuses.
    pub fn boot(&self, entry: Entry) -> Result<(), KvmError> {
        self.send(0, Command::Boot(entry))?;
        self.done(0)
    }

    /// Lets all vCPUs run.
    ///
    /// # Errors
    /// [`KvmError::VcpuSilent`] when a thread is gone.
    pub fn run(&mut self) -> Result<(), KvmError> {
        self.forget_save()?;
        self.shared.stop.store(false, Ordering::Release);
        (0..self.count()).try_for_each(|id| self.send(id, Command::Run))
    }

    /// Stops all running vCPUs and waits until the last has stopped.
    ///
    /// # Errors
    /// [`KvmError::VcpuSilent`] when one does not stop in time.
    pub fn stop(&self) -> Result<(), KvmError> {
        self.shared.stop.store(true, Ordering::Release);
        for (id, handle) in (0..).zip(&self.handles) {
            handle.thread.kill(thread::kick_signal()).map_err(|_| KvmError::VcpuSilent(id))?;
        }
        for id in 0..self.count() {
            match self.answer(id)? {
                Answer::Stopped => {}
                Answer::Done(_) | Answer::Saved(_) => return Err(KvmError::VcpuSilent(id)),
            }
        }
        Ok(())
    }

    /// Makes all vCPUs save, in parallel, without waiting for it: the answers are fetched by [`Vcpus::save`]. They must
    /// all have stopped, because one that runs can send another an interrupt.
    ///
    /// # Errors
    /// [`KvmError::VcpuSilent`] when a thread is gone.
    pub fn begin_save(&mut self) -> Result<(), KvmError> {
        self.forget_save()?;
        (0..self.count()).try_for_each(|id| self.send(id, Command::Save))?;
        self.saving = true;
        Ok(())
    }

    /// The state of all vCPUs, archived. [`Vcpus::begin_save`] comes first.
    ///
    /// # Errors
    /// The first [`SaveError`].
    pub fn save(&mut self) -> Result<Vec<Blob>, SaveError> {
        self.saving = false;
        // All answers are collected before the first error is returned, so that none is left in its channel.
        let answers: Vec<_> = (0..self.count()).map(|id| (id, self.answer(id))).collect();
        answers
            .into_iter()
            .map(|(id, answer)| match answer? {
                Answer::Saved(state) => state,
                Answer::Done(_) | Answer::Stopped => Err(KvmError::VcpuSilent(id).into()),
            })
            .collect()
    }

    /// Fetches and drops a state that nobody asked for.
    fn forget_save(&mut self) -> Result<(), KvmError> {
        if !std::mem::take(&mut self.saving) {
            return Ok(());
        }
        (0..self.count()).try_for_each(|id| self.answer(id).map(drop))
    }

    /// Restores all vCPUs, in parallel. `states` has one for each.
    ///
    /// # Errors
    /// The first [`KvmError`]; the vCPUs must not run then.
    pub fn restore(&mut self, states: Vec<VcpuState>, plan: TscPlan) -> Result<(), KvmError> {
        self.tsc_khz = states.first().map_or(0, |state| state.tsc_khz);
        for (id, state) in (0..).zip(states) {
            self.send(id, Command::Restore(Box::new(state), plan))?;
        }
        let results: Vec<_> = (0..self.count()).map(|id| self.done(id)).collect();
        results.into_iter().collect()
    }

    fn send(&self, id: u32, command: Command) -> Result<(), KvmError> {
        let handle = self.handle(id)?;
        handle.commands.send(command).map_err(|_| KvmError::VcpuSilent(id))
    }

    fn answer(&self, id: u32) -> Result<Answer, KvmError> {
        self.handle(id)?.answers.recv_timeout(ANSWER_TIME).map_err(|_| KvmError::VcpuSilent(id))
    }

    fn done(&self, id: u32) -> Result<(), KvmError> {
        match self.answer(id)? {
            Answer::Done(result) => result,
            Answer::Stopped | Answer::Saved(_) => Err(KvmError::VcpuSilent(id)),
        }
    }

    fn handle(&self, id: u32) -> Result<&Handle, KvmError> {
        usize::try_from(id).ok().and_then(|at| self.handles.get(at)).ok_or(KvmError::VcpuSilent(id))
    }
}
