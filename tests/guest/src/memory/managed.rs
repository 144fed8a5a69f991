//! The managed pages: all RAM that nothing else uses, numbered from 0, with the expected generation of each.
//!
//! Each vCPU writes and checks only its own share of the numbers, so a page is never written while it is being checked.

use super::frames::Frames;
use super::map::MAX_RANGES;
use super::window::{Page, Window, address};
use core::sync::atomic::{AtomicU32, Ordering};
use guest_core::command::Damage;
use guest_core::page::{self, Identity, Words, Wrong};

/// All managed pages.
pub struct Managed {
    windows: [Window; MAX_RANGES],
    pages: u64,
    generations: &'static [AtomicU32],
    seed: u64,
}

impl Managed {
    /// Takes what is left of RAM, less a table for the generations.
    #[must_use]
    pub fn new(mut frames: Frames, seed: u64) -> Self {
        let generations = frames.take::<AtomicU32>(address(frames.pages()));
        let pages = frames.pages();
        Self { windows: frames.finish(), pages, generations, seed }
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How often a page was written.
    #[must_use]
    pub fn generation(&self, index: u64) -> u32 {
        self.slot(index).load(Ordering::Relaxed)
    }

    /// Writes the next generation of a page. Only the vCPU whose share it is in may do that.
    pub fn write(&self, index: u64, random_words: u64) {
        let generation = self.generation(index).wrapping_add(1);
        page::write(&mut self.page(index), self.identity(index, generation), random_words);
        self.slot(index).store(generation, Ordering::Relaxed);
    }

    /// Compares a page with what it should be. Pages that were never written are right.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, index: u64) -> Result<(), Wrong> {
        match self.generation(index) {
            0 => Ok(()),
            generation => page::check(&self.page(index), self.identity(index, generation)),
        }
    }

    /// Damages a page that was written.
    ///
    /// # Errors
    /// A text, if the page cannot be damaged like that.
    pub fn damage(&self, index: u64, damage: Damage) -> Result<(), &'static str> {
        if index >= self.pages {
            return Err("no such page");
        }
        let generation = self.generation(index);
        if generation == 0 {
            return Err("the page was never written");
        }
        let mut page = self.page(index);
        let random_words = page.load(4);
        match damage {
            Damage::Bit => {
                let word = page.load(300);
                page.store(300, word ^ 1 << 17);
            }
            Damage::Stale => page::write(&mut page, self.identity(index, generation - 1), random_words),
            Damage::Foreign => page::write(&mut page, self.identity(index ^ 1, generation), random_words),
        }
        Ok(())
    }

    fn identity(&self, index: u64, generation: u32) -> Identity {
        Identity { seed: self.seed, index, generation }
    }

    fn slot(&self, index: u64) -> &AtomicU32 {
        &self.generations[address(index)]
    }

    fn page(&self, index: u64) -> Page {
        let mut left = index;
        for window in &self.windows {
            if left < window.pages() {
                return window.page(left);
            }
            left -= window.pages();
        }
        panic!("page {index} of {}", self.pages)
    }
}
