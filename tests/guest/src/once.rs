//! A value that is set once at boot and shared by all vCPUs afterwards.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicU8, Ordering};

const EMPTY: u8 = 0;
const SETTING: u8 = 1;
const SET: u8 = 2;

/// Empty, then set for ever.
pub struct Once<T> {
    state: AtomicU8,
    value: UnsafeCell<MaybeUninit<T>>,
}

// SAFETY: the value is written by the one caller that moves the state from EMPTY, and only read after SET, which
// is published with release ordering; what is shared is `&T`, so `T` must allow that.
unsafe impl<T: Send + Sync> Sync for Once<T> {}

impl<T> Once<T> {
    /// Without a value.
    #[must_use]
    pub const fn new() -> Self {
        Self { state: AtomicU8::new(EMPTY), value: UnsafeCell::new(MaybeUninit::uninit()) }
    }

    /// Sets the value.
    ///
    /// # Panics
    /// If it is set already.
    pub fn set(&'static self, value: T) -> &'static T {
        let first = self.state.compare_exchange(EMPTY, SETTING, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        assert!(first, "set twice");
        // SAFETY: only this caller is in SETTING, and nobody reads before SET.
        let place = unsafe { &mut *self.value.get() };
        let value = place.write(value);
        self.state.store(SET, Ordering::Release);
        value
    }

    /// The value, if it is set.
    #[must_use]
    pub fn get(&'static self) -> Option<&'static T> {
        if self.state.load(Ordering::Acquire) != SET {
            return None;
        }
        // SAFETY: SET, so nobody writes any more.
        let place = unsafe { &*self.value.get() };
        // SAFETY: SET, so it was written.
        Some(unsafe { place.assume_init_ref() })
    }
}
