//! Blocks of memory that are used again and again.
//!
//! A block that is allocated, filled and freed for every 256 KiB of traffic costs the kernel a page fault and
//! a page clear for every 4 KiB of it, and none of it is ever in a cache. A pool hands out the block that was
//! given back first, once nobody holds a view of it any more; with prompt readers that is a handful of blocks.

use std::collections::VecDeque;

use bytes::BytesMut;

/// Blocks of one size, on one shard.
///
/// ```
/// let mut pool = dataplane::quic::Pool::new(4096, 8);
/// let mut block = pool.take();
/// block.extend_from_slice(b"pages");
/// let view = block.split().freeze(); // for SendStream::write_chunk, which holds it until it is acknowledged
/// pool.give(block);                  // comes back from `take` when the view is dropped
/// # assert_eq!(view.as_ref(), b"pages");
/// ```
#[derive(Debug)]
pub struct Pool {
    block_bytes: usize,
    blocks_max: usize,
    given: VecDeque<BytesMut>,
}

impl Pool {
    /// Blocks of `block_bytes`; keeps at most `blocks_max` of them.
    pub fn new(block_bytes: usize, blocks_max: usize) -> Self {
        Self { block_bytes, blocks_max, given: VecDeque::new() }
    }

    /// An empty block with room for `block_bytes`.
    pub fn take(&mut self) -> BytesMut {
        // Views are dropped in about the order of their making, so the first is the likeliest to be free.
        if let Some(mut block) = self.given.pop_front() {
            if block.try_reclaim(self.block_bytes) {
                return block;
            }
            self.given.push_front(block);
        }
        BytesMut::with_capacity(self.block_bytes)
    }

    /// Gives back what is left of a block after its content was split off. Views of it may still be held;
    /// one that is given while the pool is full is freed with its last view.
    pub fn give(&mut self, mut block: BytesMut) {
        block.clear();
        if self.given.len() < self.blocks_max {
            self.given.push_back(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_comes_back_when_its_views_are_gone_and_not_before() {
        let mut pool = Pool::new(4096, 2);
        let mut block = pool.take();
        block.extend_from_slice(&[1; 4096]);
        let address = block.as_ptr();
        let view = block.split().freeze();
        pool.give(block);

        let other = pool.take();
        assert_ne!(other.as_ptr(), address);
        assert!(view.iter().all(|byte| *byte == 1));
        drop(view);
        let again = pool.take();
        assert_eq!(again.as_ptr(), address);
        assert!(again.is_empty() && again.capacity() >= 4096);
    }

    #[test]
    fn a_pool_keeps_no_more_than_it_may() {
        let mut pool = Pool::new(64, 2);
        let blocks: Vec<_> = (0..5).map(|_| pool.take()).collect();
        blocks.into_iter().for_each(|block| pool.give(block));
        assert_eq!(pool.given.len(), 2);
    }
}
