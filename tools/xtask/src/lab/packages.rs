//! Debian packages that a lab uses without installing them: fetched by `apt-get`, unpacked beside what cargo builds.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow};

use crate::{command, repository, setup};

/// Where packages come from: what this machine's apt is set up with, or another suite of the same archive, with lists of its own.
#[derive(Debug, Clone, Default)]
pub(super) struct Archive {
    options: Vec<String>,
}

impl Archive {
    /// The backports of this machine's Debian release, without a change to the machine's apt. `None` if it is no Debian release that
    /// has an archive.
    ///
    /// # Errors
    /// When the lists cannot be fetched.
    pub(super) fn backports() -> Result<Option<Self>> {
        let os_release = std::fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
        let targets = command::read(
            Command::new("apt-get")
                .args(["indextargets", "--format", "$(REPO_URI) $(RELEASE)"])
                .arg("Created-By: Packages"),
        )?;
        let Some((address, release)) = release_archive(&os_release, &targets) else { return Ok(None) };
        let directory = repository::target_dir().join("lab/apt");
        let archive = Self { options: own_state(&directory) };
        for place in ["lists/partial", "cache/archives/partial"] {
            let place = directory.join(place);
            std::fs::create_dir_all(&place).with_context(|| format!("making {}", place.display()))?;
        }
        let source = format!("deb {address} {release}-backports main\n");
        std::fs::write(directory.join("sources.list"), source).context("writing sources.list")?;
        command::read(archive.apt("apt-get").args(["update", "-qq"]))
            .context("apt-get update: is the network there?")?;
        Ok(Some(archive))
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }

    /// What `apt-cache depends --important` says of a package.
    pub(super) fn dependencies(&self, package: &str) -> Result<String> {
        command::read(self.apt("apt-cache").args(["depends", "--important", package]))
    }

    /// Fetches the latest lists of this machine's apt. Another suite's were fetched just now.
    pub(super) fn refresh(&self) -> Result<()> {
        if !self.options.is_empty() {
            return Ok(());
        }
        command::watch(setup::as_root("apt-get")?.args(["update", "-qq"]))
            .context("apt-get update: is the network there?")
    }

    /// Fetches packages and unpacks them all into `directory`, which is there only once it is complete: `finish` makes it so.
    pub(super) fn unpack(
        &self,
        packages: &[&str],
        directory: &Path,
        finish: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let work = directory.with_extension("incomplete");
        let _absent = std::fs::remove_dir_all(&work);
        std::fs::create_dir_all(&work).with_context(|| format!("making {}", work.display()))?;
        let download =
            || command::read(self.apt("apt-get").args(["download", "-qq"]).args(packages).current_dir(&work));
        if download().is_err() {
            // Lists that are older than the archive name versions that are gone.
            self.refresh()?;
            download()?;
        }
        let archives: Vec<PathBuf> = std::fs::read_dir(&work)?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .collect();
        if archives.is_empty() {
            return Err(anyhow!("apt-get fetched no package into {}", work.display()));
        }
        for archive in archives {
            command::read(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&work))?;
            std::fs::remove_file(&archive).with_context(|| format!("removing {}", archive.display()))?;
        }
        finish(&work)?;
        std::fs::rename(&work, directory).with_context(|| format!("renaming {}", work.display()))
    }
}

/// Options that give apt its own sources, lists and cache below `directory`, and this machine's keys.
fn own_state(directory: &Path) -> Vec<String> {
    let settings = [
        ("Dir::Etc::sourcelist", "sources.list"),
        ("Dir::Etc::sourceparts", "none"),
        ("Dir::State::lists", "lists"),
        ("Dir::Cache", "cache"),
    ];
    let places = settings.map(|(name, place)| format!("{name}={}", directory.join(place).display()));
    // As root, apt would fetch as a user who may not write where a build goes.
    let all = places.into_iter().chain(["APT::Sandbox::User=root".to_owned()]);
    all.flat_map(|setting| ["-o".to_owned(), setting]).collect()
}

/// Address of the archive that this machine's release comes from, and the release's name.
fn release_archive(os_release: &str, targets: &str) -> Option<(String, String)> {
    let value = |name: &str| {
        let lines = os_release.lines().filter_map(|line| line.split_once('='));
        lines.filter(|(key, _)| *key == name).map(|(_, value)| value.trim_matches('"').to_owned()).next()
    };
    if value("ID")? != "debian" {
        return None;
    }
    let codename = value("VERSION_CODENAME")?;
    let address = targets.lines().find_map(|line| {
        let (address, release) = line.split_once(' ')?;
        (release == codename).then(|| address.to_owned())
    })?;
    Some((address, codename))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = "NAME=\"Debian GNU/Linux\"\nID=debian\nVERSION_CODENAME=bookworm\n";
    const TARGETS: &str =
        "https://archive.example/security/ bookworm-security\nhttps://archive.example/debian/ bookworm\n";

    #[test]
    fn the_archive_of_the_release_is_found() {
        let found = release_archive(DEBIAN, TARGETS);
        assert_eq!(found, Some(("https://archive.example/debian/".to_owned(), "bookworm".to_owned())));
        assert_eq!(release_archive("ID=ubuntu\nVERSION_CODENAME=noble\n", TARGETS), None);
        assert_eq!(release_archive(DEBIAN, ""), None);
    }
}
