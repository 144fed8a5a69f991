//! The identity of what a host knows: its state directory.
//!
//! Whether a machine may have run here is written in the state directory (`vm/claim.rs`). A directory that is gone, with a
//! tmpfs and the host's power or by an operator's hand, takes that along; the next `mashined` would promise in good faith that no such machine ever
//! ran. So the directory has an identity, made with it, that the control plane was told before the machine came.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use rustix::rand::GetRandomFlags;
use wire::ids::StateId;

use crate::vm::{VmmError, file_error};

/// The identity of the directory `state`; made, and synced, where there is none that can be read.
///
/// # Errors
/// [`VmmError::File`].
pub(super) fn of(state: &Path) -> Result<StateId, VmmError> {
    let path = state.join("id");
    if let Some(id) = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok()) {
        return Ok(id);
    }
    let mut random = [0; 8];
    // So few bytes come all at once or not at all.
    rustix::rand::getrandom(&mut random, GetRandomFlags::empty())
        .map_err(|error| file_error("make", &path)(error.into()))?;
    let id = StateId::from_u64(u64::from_le_bytes(random));
    let new = state.join("id.new");
    let write = || {
        let mut file = File::create(&new)?;
        writeln!(file, "{id}")?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(state)?.sync_all()
    };
    write().map_err(file_error("write", &path))?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_keeps_its_identity_and_another_has_another() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = of(one.path()).unwrap();
        assert_eq!(of(one.path()).unwrap(), id);
        assert_ne!(of(other.path()).unwrap(), id);
        fs::write(one.path().join("id"), "").unwrap();
        assert_ne!(of(one.path()).unwrap(), id, "what cannot be read is made anew");
    }
}
