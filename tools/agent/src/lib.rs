//! The guest's side of mashines: one static program that is `/init` of the initramfs and, from then on, the agent.
//!
//! * [`init`]: from the kernel's first process to the image's own init: modules, root, network, identity.
//! * [`daemon`]: commands, files, clock and news of the guest for the host, over vsock.
//! * [`guard`]: starts the agent again should it ever end.
//! * [`archive`]: files and directories as a tar stream; used by both ends of `mashines cp`.
//! * [`users`]: who is who, from `/etc/passwd` and `/etc/group` (a static program has no NSS). * [`log`]: the kernel's log.
//! * [`power`]: the power button.
//!
//! There is no async runtime and there are no threads: one loop around `poll` serves everything, and so `fork` is safe.

pub mod archive;
pub mod daemon;
pub mod guard;
pub mod init;
pub mod log;
pub mod power;
pub mod users;
