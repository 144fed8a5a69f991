//! Pieces of guest memory one after the other, taken from the front.

use std::collections::VecDeque;

/// A piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Guest-physical address of its first byte.
    pub address: u64,
    /// Its length in bytes.
    pub bytes: usize,
}

/// Pieces of guest memory, none of them empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges {
    ranges: VecDeque<Range>,
    bytes: u64,
}

impl Ranges {
    /// Adds a piece at the end.
    pub fn push(&mut self, range: Range) {
        if range.bytes > 0 {
            self.bytes = self.bytes.saturating_add(u64::try_from(range.bytes).unwrap_or(u64::MAX));
            self.ranges.push_back(range);
        }
    }

    /// All their bytes.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The pieces.
    pub fn iter(&self) -> impl Iterator<Item = Range> {
        self.ranges.iter().copied()
    }

    /// Takes the last byte off the end and gives its address.
    pub fn pop_byte(&mut self) -> Option<u64> {
        let last = self.ranges.back_mut()?;
        last.bytes -= 1;
        let (address, empty) = (last.address + u64::try_from(last.bytes).unwrap_or(0), last.bytes == 0);
        self.bytes -= 1;
        if empty {
            self.ranges.pop_back();
        }
        Some(address)
    }

    /// Takes the first `bytes` bytes, or what there is.
    pub fn take(&mut self, bytes: u64) -> Self {
        let mut taken = Self::default();
        while taken.bytes < bytes
            && let Some(first) = self.ranges.front_mut()
        {
            let wanted = usize::try_from(bytes - taken.bytes).unwrap_or(usize::MAX).min(first.bytes);
            taken.push(Range { address: first.address, bytes: wanted });
            let step = u64::try_from(wanted).unwrap_or(0);
            first.address += step;
            first.bytes -= wanted;
            self.bytes -= step;
            if first.bytes == 0 {
                self.ranges.pop_front();
            }
        }
        taken
    }
}

impl IntoIterator for Ranges {
    type Item = Range;
    type IntoIter = std::collections::vec_deque::IntoIter<Range>;

    fn into_iter(self) -> Self::IntoIter {
        self.ranges.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn addresses(ranges: &Ranges) -> Vec<u64> {
        ranges.iter().flat_map(|range| range.address..range.address + range.bytes as u64).collect()
    }

    proptest! {
        #[test]
        fn what_is_taken_and_what_is_left_is_what_there_was(
            pieces in proptest::collection::vec((0..1000u64, 0..50usize), 0..8),
            cuts in proptest::collection::vec(0..60u64, 0..8),
        ) {
            let mut ranges = Ranges::default();
            pieces.iter().for_each(|&(address, bytes)| ranges.push(Range { address, bytes }));
            let mut model = addresses(&ranges);
            if let Some(last) = ranges.pop_byte() {
                prop_assert_eq!(Some(last), model.pop());
            }
            for cut in cuts {
                let taken = ranges.take(cut);
                let left = model.split_off(model.len().min(usize::try_from(cut).unwrap()));
                prop_assert_eq!(addresses(&taken), model);
                prop_assert_eq!(addresses(&ranges), left.clone());
                prop_assert_eq!(ranges.bytes(), left.len() as u64);
                model = left;
            }
        }
    }
}
