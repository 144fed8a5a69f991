//! virtio-rng: the host's entropy for the guest.

use virtio_queue::Queue;

use super::queue::{self, QueueError};
use super::{Device, Progress};
use crate::memory::GuestMemory;

/// Most bytes given for one request; the driver asks again for more.
const BYTES_MAX: usize = 256;
/// Most requests served in one go.
const BUDGET: usize = 16;

/// The entropy source.
#[derive(Debug, Default)]
pub struct Rng;

impl Device for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn id(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}

    fn notified(
        &mut self,
        index: usize,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Progress, QueueError> {
        let Some(Some(requests)) = queues.get_mut(index) else { return Ok(Progress::default()) };
        let mut progress = Progress::default();
        for _ in 0..BUDGET {
            let Some(chain) = queue::pop(requests, memory)? else { return Ok(progress) };
            let head = chain.head_index();
            let mut random = [0; BYTES_MAX];
            let wanted = queue::capacity(chain.clone(), BYTES_MAX)?;
            // A host that has no entropy this early gives none; the driver sees an empty answer.
            let got = rustix::rand::getrandom(&mut random[..wanted], rustix::rand::GetRandomFlags::NONBLOCK);
            let written = queue::scatter(chain, memory, &random[..got.unwrap_or(0)])?;
            queue::push(requests, memory, head, u32::try_from(written).unwrap_or(0))?;
            progress.used |= queue::wants_interrupt(requests, memory);
        }
        progress.more = true;
        Ok(progress)
    }

    fn reset(&mut self) {}
}
