//! A disk that can be pulled out at any operation.
//!
//! What was synced is there after the crash. Of what was written since, each write is there, half there or not there, by a seed: a
//! disk may reorder what it was not told to order.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use redb::StorageBackend;

#[derive(Debug, Default)]
struct Inner {
    synced: Vec<u8>,
    current: Vec<u8>,
    unsynced: Vec<(u64, Vec<u8>)>,
    operations: u64,
    crash_at: Option<u64>,
    crashed: bool,
}

/// The disk. Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct Disk(Arc<Mutex<Inner>>);

impl Disk {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    /// Writing operations so far.
    pub fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// Fails from the operation of this number on.
    pub fn crash_at(&self, operation: u64) {
        self.lock().crash_at = Some(operation);
    }

    /// Whether it has failed.
    pub fn crashed(&self) -> bool {
        self.lock().crashed
    }

    /// Plugs it in again, empty: what happens to a store that was not whole yet, since it is made under another name.
    pub fn replace(&self) {
        let mut inner = self.lock();
        let operations = inner.operations;
        *inner = Inner { operations, ..Inner::default() };
    }

    /// Plugs it in again, with what survived.
    pub fn revive(&self, seed: u64) {
        let mut inner = self.lock();
        let mut image = std::mem::take(&mut inner.synced);
        let mut random = seed | 1;
        for (offset, bytes) in std::mem::take(&mut inner.unsynced) {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let kept = match random >> 62 {
                0 => 0,
                1 => bytes.len() / 2,
                _ => bytes.len(),
            };
            let from = usize::try_from(offset).unwrap();
            if image.len() < from + kept {
                image.resize(from + kept, 0);
            }
            image[from..from + kept].copy_from_slice(&bytes[..kept]);
        }
        // Length is metadata, which file systems keep apart from data: here it is what it last was.
        image.resize(inner.current.len(), 0);
        inner.current.clone_from(&image);
        inner.synced = image;
        inner.crash_at = None;
        inner.crashed = false;
    }
}

impl Inner {
    fn operation(&mut self) -> io::Result<()> {
        if self.crash_at == Some(self.operations) {
            self.crashed = true;
        }
        if self.crashed {
            return Err(io::Error::other("the disk was pulled out"));
        }
        self.operations += 1;
        Ok(())
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(u64::try_from(self.lock().current.len()).unwrap())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let inner = self.lock();
        if inner.crashed {
            return Err(io::Error::other("the disk was pulled out"));
        }
        let from = usize::try_from(offset).unwrap();
        let bytes = inner.current.get(from..from + out.len());
        out.copy_from_slice(bytes.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut inner = self.lock();
        inner.operation()?;
        inner.current.resize(usize::try_from(len).unwrap(), 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut inner = self.lock();
        inner.operation()?;
        inner.synced = inner.current.clone();
        inner.unsynced.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut inner = self.lock();
        inner.operation()?;
        let from = usize::try_from(offset).unwrap();
        inner.current[from..from + data.len()].copy_from_slice(data);
        inner.unsynced.push((offset, data.to_vec()));
        Ok(())
    }
}
