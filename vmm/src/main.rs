//! The process. Started by `mashined` with a listening Unix socket as descriptor 3; ends when asked to, by SIGTERM, or when
//! its event loop cannot go on. It never dies because `mashined` does.

use std::error::Error;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;

use vmm::event_loop::EventLoop;

/// Where the control socket is.
const CONTROL: RawFd = 3;
/// Where clients of the guest's vsock ports come in, if anywhere.
const VSOCK: RawFd = 4;

fn main() -> ExitCode {
    let Some(listener) = inherited(CONTROL) else {
        eprintln!(
            "mashine-vmm: descriptor {CONTROL} is no listening Unix socket; this program is started by mashined"
        );
        return ExitCode::from(2);
    };
    // A thread that is gone would leave a machine that seems to run. A bug ends the process, and is seen.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("mashine-vmm: bug: {panic}");
        std::process::abort();
    }));
    if let Err(error) = vmm::jail::enter() {
        eprintln!("mashine-vmm: privileges cannot be given up: {error}");
        return ExitCode::FAILURE;
    }
    match EventLoop::new(listener, inherited(VSOCK)).and_then(EventLoop::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            eprintln!("mashine-vmm: {error}{cause}");
            ExitCode::FAILURE
        }
    }
}

/// Takes a descriptor that we were started with, if it is a listening Unix socket.
fn inherited(number: RawFd) -> Option<UnixListener> {
    // SAFETY: only asked about; if it is not open, the calls below say so.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    let listens = rustix::net::sockopt::socket_acceptconn(fd).ok()?;
    let unix = rustix::net::sockopt::socket_domain(fd).ok()? == rustix::net::AddressFamily::UNIX;
    if !listens || !unix {
        return None;
    }
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).ok()?;
    // SAFETY: the descriptor is open, and nobody else in this process knows of it.
    let owned = unsafe { OwnedFd::from_raw_fd(number) };
    Some(owned.into())
}
