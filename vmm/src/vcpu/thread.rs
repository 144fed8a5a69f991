//! A vCPU's thread: waits for commands, and runs the guest between `Run` and the next stop.
//!
//! How a stop cannot be missed: the stop flag is set before the signal is sent. The handler runs on the vCPU's thread and sets
//! `immediate_exit` in the vCPU's shared page, so that `KVM_RUN` returns at once even if the signal came just before
//! it. The loop clears `immediate_exit` *before* it looks at the flag: whichever comes first, one of the two is seen.

use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};
use wire::state::{Blob, CpuidEntry};
use wire::vmm::GuestEnd;

use super::{Answer, Command, SaveError, Shared, run, setup, state};
use crate::kvm::{Attempt, KvmError, Vm};

thread_local! {
    /// Address of `immediate_exit` of this thread's vCPU; null on other threads.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(null_mut()) };
}

/// The signal that makes a vCPU leave the guest.
pub fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.with(Cell::get);
    if !flag.is_null() {
        // SAFETY: the pointer was set by this thread to a byte of its vCPU's mapped page, which lives until the thread
        // ends; a volatile store of a byte is safe in a signal handler.
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the handler for [`kick_signal`].
///
/// # Errors
/// [`KvmError`] when the operating system refuses.
pub fn register_kick() -> Result<(), KvmError> {
    register_signal_handler(kick_signal(), on_kick).attempt("installing the signal that stops vCPUs")
}

/// What a vCPU's thread owns.
pub struct Worker {
    id: u32,
    vcpu: VcpuFd,
    /// What the guest was told by CPUID.
    cpuid: Vec<CpuidEntry>,
    vm: Arc<Vm>,
    shared: Arc<Shared>,
}

impl Worker {
    /// Takes the vCPU; it moves to its thread with this.
    pub const fn new(
        id: u32,
        vcpu: VcpuFd,
        cpuid: Vec<CpuidEntry>,
        vm: Arc<Vm>,
        shared: Arc<Shared>,
    ) -> Self {
        Self { id, vcpu, cpuid, vm, shared }
    }

    /// Serves commands until the event loop is gone.
    pub fn serve(mut self, commands: &Receiver<Command>, answers: &SyncSender<Answer>) {
        IMMEDIATE_EXIT.with(|flag| flag.set(&raw mut self.vcpu.get_kvm_run().immediate_exit));
        while let Ok(command) = commands.recv() {
            let answer = match command {
                Command::Boot(entry) => Answer::Done(setup::set_boot_state(&self.vcpu, entry)),
                Command::Run => {
                    self.run();
                    Answer::Stopped
                }
                Command::Save => Answer::Saved(self.save()),
                Command::Restore(saved, plan) => {
                    Answer::Done(state::restore(&self.vcpu, &self.vm, &mut self.cpuid, &saved, plan))
                }
            };
            if answers.send(answer).is_err() {
                break;
            }
        }
        IMMEDIATE_EXIT.with(|flag| flag.set(null_mut()));
    }

    /// Archiving is done here too: it is a fifth of the work, and parallel like the rest.
    fn save(&self) -> Result<Blob, SaveError> {
        let saved = state::save(&self.vcpu, &self.vm, &self.cpuid)?;
        Ok(Blob::new(self.id, &saved)?)
    }

    fn run(&mut self) {
        if self.vm.caps.kvmclock_ctrl {
            // Tells a guest with a paravirtual clock that it was stopped; fails when it has none.
            let _no_clock = self.vcpu.kvmclock_ctrl();
        }
        loop {
            self.vcpu.set_kvm_immediate_exit(0);
            if self.shared.stop.load(Ordering::Acquire) {
                break;
            }
            if let Err(end) = run::enter(&mut self.vcpu, &self.shared.bus) {
                self.shared.end(end);
                return;
            }
        }
        if let Err(end) = self.complete_exit() {
            self.shared.end(end);
        }
    }

    /// An exit that was handled is only complete, and its effect in the registers, when KVM is entered again. Doing that
    /// with `immediate_exit` runs no guest code. It may give one more exit (a string instruction), which is handled
    /// in turn; KVM ends such a run after 1024 steps.
    fn complete_exit(&mut self) -> Result<(), GuestEnd> {
        const STEPS_MAX: u32 = 65_536;
        for _ in 0..STEPS_MAX {
            self.vcpu.set_kvm_immediate_exit(1);
            let entered = run::enter(&mut self.vcpu, &self.shared.bus);
            self.vcpu.set_kvm_immediate_exit(0);
            if entered? == run::Entered::Interrupted {
                return Ok(());
            }
        }
        Err(GuestEnd::Crash("an instruction did not come to an end".to_owned()))
    }
}
