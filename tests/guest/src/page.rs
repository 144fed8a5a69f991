//! What is written into a managed page, and how it is checked.
//!
//! ```text
//! word 0  magic
//!      1  page index
//!      2  generation: how often this page was written, from 1
//!      3  seed of the machine
//!      4  random words that follow
//!      5  checksum over words 0-4 and 6-511
//!      6  random words, then the constant FILL
//! ```
//! All words little-endian. Everything follows from (seed, index, generation, random words), so a check compares all
//! 4096 bytes; the checksum only tells a page that was damaged from one that is whole but not the right one.

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;
/// Words of a page.
pub const WORDS: usize = 512;
/// Words before the content.
const HEADER: usize = 6;
const MAGIC: u64 = 0x6d61_7368_696e_6521;
/// The compressible part of a page.
const FILL: u64 = 0x5555_5555_5555_5555;

/// A page in memory, however it is reached.
pub trait Words {
    /// The word at `i` < 512.
    fn load(&self, i: usize) -> u64;
    /// Sets the word at `i` < 512.
    fn store(&mut self, i: usize, word: u64);
}

/// What a page should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Seed of the machine.
    pub seed: u64,
    /// Index of the page.
    pub index: u64,
    /// How often it was written.
    pub generation: u32,
}

/// Why a page is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// A whole page of this index, but of another generation.
    Stale,
    /// A whole page of another index or another machine.
    Foreign,
    /// Not a whole page.
    Corrupt,
}

/// Share of the content that is random, 0..=100, as a number of words.
#[must_use]
pub fn random_words(entropy: u8) -> u64 {
    let content = WORDS - HEADER;
    u64::try_from(content * usize::from(entropy.min(100)) / 100).unwrap_or(0)
}

/// Writes the page that `identity` asks for.
pub fn write(page: &mut impl Words, identity: Identity, random_words: u64) {
    let mut sum = Checksum::default();
    for (i, word) in content(identity, random_words) {
        sum.add(word);
        page.store(i, word);
    }
    page.store(5, sum.0);
}

/// Compares the page with what `identity` asks for.
///
/// # Errors
/// The kind of damage, if a single bit differs.
pub fn check(page: &impl Words, identity: Identity) -> Result<(), Wrong> {
    let random_words = page.load(4);
    let mut sum = Checksum::default();
    let mut same = random_words <= (WORDS - HEADER) as u64;
    for (i, word) in content(identity, random_words) {
        same &= page.load(i) == word;
        sum.add(word);
    }
    if same && page.load(5) == sum.0 {
        return Ok(());
    }
    Err(diagnose(page, identity))
}

fn diagnose(page: &impl Words, identity: Identity) -> Wrong {
    let mut sum = Checksum::default();
    for i in (0..5).chain(HEADER..WORDS) {
        sum.add(page.load(i));
    }
    if page.load(0) != MAGIC || page.load(5) != sum.0 {
        Wrong::Corrupt
    } else if page.load(1) != identity.index || page.load(3) != identity.seed {
        Wrong::Foreign
    } else if page.load(2) != u64::from(identity.generation) {
        Wrong::Stale
    } else {
        Wrong::Corrupt
    }
}

/// All words but the checksum, with their places.
fn content(identity: Identity, random_words: u64) -> impl Iterator<Item = (usize, u64)> {
    let Identity { seed, index, generation } = identity;
    let generation = u64::from(generation);
    let header = [MAGIC, index, generation, seed, random_words];
    let random = usize::try_from(random_words).unwrap_or(WORDS).min(WORDS - HEADER);
    let mut random_state = mix(seed ^ mix(index ^ mix(generation)));
    let body = (0..WORDS - HEADER).map(move |i| {
        if i < random {
            random_state = random_state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(random_state)
        } else {
            FILL
        }
    });
    header.into_iter().enumerate().chain(body.enumerate().map(|(i, word)| (i + HEADER, word)))
}

/// A bijection that spreads every bit (the finaliser of splitmix64).
#[must_use]
pub fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Maps 64 random bits onto 0..`end`, evenly.
#[must_use]
pub fn below(end: u64, random: u64) -> u64 {
    u64::try_from((u128::from(random) * u128::from(end)) >> 64).unwrap_or(0)
}

/// Order-dependent sum: detects any single changed word.
#[derive(Default)]
struct Checksum(u64);

impl Checksum {
    fn add(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
}

impl Words for [u64; WORDS] {
    fn load(&self, i: usize) -> u64 {
        u64::from_le(self[i])
    }
    fn store(&mut self, i: usize, word: u64) {
        self[i] = word.to_le();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: Identity = Identity { seed: 7, index: 42, generation: 3 };

    fn page(identity: Identity, entropy: u8) -> [u64; WORDS] {
        let mut page = [0; WORDS];
        write(&mut page, identity, random_words(entropy));
        page
    }

    #[test]
    fn accepts_what_it_wrote() {
        for entropy in [0, 1, 50, 100, 255] {
            assert_eq!(check(&page(ID, entropy), ID), Ok(()));
        }
    }

    #[test]
    fn sees_every_flipped_bit() {
        for entropy in [0, 100] {
            for bit in 0..WORDS * 64 {
                let mut page = page(ID, entropy);
                page[bit / 64] ^= 1 << (bit % 64);
                assert_eq!(check(&page, ID), Err(Wrong::Corrupt), "bit {bit}");
            }
        }
    }

    #[test]
    fn tells_stale_from_foreign() {
        assert_eq!(check(&page(Identity { generation: 2, ..ID }, 100), ID), Err(Wrong::Stale));
        assert_eq!(check(&page(Identity { index: 41, ..ID }, 100), ID), Err(Wrong::Foreign));
        assert_eq!(check(&page(Identity { seed: 8, ..ID }, 100), ID), Err(Wrong::Foreign));
        assert_eq!(check(&[0; WORDS], ID), Err(Wrong::Corrupt));
    }

    #[test]
    fn below_covers_its_range() {
        assert_eq!((below(10, 0), below(10, u64::MAX), below(0, 5)), (0, 9, 0));
    }

    #[test]
    fn entropy_is_the_share_of_random_words() {
        let page = page(ID, 25);
        let constant = page[HEADER..].iter().filter(|w| **w == FILL.to_le()).count();
        assert_eq!(constant, WORDS - HEADER - 126);
    }
}
