//! Sets and runs of page numbers, and which lane a chunk of pages travels on.
//!
//! A [`PageSet`] is a bitmap with the layout of the dirty bitmap in shared memory: bit `n % 64` of word `n / 64` is page
//! `n`. The word arithmetic is here and pure; whoever holds the shared memory applies it to atomics.

use crate::units::{CHUNK_PAGES, PageIndex};

/// Pages in one word of a bitmap.
pub const WORD_PAGES: u64 = 64;
/// Words of a bitmap that one chunk takes.
pub const CHUNK_WORDS: usize = 8;

/// Consecutive pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRun {
    /// The first.
    pub first: PageIndex,
    /// How many.
    pub count: u64,
}

impl PageRun {
    /// The page behind the last.
    pub const fn end(self) -> PageIndex {
        PageIndex(self.first.0.saturating_add(self.count))
    }

    /// Every page.
    pub fn pages(self) -> impl Iterator<Item = PageIndex> {
        (self.first.0..self.end().0).map(PageIndex)
    }
}

/// The order of one lane among those of a migration, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lane(pub u16);

/// The lane that chunk number `chunk` travels on, out of `lanes` (at least 1): always the same one, so that two
/// versions of a page never overtake each other.
pub fn lane_of(chunk: u64, lanes: u16) -> Lane {
    Lane(u16::try_from(chunk % u64::from(lanes.max(1))).unwrap_or(0))
}

/// The chunks of a RAM of `chunks` chunks that travel on `lane`, in order.
pub fn chunks_of(lane: Lane, lanes: u16, chunks: u64) -> impl Iterator<Item = u64> {
    (u64::from(lane.0)..chunks).step_by(usize::from(lanes.max(1)))
}

/// A set of pages below a fixed bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// No page of `pages`. Takes one bit of memory for each.
    pub fn empty(pages: u64) -> Self {
        Self { words: vec![0; usize::try_from(pages.div_ceil(WORD_PAGES)).unwrap_or(usize::MAX)], pages }
    }

    /// Every page of `pages`.
    pub fn full(pages: u64) -> Self {
        let mut set = Self::empty(pages);
        set.insert_run(PageRun { first: PageIndex(0), count: pages });
        set
    }

    /// The bound: pages are numbered below it.
    pub const fn bound(&self) -> u64 {
        self.pages
    }

    /// How many pages are in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&w| w == 0)
    }

    /// Whether `page` is in the set; pages beyond the bound are not.
    pub fn contains(&self, page: PageIndex) -> bool {
        let (word, bit) = place(page);
        self.words.get(word).is_some_and(|w| w & bit != 0)
    }

    /// Adds `page`; whether it is new. A page beyond the bound is not added.
    pub fn insert(&mut self, page: PageIndex) -> bool {
        if page.0 >= self.pages {
            return false;
        }
        let (word, bit) = place(page);
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        new
    }

    /// Takes `page` out; whether it was in.
    pub fn remove(&mut self, page: PageIndex) -> bool {
        let (word, bit) = place(page);
        let Some(w) = self.words.get_mut(word) else { return false };
        let was = *w & bit != 0;
        *w &= !bit;
        was
    }

    /// Adds the part of `run` that lies below the bound.
    pub fn insert_run(&mut self, run: PageRun) {
        for (word, mask) in words_of(run, self.pages) {
            self.words[word] |= mask;
        }
    }

    /// Takes all pages of `run` out.
    pub fn remove_run(&mut self, run: PageRun) {
        for (word, mask) in words_of(run, self.pages) {
            self.words[word] &= !mask;
        }
    }

    /// Adds all pages of `other` that lie below the bound.
    pub fn union_with(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
        self.trim();
    }

    /// Takes all pages of `other` out.
    pub fn difference_with(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
    }

    /// Takes everything out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Runs of pages in the set, in order, each as long as it can be.
    pub fn runs(&self) -> Runs<'_> {
        Runs { words: &self.words, at: 0, first_page: 0 }
    }

    /// The bitmap, in the layout of the shared one.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Adds the pages that `bits` has in word number `word`, those beyond the bound left out.
    pub fn insert_word(&mut self, word: usize, bits: u64) {
        if let Some(w) = self.words.get_mut(word) {
            *w |= bits;
            if word + 1 == self.words.len() {
                self.trim();
            }
        }
    }

    fn trim(&mut self) {
        let tail = self.pages % WORD_PAGES;
        if tail != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << tail) - 1;
        }
    }
}

/// Word and bit of a page. A page beyond what a bitmap can hold gets a word beyond its end.
fn place(page: PageIndex) -> (usize, u64) {
    (usize::try_from(page.0 / WORD_PAGES).unwrap_or(usize::MAX), 1 << (page.0 % WORD_PAGES))
}

/// Words and the bits in them that `run` covers in a bitmap of `pages` pages.
pub fn words_of(run: PageRun, pages: u64) -> impl Iterator<Item = (usize, u64)> {
    let end = run.end().0.min(pages);
    let mut at = run.first.0.min(end);
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let bit = at % WORD_PAGES;
        let count = (WORD_PAGES - bit).min(end - at);
        let mask = if count == WORD_PAGES { u64::MAX } else { ((1 << count) - 1) << bit };
        let word = usize::try_from(at / WORD_PAGES).unwrap_or(usize::MAX);
        at += count;
        Some((word, mask))
    })
}

/// Runs of set bits in `words`, the first of which begins at page `first_page`. For words taken from the shared bitmap.
pub fn runs_in(words: &[u64], first_page: PageIndex) -> Runs<'_> {
    Runs { words, at: 0, first_page: first_page.0 }
}

/// Runs of set bits, in order.
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    words: &'a [u64],
    at: u64,
    first_page: u64,
}

impl Runs<'_> {
    /// First position from `from` on whose bit is `set`, or the end.
    fn seek(&self, from: u64, set: bool) -> u64 {
        let end = self.words.len() as u64 * WORD_PAGES;
        let mut at = from;
        while at < end {
            let Some(&word) = usize::try_from(at / WORD_PAGES).ok().and_then(|w| self.words.get(w)) else {
                break;
            };
            let word = if set { word } else { !word };
            let rest = word >> (at % WORD_PAGES);
            if rest != 0 {
                return at + u64::from(rest.trailing_zeros());
            }
            at = (at / WORD_PAGES + 1) * WORD_PAGES;
        }
        end
    }
}

impl Iterator for Runs<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        let first = self.seek(self.at, true);
        if first >= self.words.len() as u64 * WORD_PAGES {
            self.at = first;
            return None;
        }
        let end = self.seek(first, false);
        self.at = end;
        Some(PageRun { first: PageIndex(self.first_page + first), count: end - first })
    }
}

/// Cuts a run where chunks end, since a run on a lane lies within one chunk.
pub fn split_at_chunks(run: PageRun) -> impl Iterator<Item = PageRun> {
    let end = run.end().0;
    let mut at = run.first.0;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let stop = ((at / CHUNK_PAGES + 1) * CHUNK_PAGES).min(end);
        let part = PageRun { first: PageIndex(at), count: stop - at };
        at = stop;
        Some(part)
    })
}
