//! virtio-rng: asked once at boot for the machine's seed.
//!
//! Polled for a bounded time, as boot has no loop yet; without an answer the seed comes from the TSC and `rng_ok` is false.

use super::mmio::Device;
use super::queue::DEVICE_WRITES;
use crate::clock::Clock;
use crate::cpu;
use crate::memory::frames::Frames;

const SEED_BYTES: u32 = 32;
const PATIENCE_US: u64 = 200_000;

/// Eight bytes of entropy, folded from 32.
pub fn seed(device: &Device, frames: &mut Frames, clock: &Clock) -> Option<u64> {
    device.negotiate(0)?;
    let mut queue = device.queue(0, 4, frames)?;
    queue.set_interrupts(false);
    let buffer = frames.share(32);
    queue.describe(0, &buffer, SEED_BYTES, DEVICE_WRITES, 0);
    device.start();
    queue.submit(0);
    device.notify(0);
    let until = cpu::tsc() + clock.ticks(PATIENCE_US);
    while cpu::tsc() < until {
        if let Some((_, bytes)) = queue.take_used() {
            let words = [0, 8, 16, 24].map(|i| buffer.read::<u64>(i));
            let seed = words.into_iter().fold(0, |seed, word| guest_core::page::mix(seed ^ word));
            return (bytes >= 8 && words[0] != 0).then_some(seed);
        }
    }
    None
}
