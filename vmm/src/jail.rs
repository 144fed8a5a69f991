//! What the process gives up before it does anything: new privileges, all capabilities, and every descriptor but the ones it was meant to have.
//!
//! All that it needs later arrives as open descriptors, and threads inherit what their creator has given up. This is the thin first form:
//! namespaces, an own user and a system call filter are laid around it by whoever starts it.

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};

/// First descriptor that nobody meant to hand over.
const FIRST_UNMEANT: libc::c_uint = 5;

/// Gives it all up. To be called before the first thread is started.
///
/// # Errors
/// The operating system's; the process must not go on then.
pub fn enter() -> Result<(), Errno> {
    ignore_hang_up()?;
    set_no_new_privs(true)?;
    for capability in CapabilitySet::all().iter() {
        // Takes CAP_SETPCAP, and a capability that this kernel knows. Without the first the process holds nothing that could grow.
        let _unknown = remove_capability_from_bounding_set(capability);
    }
    clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    // SAFETY: only this function's caller exists yet, and it knows of no descriptor from here on.
    let closed = unsafe { libc::close_range(FIRST_UNMEANT, libc::c_uint::MAX, 0) };
    if closed == 0 { Ok(()) } else { Err(Errno::NOSYS) }
}

/// The daemon's death must not be ours: the kernel sends SIGHUP to a process group that loses its last tie to the session while
/// one of it is stopped, which is what becomes of a machine under a debugger when `mashined` is restarted.
fn ignore_hang_up() -> Result<(), Errno> {
    // SAFETY: ignoring a signal runs no code of ours, and no other thread exists that might change the disposition.
    let before = unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
    if before == libc::SIG_ERR { Err(Errno::INVAL) } else { Ok(()) }
}
