//! Packages of the distribution that are unpacked into a directory and never installed: their services do not start, their files are
//! in nobody's way.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow};

use crate::{command, setup};

/// Fetches `package` without what it depends on, unpacks it, and lets `finish` add to it. `directory` is there afterwards, whole, or not at
/// all; one that is there already is left alone.
///
/// # Errors
/// When apt does not find the package, cannot fetch it, or `finish` fails.
pub fn unpack(package: &str, directory: &Path, finish: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if directory.exists() {
        return Ok(());
    }
    eprintln!("setup: fetching {package} (it is unpacked, not installed)");
    let work = directory.with_extension("incomplete");
    let _left_by_a_crash = std::fs::remove_dir_all(&work);
    std::fs::create_dir_all(&work).with_context(|| format!("making {}", work.display()))?;
    let download =
        || command::read(Command::new("apt-get").args(["download", "-qq", package]).current_dir(&work));
    if download().is_err() {
        // Lists that are older than the archive name a version that is gone.
        setup::update_lists()?;
        download()?;
    }
    let archive = std::fs::read_dir(&work)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    let archive = archive.ok_or_else(|| anyhow!("apt-get fetched no package into {}", work.display()))?;
    command::read(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&work))?;
    std::fs::remove_file(&archive).with_context(|| format!("removing {}", archive.display()))?;
    finish(&work)?;
    std::fs::rename(&work, directory).with_context(|| format!("renaming {}", work.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let touched = |_: &Path| -> Result<()> { Err(anyhow!("fetched again")) };
        unpack("no-such-package", directory.path(), touched).unwrap();
    }
}
