//! Access to memory and device registers by address: the one place that turns numbers into pointers.
//!
//! Everything is mapped one to one. Only volatile accesses are made, never references, since the other side (a device,
//! the VMM, another vCPU) may change the bytes at any time.

/// Reads a word.
///
/// # Safety
/// `at` must be aligned and lie in RAM or in a device's registers.
#[must_use]
pub unsafe fn read<T: Plain>(at: u64) -> T {
    // SAFETY: by the caller; any bytes are a valid `T`.
    unsafe { core::ptr::with_exposed_provenance::<T>(address(at)).read_volatile() }
}

/// Writes a word.
///
/// # Safety
/// As for [`read`]; and no Rust object may be at `at`, unless it is one whose type allows shared writes.
pub unsafe fn write<T: Plain>(at: u64, value: T) {
    // SAFETY: by the caller.
    unsafe { core::ptr::with_exposed_provenance_mut::<T>(address(at)).write_volatile(value) }
}

/// An address as this machine's `usize`; guest and pointers are both 64 bits wide.
#[must_use]
pub const fn address(at: u64) -> usize {
    #[expect(clippy::cast_possible_truncation, reason = "usize is 64 bits on the only target")]
    let at = at as usize;
    at
}

/// Types for which any bytes, all-zero included, are a value, and that have no padding to leak.
///
/// # Safety
/// Just that.
pub unsafe trait Plain: Copy {}
// SAFETY: an integer.
unsafe impl Plain for u8 {}
// SAFETY: an integer.
unsafe impl Plain for u16 {}
// SAFETY: an integer.
unsafe impl Plain for u32 {}
// SAFETY: an integer.
unsafe impl Plain for u64 {}
