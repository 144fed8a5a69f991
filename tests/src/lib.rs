//! End-to-end tests: real processes, real KVM, broken on purpose.
//!
//! A test ([`survives`], [`is_lost`]) brings up a fleet in network namespaces ([`Ground`]), puts a guest on it that rewrites its memory and
//! talks TCP all the while ([`Subject`]), moves it ([`Move`]), breaks something, and then asks the same questions always:
//!
//! * does exactly one copy run, and on the host that the documentation says;
//! * is every page of the guest what the guest wrote, has no connection broken and no clock stepped back;
//! * is anything left: processes, taps, routes and proxy entries of both families, memory, files ([`tidy`]);
//! * does another migration succeed.
//!
//! The answers come from the guest, the client and the kernel. What our own programs say is only compared with them. A test
//! that cannot run here prints `SKIPPED: ` and the reason.

mod ground;
mod moves;
mod scene;
mod subject;
pub mod tidy;

pub use ground::{Frozen, Ground};
pub use moves::Move;
pub use scene::{Scene, is_lost, survives};
pub use subject::Subject;

/// How long a target may take to load the last of a machine that it was given.
pub const LOADING: std::time::Duration = std::time::Duration::from_millis(300);
