//! Buffers for pages on their way out, used again and again: a fresh one for each batch would be a megabyte of page faults.

use std::sync::{Arc, Mutex};

use bytes::Bytes;

/// A lane's buffers. The transport holds one until its bytes are acknowledged, then it comes back.
#[derive(Debug, Clone, Default)]
pub(super) struct BufferPool {
    free: Arc<Mutex<Vec<Vec<u8>>>>,
}

/// Most buffers kept for reuse: the transport's send window over the size of a batch, and two.
const KEPT_MAX: usize = 12;

impl BufferPool {
    /// A buffer of `bytes` initialised bytes, of whatever content.
    pub(super) fn take(&self, bytes: usize) -> Vec<u8> {
        let kept = self.free.lock().ok().and_then(|mut free| free.pop());
        let mut buffer = kept.unwrap_or_default();
        buffer.resize(bytes, 0);
        buffer
    }

    /// Makes the first `used` bytes of a buffer a `Bytes` that returns the buffer when it is dropped.
    pub(super) fn lend(&self, buffer: Vec<u8>, used: usize) -> Bytes {
        let used = used.min(buffer.len());
        Bytes::from_owner(Lent { buffer, used, pool: self.clone() })
    }
}

struct Lent {
    buffer: Vec<u8>,
    used: usize,
    pool: BufferPool,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.used]
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Ok(mut free) = self.pool.free.lock()
            && free.len() < KEPT_MAX
        {
            free.push(std::mem::take(&mut self.buffer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_when_its_bytes_are_dropped() {
        let pool = BufferPool::default();
        let buffer = pool.take(100);
        let place = buffer.as_ptr();
        let bytes = pool.lend(buffer, 10);
        assert_eq!(bytes.len(), 10);
        let part = bytes.slice(2..4);
        drop(bytes);
        assert!(pool.free.lock().unwrap().is_empty());
        drop(part);
        let again = pool.take(100);
        assert_eq!(again.as_ptr(), place);
    }
}
