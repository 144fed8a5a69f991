//! Files go into the guest and come back as they were: by way of the agent, and by ssh where there is a server.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::site::Guest;
use crate::command;

/// Size of the file, in bytes: some messages of the agent's, and not a whole number of them.
const FILE_BYTES: usize = (1 << 20) + 12_345;

/// Copies a file there and back, and compares.
///
/// # Errors
/// When a copy fails, or is another file.
pub fn there_and_back(guest: &Guest, directory: &Path, ssh: bool) -> Result<()> {
    let (here, back) = (directory.join("copied"), directory.join("copied-back"));
    let bytes: Vec<u8> = (0..FILE_BYTES).map(|place| (place * 31 % 251).to_le_bytes()[0]).collect();
    fs::write(&here, &bytes).with_context(|| format!("writing {}", here.display()))?;
    let (from, to) = (here.display().to_string(), back.display().to_string());
    command::read(&mut guest.copy(&from, &guest.path("/tmp/copied")))?;
    let mut sources = vec!["/tmp/copied"];
    if ssh {
        guest.among_clients(|| command::read(&mut guest.scp(&from, "/tmp/copied-by-ssh")))??;
        sources.push("/tmp/copied-by-ssh");
    }
    for source in sources {
        command::read(&mut guest.copy(&guest.path(source), &to))?;
        if fs::read(&back).with_context(|| format!("reading {}", back.display()))? != bytes {
            bail!("{source} came back as another file");
        }
        fs::remove_file(&back).with_context(|| format!("removing {}", back.display()))?;
    }
    fs::remove_file(&here).with_context(|| format!("removing {}", here.display()))
}
