//! Windows: ranges of memory or device registers that somebody else may write at any time.
//!
//! The other side is a device, the VMM, the host's clock or another vCPU. So a window gives out values and takes them, one
//! volatile word or one opaque copy at a time, and never a reference. Everything is mapped one to one. Every access is checked
//! against the window's bounds; offsets come from this program and never from the other side, so a failed check is a bug here.

use core::arch::asm;
use guest_core::page::{PAGE_BYTES, Words};

/// A range of memory or registers without Rust objects.
#[derive(Debug, Clone, Copy, Default)]
pub struct Window {
    at: u64,
    bytes: u64,
}

impl Window {
    /// The range of `bytes` from `at`.
    ///
    /// # Safety
    /// It must be mapped, and no Rust object may live in it as long as the window is used, unless the object's type
    /// allows shared writes.
    #[must_use]
    pub const unsafe fn new(at: u64, bytes: u64) -> Self {
        Self { at, bytes }
    }

    /// Its address.
    #[must_use]
    pub const fn at(&self) -> u64 {
        self.at
    }

    /// Its pages.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.bytes / PAGE_BYTES
    }

    /// A part of it.
    #[must_use]
    pub fn part(&self, offset: u64, bytes: u64) -> Self {
        Self { at: self.check(offset, bytes), bytes }
    }

    /// Reads a word.
    #[must_use]
    #[inline(always)]
    pub fn read<T: Word>(&self, offset: u64) -> T {
        let at = self.check(offset, size_of::<T>() as u64);
        // SAFETY: in the window and aligned, as checked; any bytes are a `T`.
        unsafe { core::ptr::with_exposed_provenance::<T>(address(at)).read_volatile() }
    }

    /// Writes a word.
    #[inline(always)]
    pub fn write<T: Word>(&self, offset: u64, value: T) {
        let at = self.check(offset, size_of::<T>() as u64);
        // SAFETY: in the window and aligned, as checked; no Rust object is there.
        unsafe { core::ptr::with_exposed_provenance_mut::<T>(address(at)).write_volatile(value) }
    }

    /// Copies bytes out.
    pub fn copy_to(&self, offset: u64, to: &mut [u8]) {
        let from = self.check(offset, to.len() as u64);
        // SAFETY: `from` is in the window, `to` is a slice; the compiler knows of neither the source nor who writes it.
        unsafe { copy(to.as_mut_ptr().expose_provenance() as u64, from, to.len()) }
    }

    /// Copies bytes in.
    pub fn copy_from(&self, offset: u64, from: &[u8]) {
        let to = self.check(offset, from.len() as u64);
        // SAFETY: as for `copy_to`, the other way.
        unsafe { copy(to, from.as_ptr().expose_provenance() as u64, from.len()) }
    }

    /// One of its pages.
    #[must_use]
    pub fn page(&self, index: u64) -> Page {
        Page(self.check(index * PAGE_BYTES, PAGE_BYTES))
    }

    /// The address of an offset. Windows begin aligned, so an aligned offset is an aligned address.
    #[inline(always)]
    fn check(&self, offset: u64, bytes: u64) -> u64 {
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        let at = self.at.wrapping_add(offset);
        let aligned = !bytes.is_power_of_two() || bytes > 8 || at.is_multiple_of(bytes);
        assert!(fits && aligned, "{bytes} bytes at {offset} of a window of {}", self.bytes);
        at
    }
}

/// A page of a window.
pub struct Page(u64);

impl Words for Page {
    #[inline(always)]
    fn load(&self, i: usize) -> u64 {
        let at = self.0 + (i as u64 & 511) * 8;
        // SAFETY: in the page, which is in a window.
        u64::from_le(unsafe { core::ptr::with_exposed_provenance::<u64>(address(at)).read_volatile() })
    }

    #[inline(always)]
    fn store(&mut self, i: usize, word: u64) {
        let at = self.0 + (i as u64 & 511) * 8;
        // SAFETY: as for `load`; no Rust object is there.
        unsafe { core::ptr::with_exposed_provenance_mut::<u64>(address(at)).write_volatile(word.to_le()) }
    }
}

/// # Safety
/// `bytes` must be readable at `from` and writable at `to`, without overlap.
unsafe fn copy(to: u64, from: u64, bytes: usize) {
    // SAFETY: by the caller; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") bytes => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
}

/// An address as this machine's `usize`; guest and pointers are both 64 bits wide.
#[must_use]
pub const fn address(at: u64) -> usize {
    #[expect(clippy::cast_possible_truncation, reason = "usize is 64 bits on the only target")]
    let at = at as usize;
    at
}

/// Words that can be read and written: any bytes, all-zero included, are a value.
///
/// # Safety
/// Just that.
pub unsafe trait Word: Copy {}
// SAFETY: an integer.
unsafe impl Word for u8 {}
// SAFETY: an integer.
unsafe impl Word for u16 {}
// SAFETY: an integer.
unsafe impl Word for u32 {}
// SAFETY: an integer.
unsafe impl Word for u64 {}
