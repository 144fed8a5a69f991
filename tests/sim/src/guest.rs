//! The model of a guest, of the VMM process that holds it, and of the truth that no host knows.
//!
//! Guest RAM has 64 pages, each with a version counter for content; they lie in all eight chunks of the smallest RAM that a
//! machine may have, so that the lane rules apply to them as to real ones.

use wire::ids::Epoch;
use wire::units::{CHUNK_PAGES, PageIndex};

/// Pages of the model.
pub const PAGES: usize = 64;
/// Pages of the model in each chunk.
pub const PAGES_PER_CHUNK: usize = 8;
/// Chunks.
pub const CHUNKS: usize = PAGES / PAGES_PER_CHUNK;

/// The page that model page `index` stands for.
pub fn page_of(index: usize) -> PageIndex {
    let (chunk, within) = (index / PAGES_PER_CHUNK, index % PAGES_PER_CHUNK);
    PageIndex(chunk as u64 * CHUNK_PAGES + within as u64)
}

/// The model page that stands for `page`, if one does.
pub fn index_of(page: PageIndex) -> Option<usize> {
    let within = usize::try_from(page.0 % CHUNK_PAGES).ok().filter(|&w| w < PAGES_PER_CHUNK)?;
    let chunk = usize::try_from(page.chunk()).ok().filter(|&c| c < CHUNKS)?;
    Some(chunk * PAGES_PER_CHUNK + within)
}

/// All that a guest can tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Content of each page; 0 is a zero page.
    pub pages: [u32; PAGES],
    /// State of its vCPUs: counts the steps it made.
    pub cpu: u64,
    /// Serial bytes it wrote.
    pub console: u64,
}

impl Memory {
    /// A machine just made.
    pub const BLANK: Self = Self { pages: [0; PAGES], cpu: 0, console: 0 };

    /// Pages whose content differs, as a mask.
    pub fn difference(&self, other: &Self) -> u64 {
        (0..PAGES).filter(|&i| self.pages[i] != other.pages[i]).fold(0, |mask, i| mask | 1 << i)
    }
}

/// Phase of a VMM, as in `wire::vmm::Phase`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// No state yet.
    Created,
    /// Stands still.
    Paused,
    /// Runs.
    Running,
    /// Given away.
    Disowned,
    /// No process.
    Dead,
}

/// A VMM process: the record of who owns the machine.
#[derive(Debug, Clone)]
pub struct Vmm {
    /// Distinguishes the processes of one host.
    pub process: u32,
    /// Phase.
    pub phase: Phase,
    /// Highest epoch seen.
    pub epoch: Epoch,
    /// To which epoch it was given away.
    pub disowned: Option<Epoch>,
    /// The guest.
    pub memory: Memory,
    /// Dirty pages, log and shared bitmap together.
    pub dirty: u64,
    /// Whether writes are logged.
    pub log: bool,
    /// Whether a state was loaded.
    pub loaded: bool,
}

impl Vmm {
    /// A process with a blank machine.
    pub const fn new(process: u32) -> Self {
        Self {
            process,
            phase: Phase::Created,
            epoch: Epoch(0),
            disowned: None,
            memory: Memory::BLANK,
            dirty: 0,
            log: false,
            loaded: false,
        }
    }

    /// `Run`: refused once given away, and below an epoch seen. Returns whether the guest began to run just now.
    pub fn run(&mut self, epoch: Epoch) -> Result<bool, &'static str> {
        match self.phase {
            Phase::Running if epoch >= self.epoch => Ok(false),
            Phase::Paused if epoch >= self.epoch => {
                self.epoch = epoch;
                self.phase = Phase::Running;
                Ok(true)
            }
            Phase::Paused | Phase::Running => Err("stale epoch"),
            Phase::Disowned => Err("disowned"),
            Phase::Created | Phase::Dead => Err("wrong phase"),
        }
    }

    /// `Pause`.
    pub fn pause(&mut self) -> Result<(), &'static str> {
        match self.phase {
            Phase::Running | Phase::Paused => {
                self.phase = Phase::Paused;
                Ok(())
            }
            _ => Err("wrong phase"),
        }
    }

    /// `Disown`.
    pub fn disown(&mut self, epoch: Epoch) -> Result<(), &'static str> {
        match self.phase {
            Phase::Paused if epoch > self.epoch => {
                self.disowned = Some(epoch);
                self.phase = Phase::Disowned;
                Ok(())
            }
            Phase::Disowned if self.disowned == Some(epoch) => Ok(()),
            _ => Err("wrong phase"),
        }
    }

    /// `Reclaim`.
    pub fn reclaim(&mut self, epoch: Epoch) -> Result<(), &'static str> {
        match self.disowned {
            Some(to) if self.phase == Phase::Disowned && epoch > to => {
                self.disowned = None;
                self.epoch = epoch;
                self.phase = Phase::Paused;
                Ok(())
            }
            _ => Err("not disowned, or stale"),
        }
    }

    /// One step of a guest that runs: writes some pages and serial bytes.
    pub fn step(&mut self, written: u64, stamp: u32, serial: u64) {
        for index in (0..PAGES).filter(|i| written & (1 << i) != 0) {
            self.memory.pages[index] = stamp;
        }
        if self.log {
            self.dirty |= written;
        }
        self.memory.cpu += 1;
        self.memory.console += serial;
    }

    /// The process dies.
    pub fn die(&mut self) {
        self.phase = Phase::Dead;
    }
}

/// Serial byte number `offset`.
pub fn serial_byte(offset: u64) -> u8 {
    u8::try_from(offset % 251).unwrap_or(0)
}
