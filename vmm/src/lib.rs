//! `mashine-vmm`: one KVM virtual machine in one small process.
//!
//! `mashined` starts the process with a listening Unix socket as descriptor 3 and nothing else; all that it needs (`/dev/kvm`,
//! guest RAM, dirty bitmap, console ring, tap, kernel) arrives over that socket ([`wire::vmm`]). The process outlives `mashined`:
//! at the end of a connection the guest runs on, and the next connection finds everything as it was.
//!
//! ```text
//!  main thread: event loop                           vCPU threads
//!  control socket -> supervisor -> machine --commands--> KVM_RUN --port and MMIO exits--> bus
//!  tap, queue notifications -> transport -> device -> guest RAM          (kernel: irqfd, ioeventfd, LAPIC, IOAPIC, PIT)
//! ```
//!
//! Reading order: [`phase`] (who owns the machine), [`supervisor`], [`machine`], [`vcpu`], [`kvm`], [`virtio`].
//!
//! A guest can end itself and nothing else. Whatever it writes into registers, rings and buffers is bounded in work and in memory;
//! whatever the host refuses is an error with a code for `mashined`.

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod console;
pub mod control;
pub mod dirty;
mod event;
pub mod event_loop;
pub mod jail;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod phase;
pub mod platform;
pub mod serial;
pub mod shm;
pub mod supervisor;
pub mod vcpu;
pub mod virtio;
