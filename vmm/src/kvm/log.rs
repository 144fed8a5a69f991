//! The dirty log: from KVM's per-slot bitmaps to the bitmap that `mashined` shares.
//!
//! KVM's log is manually protected where KVM can do that: reading it clears nothing, and bits are cleared, with their
//! pages write-protected again, chunk by chunk just before the chunk is sent ([`DirtyLog::take`]). What was read but not yet
//! taken is kept in `pending`. The order in `take` is what makes it lossless: first clear in KVM, then publish; a
//! write that comes between is logged again.
//!
//! A KVM without manual protection clears when it is read, so all that was read is published by the take alone. Nothing
//! is lost in that case either, it is only slower for the guest.
//!
//! When a step fails, the bits stay in `pending` or in KVM; a page may be sent once too often, never once too little.

use std::sync::Arc;

use wire::space::PageSpace;

use crate::dirty::DirtyBitmap;
use crate::kvm::{Attempt, KvmError, Vm, ioctl};
use crate::memory::{Ram, Slot};
use crate::virtio::blk::overlay::Overlay;

/// The log's state.
#[derive(Debug)]
pub struct DirtyLog {
    shared: Arc<DirtyBitmap>,
    /// The disks, whose blocks lie behind RAM; KVM knows nothing of them, and their writes are marked at once.
    disks: Vec<Arc<Overlay>>,
    /// Bits of RAM read from KVM and not yet published; empty while the log is off. RAM is a multiple of 2 MiB, so all words are whole.
    pending: Vec<u64>,
    /// Room for what KVM says, kept so that it is in memory when a pause needs it.
    scratch: Vec<u64>,
    /// Pages of RAM, and of the whole space.
    ram_pages: u64,
    pages: u64,
    on: bool,
}

/// Words of a bitmap of `pages` pages.
fn words(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX)
}

/// Why a dirty log request is refused.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The log is off.
    #[error("the dirty log is off; switch it on first")]
    Off,
    /// The range is not one.
    #[error("pages {first}+{count} are not a range of whole words within {pages} pages")]
    Range {
        /// First page asked for.
        first: u64,
        /// Pages asked for.
        count: u64,
        /// Pages there are.
        pages: u64,
    },
    /// KVM failed.
    #[error("the dirty log failed")]
    Kvm(#[from] KvmError),
}

impl DirtyLog {
    /// A log that is off.
    pub fn new(shared: Arc<DirtyBitmap>, space: &PageSpace, disks: Vec<Arc<Overlay>>) -> Self {
        let (ram_pages, pages) = (space.ram().pages(), space.pages());
        Self { shared, disks, pending: Vec::new(), scratch: Vec::new(), ram_pages, pages, on: false }
    }

    /// Whether it is on.
    pub const fn is_on(&self) -> bool {
        self.on
    }

    /// Switches it on or off. On, also when it is on already: all pages of RAM are dirty and none is published; of the disks, all blocks that the overlays hold are.
    ///
    /// # Errors
    /// [`KvmError`]; the log is then as it was.
    pub fn switch(&mut self, vm: &Vm, ram: &Ram, on: bool) -> Result<(), KvmError> {
        if on != self.on {
            for slot in ram.slots() {
                vm.set_slot(ram, slot, on)?;
            }
        }
        self.on = on;
        self.shared.set_active(on);
        self.pending.clear();
        self.scratch.clear();
        if on {
            self.pending.resize(words(self.ram_pages), u64::MAX);
            self.scratch.resize(words(self.ram_pages), u64::MAX);
            self.shared.clear();
            for disk in &self.disks {
                for (word, held) in (words(disk.first_page())..).zip(disk.held_words()) {
                    if held != 0 {
                        self.shared.publish(word, held);
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads KVM's log and counts the pages that are dirty there or in the shared bitmap.
    ///
    /// # Errors
    /// [`LogError`] when the log is off or KVM fails.
    pub fn sync(&mut self, vm: &Vm, ram: &Ram) -> Result<u64, LogError> {
        self.read(vm, ram)?;
        let dirty = |(word, bits): (usize, &u64)| u64::from((bits | self.shared.word(word)).count_ones());
        let ram: u64 = self.pending.iter().enumerate().map(dirty).sum();
        Ok(ram + self.shared_in(self.ram_pages, self.pages))
    }

    /// Clears and publishes the pending bits of `count` pages from `first` on, and counts them.
    ///
    /// # Errors
    /// [`LogError`] when the log is off, the range is wrong or KVM fails.
    pub fn take(&mut self, vm: &Vm, ram: &Ram, first: u64, count: u64) -> Result<u64, LogError> {
        if !self.on {
            return Err(LogError::Off);
        }
        let range = LogError::Range { first, count, pages: self.pages };
        let Some(end) = first.checked_add(count).filter(|&end| end <= self.pages) else { return Err(range) };
        if !first.is_multiple_of(64) || (!count.is_multiple_of(64) && end != self.pages) {
            return Err(range);
        }
        let mut published = 0;
        for slot in ram.slots() {
            let from = first.max(slot.first_page);
            let to = end.min(slot.first_page + slot.pages);
            if from < to {
                published += self.take_in_slot(vm, slot, from, to)?;
            }
        }
        // Blocks of disks are published already.
        Ok(published + self.shared_in(first.max(self.ram_pages), end))
    }

    /// Pages `from .. to` of the memfd, which lie in `slot`; `from` is a multiple of 64.
    fn take_in_slot(&mut self, vm: &Vm, slot: &Slot, from: u64, to: u64) -> Result<u64, LogError> {
        let bits = &mut self.pending[words(from)..words(to)];
        if bits.iter().all(|&word| word == 0) {
            return Ok(0);
        }
        if vm.caps.manual_dirty_protect != 0 {
            let pages = u32::try_from(to - from).map_err(|_| LogError::Range {
                first: from,
                count: to - from,
                pages: self.pages,
            })?;
            ioctl::clear_dirty_log(&vm.fd, slot.number, from - slot.first_page, pages, bits)
                .attempt("clearing the dirty log")?;
        }
        let mut published = 0;
        for (word, bits) in (words(from)..).zip(bits.iter_mut()) {
            published += publish(&self.shared, word, bits);
        }
        Ok(published)
    }

    /// Reads KVM's log and publishes all that is dirty, for the last round: nothing runs, so nothing has to be
    /// protected again. What KVM still has logged is then dirty once more should the guest run on here.
    ///
    /// # Errors
    /// [`LogError`] when KVM fails. With the log off, nothing is dirty.
    pub fn harvest(&mut self, vm: &Vm, ram: &Ram) -> Result<(), LogError> {
        if !self.on {
            return Ok(());
        }
        self.read(vm, ram)?;
        for (word, bits) in self.pending.iter_mut().enumerate() {
            publish(&self.shared, word, bits);
        }
        Ok(())
    }

    /// Pages set in the shared bitmap.
    pub fn shared_pages(&self) -> u64 {
        self.shared_in(0, self.pages)
    }

    /// Pages set in the shared bitmap from `first`, a multiple of 64, up to `end`.
    fn shared_in(&self, first: u64, end: u64) -> u64 {
        (words(first)..words(end)).map(|word| u64::from(self.shared.word(word).count_ones())).sum()
    }

    fn read(&mut self, vm: &Vm, ram: &Ram) -> Result<(), LogError> {
        if !self.on {
            return Err(LogError::Off);
        }
        for slot in ram.slots() {
            let part = words(slot.first_page)..words(slot.first_page + slot.pages);
            let logged = &mut self.scratch[part.clone()];
            ioctl::dirty_log(&vm.fd, slot.number, slot.pages, logged).attempt("reading the dirty log")?;
            for (pending, logged) in self.pending[part].iter_mut().zip(logged) {
                *pending |= *logged;
            }
        }
        Ok(())
    }
}

/// Moves a word's bits to the shared bitmap and counts them.
fn publish(shared: &DirtyBitmap, word: usize, bits: &mut u64) -> u64 {
    let taken = std::mem::take(bits);
    if taken != 0 {
        shared.publish(word, taken);
    }
    u64::from(taken.count_ones())
}
