//! The process. With `--probe` it says in one line what this host's KVM can do, and ends. Otherwise started by `mashined` with a listening Unix socket as descriptor 3, and another one for vsock connections as descriptor 4; ends when asked to, by SIGTERM, or when
//! its event loop cannot go on. It never dies because `mashined` does.

use std::error::Error;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;

use vmm::event_loop::EventLoop;

/// Where the control socket is.
const CONTROL: RawFd = 3;
/// Where connections to the guest's vsock ports come in. Without it, none do.
const VSOCK: RawFd = 4;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "--probe") {
        println!("{}", vmm::kvm::probe::probe());
        return ExitCode::SUCCESS;
    }
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
    let vsock = inherited(VSOCK);
    if let Err(error) = vmm::jail::enter(if vsock.is_some() { 5 } else { 4 }) {
        eprintln!("mashine-vmm: privileges cannot be given up: {error}");
        return ExitCode::FAILURE;
    }
    match EventLoop::new(listener, vsock).and_then(EventLoop::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            eprintln!("mashine-vmm: {error}{cause}");
            ExitCode::FAILURE
        }
    }
}

/// Takes descriptor `raw`, if it is a listening Unix socket. Each is taken once.
fn inherited(raw: RawFd) -> Option<UnixListener> {
    // SAFETY: only asked about; if it is not open, the calls below say so.
    let fd = unsafe { BorrowedFd::borrow_raw(raw) };
    let listens = rustix::net::sockopt::socket_acceptconn(fd).ok()?;
    let unix = rustix::net::sockopt::socket_domain(fd).ok()? == rustix::net::AddressFamily::UNIX;
    if !listens || !unix {
        return None;
    }
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).ok()?;
    // SAFETY: the descriptor is open, and nobody else in this process knows of it.
    let owned = unsafe { OwnedFd::from_raw_fd(raw) };
    Some(owned.into())
}
