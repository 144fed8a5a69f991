//! One entry into the guest and what its exit asks for.

use kvm_ioctls::{VcpuExit, VcpuFd};
use wire::vmm::GuestEnd;

use crate::bus::Bus;

/// What an entry into the guest came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entered {
    /// An exit was handled; its effect comes with the next entry.
    Handled,
    /// A signal or `immediate_exit` ended it; nothing is outstanding.
    Interrupted,
}

/// Enters the guest once and handles its exit.
///
/// # Errors
/// How the guest ended, if it did.
pub fn enter(vcpu: &mut VcpuFd, bus: &Bus) -> Result<Entered, GuestEnd> {
    let reason = match vcpu.run() {
        Ok(VcpuExit::IoOut(port, data)) => match bus.port_write(port, data) {
            None => return Ok(Entered::Handled),
            Some(end) => return Err(end),
        },
        Ok(VcpuExit::IoIn(port, data)) => {
            bus.port_read(port, data);
            return Ok(Entered::Handled);
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            bus.mmio_read(address, data);
            return Ok(Entered::Handled);
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            bus.mmio_write(address, data);
            return Ok(Entered::Handled);
        }
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt | VcpuExit::IoapicEoi(_)) => {
            return Ok(Entered::Handled);
        }
        // A triple fault: on a real machine, a reset.
        Ok(VcpuExit::Shutdown) => return Err(GuestEnd::Reset),
        Ok(VcpuExit::SystemEvent(kind, _)) => return Err(system_event(kind)),
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            format!("KVM could not enter the guest: hardware reason {reason:#x} on CPU {cpu}")
        }
        Ok(VcpuExit::InternalError) => internal_error(vcpu),
        Ok(other) => format!("KVM exit that is not handled: {other:?}"),
        Err(error) => match error.errno() {
            libc::EINTR => return Ok(Entered::Interrupted),
            // A vCPU that waits for its start-up message was woken for something else.
            libc::EAGAIN => return Ok(Entered::Handled),
            _ => format!("KVM_RUN failed: {error}"),
        },
    };
    Err(GuestEnd::Crash(format!("{reason}; {}", registers(vcpu))))
}

fn system_event(kind: u32) -> GuestEnd {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => GuestEnd::PowerOff,
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => GuestEnd::Reset,
        kvm_bindings::KVM_SYSTEM_EVENT_CRASH => GuestEnd::Panic,
        _ => GuestEnd::Crash(format!("system event {kind}")),
    }
}

fn internal_error(vcpu: &mut VcpuFd) -> String {
    // SAFETY: the exit reason says that this member of the union is the valid one; it is plain numbers.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let count = usize::try_from(internal.ndata).unwrap_or(0).min(internal.data.len());
    format!("KVM internal error, suberror {} data {:x?}", internal.suberror, &internal.data[..count])
}

/// The registers in one line, for the report of a crash.
fn registers(vcpu: &VcpuFd) -> String {
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(r), Ok(s)) => format!(
            "rip={:#x} rflags={:#x} rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} rsi={:#x} rdi={:#x} rsp={:#x} rbp={:#x} \
             cs={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x}",
            r.rip,
            r.rflags,
            r.rax,
            r.rbx,
            r.rcx,
            r.rdx,
            r.rsi,
            r.rdi,
            r.rsp,
            r.rbp,
            s.cs.selector,
            s.cr0,
            s.cr2,
            s.cr3,
            s.cr4,
            s.efer
        ),
        _ => "registers unknown".to_owned(),
    }
}
