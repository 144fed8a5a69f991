//! The serial console: 16550 at 0x3f8, output only.
//!
//! Each byte costs the guest an exit (tens of microseconds), so lines are queued and leave one byte per turn of the
//! loop. The transmitter is never asked whether it is ready: that would double the cost, and no virtual one ever is not.
//! Lines that do not fit the queue are dropped whole.

use crate::cpu;
use core::fmt;
use guest_core::text::Text;

const COM1: u16 = 0x3f8;
const QUEUE: usize = 2048;
/// Longest line, with its end.
const LINE: usize = 256;

/// Bytes that wait to be sent.
pub struct Serial {
    queue: [u8; QUEUE],
    head: usize,
    len: usize,
}

impl Serial {
    /// An empty queue.
    #[must_use]
    pub const fn new() -> Self {
        Self { queue: [0; QUEUE], head: 0, len: 0 }
    }

    /// Queues `mashine-guest: ` and a line.
    pub fn line(&mut self, args: fmt::Arguments<'_>) {
        let line = Text::<LINE>::from_args(format_args!("mashine-guest: {args}\n"));
        if self.len + line.as_bytes().len() > QUEUE {
            return;
        }
        for &byte in line.as_bytes() {
            self.queue[(self.head + self.len) % QUEUE] = byte;
            self.len += 1;
        }
    }

    /// Sends one byte; whether there was one.
    pub fn send_one(&mut self) -> bool {
        if self.len == 0 {
            return false;
        }
        cpu::out8(COM1, self.queue[self.head]);
        self.head = (self.head + 1) % QUEUE;
        self.len -= 1;
        true
    }

    /// Sends everything, before the guest goes.
    pub fn flush(&mut self) {
        while self.send_one() {}
    }
}

/// Sends a line at once, for a guest that has no loop any more.
pub fn line_now(args: fmt::Arguments<'_>) {
    let line = Text::<LINE>::from_args(format_args!("mashine-guest: {args}"));
    for &byte in line.as_bytes().iter().chain(b"\n") {
        cpu::out8(COM1, byte);
    }
}
