//! Whether a machine that was moved here may have run, told to a later `mashined`.
//!
//! A copy that never ran can be given up, and the source takes the machine back from where it was paused. One that ran cannot: the world
//! has seen what it did since, and its memory is gone. The VMM knows which it is, as long as it lives. For a VMM that died with its
//! `mashined`, a file in the machine's directory tells:
//!
//! ```text
//! STATE/vms/m-0123456789abcdef/claim     "- 7 BOOT-ID": epoch 7 is awaited; from just before the order to run, "+ 7 BOOT-ID"
//! STATE/lost/m-0123456789abcdef          "7": it may have run here under epoch 7, and was lost
//! ```
//!
//! What a killed process has written stays. A host that loses power forgets the latest of it, but not the boot id that was synced before
//! the source could send anything: a claim of another boot counts as one that ran. So the pause waits for no disk.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use wire::ids::{Epoch, MachineId};

use super::{VmmError, file_error};

const AWAITED: &str = "-";
const RAN: &str = "+";

/// The open claim of a machine that is awaited.
#[derive(Debug)]
pub struct Claim(File);

impl Claim {
    /// Writes and syncs the claim at `path` for a machine that is to run under `epoch`. Blocks.
    ///
    /// # Errors
    /// [`VmmError::File`].
    pub fn create(path: &Path, epoch: Epoch) -> Result<Self, VmmError> {
        let error = |what| file_error(what, path);
        let file = File::create(path).map_err(error("write"))?;
        let text = format!("{AWAITED} {} {}", epoch.0, boot_id());
        file.write_all_at(text.as_bytes(), 0).map_err(error("write"))?;
        file.sync_all().map_err(error("sync"))?;
        if let Some(directory) = path.parent() {
            File::open(directory).and_then(|d| d.sync_all()).map_err(error("sync the directory of"))?;
        }
        Ok(Self(file))
    }

    /// Says that the guest may run from now on. One write of one byte to the page cache.
    ///
    /// # Errors
    /// When it cannot be written; the guest must not be run then.
    pub fn run_begins(&self) -> std::io::Result<()> {
        self.0.write_all_at(RAN.as_bytes(), 0)
    }
}

/// The epoch under which the machine of the claim at `path` may have run. `None` without a claim: it was not moved here.
pub fn may_have_run(path: &Path) -> Option<Epoch> {
    let text = fs::read_to_string(path).ok()?;
    let mut words = text.split_whitespace();
    let (mark, epoch, boot) = (words.next()?, words.next()?, words.next()?);
    let is_awaited = mark == AWAITED && boot == boot_id();
    (!is_awaited).then_some(Epoch(epoch.parse().ok()?))
}

/// Changes with each boot of the host.
fn boot_id() -> String {
    // Without /proc there is no host to speak of; "unknown" is then the same for all its boots.
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_else(|_| "unknown".to_owned());
    id.trim().to_owned()
}

/// Machines that may have run on this host and were lost with it, until they run anywhere under a higher epoch.
#[derive(Debug)]
pub struct Lost {
    directory: PathBuf,
    epochs: BTreeMap<MachineId, Epoch>,
}

impl Lost {
    /// What is written under a host's state directory.
    pub fn open(state: &Path) -> Self {
        let directory = state.join("lost");
        let read = |entry: fs::DirEntry| {
            let machine = entry.file_name().to_str()?.parse().ok()?;
            let epoch = fs::read_to_string(entry.path()).ok()?.trim().parse().ok()?;
            Some((machine, Epoch(epoch)))
        };
        let epochs = fs::read_dir(&directory).into_iter().flatten().flatten().filter_map(read).collect();
        Self { directory, epochs }
    }

    /// Adds a machine. Blocks.
    ///
    /// # Errors
    /// [`VmmError::File`]: then only this daemon knows, not the next one.
    pub fn add(&mut self, machine: MachineId, epoch: Epoch) -> Result<(), VmmError> {
        self.epochs.insert(machine, epoch);
        let path = self.file(machine);
        fs::create_dir_all(&self.directory).map_err(file_error("create", &self.directory))?;
        fs::write(&path, epoch.0.to_string()).map_err(file_error("write", &path))
    }

    /// The epoch under which it was lost.
    pub fn get(&self, machine: MachineId) -> Option<Epoch> {
        self.epochs.get(&machine).copied()
    }

    /// The machine is to run here under `epoch`: what was lost under a lower one is history.
    pub fn forget_below(&mut self, machine: MachineId, epoch: Epoch) {
        if self.get(machine).is_some_and(|lost| lost < epoch) {
            self.epochs.remove(&machine);
            // One that stays is read again by the next daemon, and means nothing beside a higher epoch.
            let _stays = fs::remove_file(self.file(machine));
        }
    }

    fn file(&self, machine: MachineId) -> PathBuf {
        self.directory.join(machine.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_tells_whether_the_guest_may_have_run() {
        let state = tempfile::tempdir().unwrap();
        let path = state.path().join("claim");
        assert_eq!(may_have_run(&path), None, "no claim");
        let claim = Claim::create(&path, Epoch(7)).unwrap();
        assert_eq!(may_have_run(&path), None, "awaited");
        claim.run_begins().unwrap();
        assert_eq!(may_have_run(&path), Some(Epoch(7)));
    }

    #[test]
    fn a_claim_of_an_earlier_boot_counts_as_one_that_ran() {
        let state = tempfile::tempdir().unwrap();
        let path = state.path().join("claim");
        fs::write(&path, "- 3 00000000-0000-4000-8000-000000000000").unwrap();
        assert_eq!(may_have_run(&path), Some(Epoch(3)));
    }

    #[test]
    fn the_lost_are_remembered_until_a_higher_epoch() {
        let (state, machine) = (tempfile::tempdir().unwrap(), MachineId::from_u64(7));
        Lost::open(state.path()).add(machine, Epoch(4)).unwrap();
        let mut lost = Lost::open(state.path());
        lost.forget_below(machine, Epoch(4));
        assert_eq!(lost.get(machine), Some(Epoch(4)));
        lost.forget_below(machine, Epoch(5));
        assert_eq!(lost.get(machine), None);
        assert_eq!(Lost::open(state.path()).get(machine), None);
    }
}
