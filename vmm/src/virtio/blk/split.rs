//! Where the bytes of a disk are read from: overlay, base, or nowhere. Pure.

use wire::units::PAGE_BYTES;

/// What holds a piece of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The overlay.
    Overlay,
    /// The base.
    Base,
    /// Neither: it reads as zeroes.
    Nowhere,
}

/// The longest piece of the disk's bytes `at .. end` that begins at `at` and lies in one place, and that place. `at` is below `end`;
/// `held` says whether the overlay holds a block, and the base has `base_bytes` bytes.
pub fn piece(held: impl Fn(u64) -> bool, base_bytes: u64, at: u64, end: u64) -> (Place, u64) {
    let in_overlay = held(at / PAGE_BYTES);
    let mut stop = next_block(at).min(end);
    while stop < end && held(stop / PAGE_BYTES) == in_overlay {
        stop = next_block(stop).min(end);
    }
    match (in_overlay, base_bytes.checked_sub(at)) {
        (true, _) => (Place::Overlay, stop - at),
        (false, None | Some(0)) => (Place::Nowhere, stop - at),
        (false, Some(there)) => (Place::Base, there.min(stop - at)),
    }
}

const fn next_block(at: u64) -> u64 {
    (at / PAGE_BYTES + 1) * PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The place of one byte.
    fn place_of(held: &[bool], base_bytes: u64, byte: u64) -> Place {
        match held[usize::try_from(byte / PAGE_BYTES).unwrap()] {
            true => Place::Overlay,
            false if byte < base_bytes => Place::Base,
            false => Place::Nowhere,
        }
    }

    proptest! {
        #[test]
        fn pieces_are_whole_right_and_as_long_as_they_can_be(
            held in proptest::collection::vec(any::<bool>(), 12),
            base_sectors in 0..100u64,
            first in 0..96u64,
            sectors in 1..96u64,
        ) {
            let (base_bytes, mut at) = (base_sectors * 512, first * 512);
            let end = (at + sectors * 512).min(12 * PAGE_BYTES);
            let mut last = None;
            while at < end {
                let (place, bytes) =
                    piece(|block| held[usize::try_from(block).unwrap()], base_bytes, at, end);
                prop_assert!(bytes > 0 && at + bytes <= end);
                for byte in (at..at + bytes).step_by(512).chain([at + bytes - 1]) {
                    prop_assert_eq!(place_of(&held, base_bytes, byte), place, "byte {}", byte);
                }
                prop_assert!(last != Some(place), "two pieces where one would do");
                last = Some(place);
                at += bytes;
            }
        }
    }

    #[test]
    fn a_base_may_end_within_a_block() {
        let none = |_| false;
        assert_eq!(piece(none, 5000, 0, 8192), (Place::Base, 5000));
        assert_eq!(piece(none, 5000, 5000, 8192), (Place::Nowhere, 3192));
        assert_eq!(piece(none, 0, 0, 8192), (Place::Nowhere, 8192));
    }
}
