//! The lab: hosts with complete KVM, emulated, for what the KVM of this machine cannot run.
//!
//! Each lab host is a QEMU that emulates a processor with AMD-V, and runs a stock Debian kernel with the machine's own files as
//! read-only root. It needs no `/dev/kvm`, so a lab comes up wherever QEMU does. Its shape is a [`crate::fleet`]'s: control
//! plane and clients in a fabric namespace, one `mashined` a host, state in `/run/mashines/lab`, processes that carry the fleet's mark.
//!
//! ```text
//!   namespace mash-lab-fabric                                   QEMU: host-a                    QEMU: host-b
//!     mashines-control, clients                                   mashined, mashine-vmm           ...
//!     fabric0  bridge  198.18.0.1/24, 2001:db8:0:f::1/64            uplink 198.18.0.10/24 ...
//!       +-- to-host-a  tap ======================================= virtio-net
//!       +-- to-host-b  tap =================================================================== virtio-net
//!     9p: /  (read-only) and /run/mashines/lab  (the same path inside and outside)
//!     virtio-blk: /var/tmp/mashines-lab/host-a.ext4, mounted on /run/mashines/lab/host-a
//! ```
//!
//! Emulation is slow and its boot hangs now and then: every wait is bounded, and a host whose console falls silent is
//! started again ([`boot`]). As with a fleet, everything is taken down when a [`Lab`] is dropped, and [`down`] works from names
//! alone, so that it also clears up after a `kill -9`.

mod boot;
mod cpio;
pub mod demo;
mod initramfs;
mod kernel;
pub mod layout;
mod network;
pub mod options;
mod prepare;
mod qemu;
mod running;
mod seed;
mod shell;
mod tsc;

pub use prepare::{Ready, missing, prepare};
pub use qemu::PLAIN_ADDRESSES;
pub use running::{Lab, Plan, down, is_up};
pub use seed::check as check_images;
pub use shell::{Shell, run};
