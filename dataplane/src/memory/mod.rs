//! A machine's shared memory: guest RAM, the dirty bitmap and the console ring.
//!
//! Each is a memfd that `mashined` makes, hands to the VMM, and maps itself. The guest and the VMM may write to them at
//! any moment, so nothing here ever makes a Rust reference to plain data in them: pages are copied in and out as
//! volatile bytes, the bitmap is atomic words.

mod console;
mod dirty;
mod ram;
mod shm;

pub use console::{ConsoleRing, ConsoleText};
pub use dirty::DirtyBitmap;
pub use ram::{GuestRam, PageContent};
pub use shm::ShmError;

use wire::units::RamSize;

/// The three memories of one machine.
#[derive(Debug)]
pub struct MachineMemory {
    /// Guest RAM.
    pub ram: GuestRam,
    /// One bit a page: written since it was last taken.
    pub dirty: DirtyBitmap,
    /// Serial output.
    pub console: ConsoleRing,
}

impl MachineMemory {
    /// Makes fresh, zeroed memory for a machine.
    ///
    /// # Errors
    /// [`ShmError`] when the kernel has no memory or descriptors left.
    pub fn create(ram: RamSize) -> Result<Self, ShmError> {
        Ok(Self {
            ram: GuestRam::create(ram)?,
            dirty: DirtyBitmap::create(ram)?,
            console: ConsoleRing::create()?,
        })
    }
}
