//! One direction of a session: the sender's and the receiver's book about numbered bytes.
//!
//! ```text
//!   Outbox   ... forgotten ... | acknowledged <= kept and sent | kept, not sent on this connection |  room up to the window
//!                              ^ first                         ^ next                              ^ end
//! ```
//!
//! Offsets are 64 bits wide and count from the begin of the session, so that they never wrap.

use std::collections::VecDeque;

use super::{CHUNK_BYTES, WINDOW_BYTES};

/// The other end said something that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Bytes are missing between what was received and what came.
    #[error("bytes from {offset} came where {expected} was next")]
    Gap {
        /// What came.
        offset: u64,
        /// What was next.
        expected: u64,
    },
    /// More bytes than the window allows, or more than a message may carry.
    #[error("more bytes than may be under way")]
    Overrun,
    /// An acknowledgement, or a resumption, from beyond what was sent or before what is kept.
    #[error("offset {offset} is not between {first} and {end}")]
    OutOfRange {
        /// What was named.
        offset: u64,
        /// First byte that is kept.
        first: u64,
        /// End of what was ever sent.
        end: u64,
    },
    /// Input after its end, or an end elsewhere than at the end.
    #[error("the stream had ended")]
    Ended,
    /// A message that does not belong here.
    #[error("{0} does not belong here")]
    Unexpected(&'static str),
}

fn offset_after(offset: u64, bytes: usize) -> u64 {
    offset.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX))
}

/// What a sender keeps.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Bytes `first..end`.
    bytes: VecDeque<u8>,
    first: u64,
    /// Next to send on this connection.
    next: u64,
    /// End of what was sent on any connection.
    sent: u64,
    ended: bool,
}

impl Outbox {
    /// How many bytes it takes now. A source is read only while there is room.
    pub fn room(&self) -> usize {
        if self.ended { 0 } else { WINDOW_BYTES.saturating_sub(self.bytes.len()) }
    }

    /// Takes as many of `bytes` as there is room for, and says how many.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room());
        self.bytes.extend(&bytes[..taken]);
        taken
    }

    /// No more bytes will come.
    pub fn end_stream(&mut self) {
        self.ended = true;
    }

    /// Whether no more bytes will come.
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// Number of the byte after the last one.
    pub fn end(&self) -> u64 {
        offset_after(self.first, self.bytes.len())
    }

    /// Whether everything so far has been sent on this connection.
    pub fn is_all_sent(&self) -> bool {
        self.next == self.end()
    }

    /// The next bytes to send, with their number.
    pub fn next_chunk(&mut self) -> Option<(u64, Vec<u8>)> {
        let skip = usize::try_from(self.next.saturating_sub(self.first)).ok()?;
        let chunk: Vec<u8> = self.bytes.iter().skip(skip).take(CHUNK_BYTES).copied().collect();
        if chunk.is_empty() {
            return None;
        }
        let offset = self.next;
        self.next = offset_after(offset, chunk.len());
        self.sent = self.sent.max(self.next);
        Some((offset, chunk))
    }

    /// The receiver has delivered everything before `offset`.
    ///
    /// # Errors
    /// When that was never sent. An old acknowledgement changes nothing.
    pub fn acknowledge(&mut self, offset: u64) -> Result<(), Violation> {
        if offset > self.sent {
            return Err(self.out_of_range(offset));
        }
        if let Some(gone) = offset.checked_sub(self.first).and_then(|gone| usize::try_from(gone).ok()) {
            self.bytes.drain(..gone.min(self.bytes.len()));
            self.first = offset;
            self.next = self.next.max(offset);
        }
        Ok(())
    }

    /// A new connection, whose other end has everything before `received`.
    ///
    /// # Errors
    /// When that was never sent, or bytes after it are forgotten.
    pub fn resume_from(&mut self, received: u64) -> Result<(), Violation> {
        if !(self.first..=self.sent).contains(&received) {
            return Err(self.out_of_range(received));
        }
        self.next = received;
        Ok(())
    }

    fn out_of_range(&self, offset: u64) -> Violation {
        Violation::OutOfRange { offset, first: self.first, end: self.sent }
    }
}

/// What a receiver knows.
#[derive(Debug, Default)]
pub struct Inbox {
    received: u64,
    delivered: u64,
    /// Last acknowledgement that was sent on this connection.
    acknowledged: u64,
    ended: bool,
}

impl Inbox {
    /// Number of the next byte.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Whether the end has come.
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// Takes bytes in, and gives the part that is new.
    ///
    /// # Errors
    /// [`Violation`] for a gap, too many bytes, or bytes after the end.
    pub fn accept<'a>(&mut self, offset: u64, bytes: &'a [u8]) -> Result<&'a [u8], Violation> {
        if bytes.len() > CHUNK_BYTES {
            return Err(Violation::Overrun);
        }
        let Some(known) = self.received.checked_sub(offset) else {
            return Err(Violation::Gap { offset, expected: self.received });
        };
        let known = usize::try_from(known).unwrap_or(usize::MAX).min(bytes.len());
        let new = &bytes[known..];
        let received = offset_after(self.received, new.len());
        if !new.is_empty() && self.ended {
            return Err(Violation::Ended);
        }
        if received - self.delivered > WINDOW_BYTES as u64 {
            return Err(Violation::Overrun);
        }
        self.received = received;
        Ok(new)
    }

    /// The end, which may be told more than once. Says whether it is news.
    ///
    /// # Errors
    /// When bytes are missing before it, or it is elsewhere.
    pub fn accept_end(&mut self, offset: u64) -> Result<bool, Violation> {
        match offset.cmp(&self.received) {
            std::cmp::Ordering::Greater => Err(Violation::Gap { offset, expected: self.received }),
            std::cmp::Ordering::Less => Err(Violation::Ended),
            std::cmp::Ordering::Equal => Ok(!std::mem::replace(&mut self.ended, true)),
        }
    }

    /// `bytes` more have reached whom they are for.
    pub fn deliver(&mut self, bytes: usize) {
        self.delivered = offset_after(self.delivered, bytes).min(self.received);
    }

    /// Whether everything received was delivered.
    pub fn is_all_delivered(&self) -> bool {
        self.delivered == self.received
    }

    /// An acknowledgement that is worth sending: an eighth of the window, or everything there is.
    pub fn next_ack(&mut self) -> Option<u64> {
        let due = self.delivered - self.acknowledged;
        let worth = due >= (WINDOW_BYTES / 8) as u64 || (due > 0 && self.is_all_delivered());
        worth.then(|| {
            self.acknowledged = self.delivered;
            self.delivered
        })
    }

    /// A new connection: acknowledgements on the last one may be lost.
    pub fn reconnect(&mut self) {
        self.acknowledged = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outbox_keeps_until_acknowledged_and_no_more_than_the_window() {
        let mut out = Outbox::default();
        assert_eq!(out.push(&vec![7; WINDOW_BYTES + 5]), WINDOW_BYTES);
        assert_eq!((out.room(), out.push(b"x")), (0, 0));
        let (offset, chunk) = out.next_chunk().unwrap();
        assert_eq!((offset, chunk.len()), (0, CHUNK_BYTES));
        assert!(out.acknowledge(CHUNK_BYTES as u64 + 1).is_err(), "never sent");
        out.acknowledge(100).unwrap();
        out.acknowledge(50).unwrap();
        assert_eq!(out.room(), 100);
        assert!(out.resume_from(99).is_err(), "forgotten");
        assert!(out.resume_from(u64::MAX).is_err());
        out.resume_from(100).unwrap();
        assert_eq!(out.next_chunk().unwrap().0, 100);
    }

    #[test]
    fn an_inbox_takes_each_byte_once() {
        let mut inbox = Inbox::default();
        assert_eq!(inbox.accept(0, b"abc").unwrap(), b"abc");
        assert_eq!(inbox.accept(1, b"bcd").unwrap(), b"d");
        assert_eq!(inbox.accept(0, b"ab").unwrap(), b"");
        assert_eq!(inbox.accept(5, b"x"), Err(Violation::Gap { offset: 5, expected: 4 }));
        assert!(inbox.accept(u64::MAX, b"x").is_err());
        assert!(inbox.accept_end(9).is_err());
        assert_eq!((inbox.accept_end(4), inbox.accept_end(4)), (Ok(true), Ok(false)));
        assert_eq!(inbox.accept(4, b"x"), Err(Violation::Ended));
    }

    #[test]
    fn a_peer_cannot_send_beyond_the_window() {
        let mut inbox = Inbox::default();
        let chunk = vec![0; CHUNK_BYTES];
        for n in 0..(WINDOW_BYTES / CHUNK_BYTES) as u64 {
            inbox.accept(n * CHUNK_BYTES as u64, &chunk).unwrap();
        }
        assert_eq!(inbox.accept(WINDOW_BYTES as u64, b"x"), Err(Violation::Overrun));
        inbox.deliver(1);
        assert_eq!(inbox.accept(WINDOW_BYTES as u64, b"x").unwrap(), b"x");
    }
}
