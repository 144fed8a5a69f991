//! The QEMU that emulates lab hosts.
//!
//! With QEMU 7.2 a host ran a Linux machine of two vCPUs for 2 to 14 minutes: then the machine reset itself without a word, or the host's
//! kernel took a timer interrupt right behind VMRUN, with the guest's segment registers. With QEMU 10 it goes on. So an older one gives way
//! to the one in the backports of the Debian release, which is unpacked and not installed.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::packages::Archive;
use crate::{command, repository};

/// The program.
pub(super) const PROGRAM: &str = "qemu-system-x86_64";
/// The oldest major version under which hosts and their machines last.
const STEADY: u32 = 10;
/// Packages with the program and its firmware; its libraries are those of the installed QEMU.
const PACKAGES: [&str; 4] = ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"];

/// Finds or fetches the emulator. The installed one is better than none.
pub(super) fn provide() -> Result<PathBuf> {
    let installed = command::locate(PROGRAM).with_context(|| format!("there is no {PROGRAM}"))?;
    if major_version(&installed)? >= STEADY {
        return Ok(installed);
    }
    match backported() {
        Ok(Some(program)) => return Ok(program),
        Ok(None) => eprintln!("lab: this system's packages have no QEMU {STEADY} or later"),
        Err(error) => eprintln!("lab: QEMU {STEADY} or later cannot be had: {error:#}"),
    }
    eprintln!(
        "lab: going on with {}, under which hosts and their machines may crash after some minutes",
        installed.display()
    );
    Ok(installed)
}

fn backported() -> Result<Option<PathBuf>> {
    let directory = repository::target_dir().join("lab/qemu");
    let program = directory.join("usr/bin").join(PROGRAM);
    if !program.exists() {
        let Some(archive) = Archive::backports()? else { return Ok(None) };
        eprintln!("lab: fetching a newer QEMU, the emulator of lab hosts (it is unpacked, not installed)");
        archive.unpack(&PACKAGES, &directory, |_| Ok(()))?;
    }
    Ok((major_version(&program)? >= STEADY).then_some(program))
}

fn major_version(program: &Path) -> Result<u32> {
    let text = command::read(Command::new(program).arg("--version"))?;
    parse_major(&text).with_context(|| format!("{} tells no version: {text}", program.display()))
}

/// 7, in `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)`.
fn parse_major(text: &str) -> Option<u32> {
    let (_, version) = text.split_once("version ")?;
    version.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(parse_major("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\n"), Some(7));
        assert_eq!(parse_major("QEMU emulator version 10.0.2\nCopyright"), Some(10));
        assert_eq!(parse_major("something else"), None);
    }
}
