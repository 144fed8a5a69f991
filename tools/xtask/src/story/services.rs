//! What the guest is made to do, as far as its image has it: PostgreSQL that clients may use, a container that counts.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::pgbench::DATABASE;
use super::session::COUNT;
use super::site::Guest;
use crate::command;

/// Prints which of these programs the guest has.
const LOOK: &str = "PATH=$PATH:/usr/sbin:/sbin; for p in sshd pg_ctlcluster docker podman; do \
                    command -v $p > /dev/null && echo $p; done; true";
/// Name of the container and of its image.
const CONTAINER: &str = "story";

/// What a guest has for the story.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Abilities {
    /// An ssh server.
    pub ssh: bool,
    /// PostgreSQL, as Debian packages it.
    pub postgresql: bool,
    /// Its program for containers.
    pub containers: Option<&'static str>,
}

impl Abilities {
    /// Asks the guest.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn of(guest: &Guest) -> Result<Self> {
        Ok(Self::parse(&guest.run(LOOK)?))
    }

    /// What the long form needs and the guest lacks.
    pub fn missing(&self) -> Vec<&'static str> {
        let needs = [
            ("an ssh server", self.ssh),
            ("PostgreSQL", self.postgresql),
            ("docker or podman", self.containers.is_some()),
        ];
        needs.into_iter().filter_map(|(what, there)| (!there).then_some(what)).collect()
    }

    fn parse(text: &str) -> Self {
        let has = |program: &str| text.lines().any(|line| line.trim() == program);
        Self {
            ssh: has("sshd"),
            postgresql: has("pg_ctlcluster"),
            containers: ["docker", "podman"].into_iter().find(|program| has(program)),
        }
    }
}

/// Lets clients use PostgreSQL, and makes their database. Vacuuming by itself is off: its processes come and go, and those that
/// are there are to be compared.
///
/// # Errors
/// When the guest's PostgreSQL does not start.
pub fn open_postgresql(guest: &Guest) -> Result<()> {
    let script = format!(
        "set -e; dir=$(ls -d /etc/postgresql/*/main | tail -1); version=$(basename $(dirname $dir)); \
         printf \"listen_addresses = '*'\\nautovacuum = off\\n\" > $dir/conf.d/story.conf; \
         printf 'host all all 0.0.0.0/0 trust\\nhost all all ::/0 trust\\n' >> $dir/pg_hba.conf; \
         systemctl restart postgresql@$version-main; \
         cd /; su postgres -c 'createuser --superuser {DATABASE}; createdb --owner {DATABASE} {DATABASE}'"
    );
    guest.run(&script).context("setting PostgreSQL up in the guest").map(drop)
}

/// Imports a container image that is made here, of a static busybox and nothing else, and starts a container that counts.
///
/// # Errors
/// When the guest's engine refuses it.
pub fn start_container(guest: &Guest, engine: &str, directory: &Path) -> Result<()> {
    let archive = image_archive(directory)?;
    let mut import = guest.exec(&format!("{engine} import - {CONTAINER}:local"));
    let input = File::open(&archive).with_context(|| format!("opening {}", archive.display()))?;
    let output = import.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped()).output();
    let output = output.with_context(|| format!("starting `{}`", command::shown(&import)))?;
    if !output.status.success() {
        bail!("`{engine} import` in the guest: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let script = format!(
        "{engine} run --detach --name {CONTAINER} {CONTAINER}:local /bin/busybox sh -c '{}'",
        COUNT.replace("sleep 0.2", "/bin/busybox sleep 0.2")
    );
    guest.run(&script).context("starting a container in the guest").map(drop)
}

/// How far the container has counted.
///
/// # Errors
/// When it does not run any more, or a number is missing.
pub fn container_count(guest: &Guest, engine: &str) -> Result<usize> {
    let running = guest.run(&format!("{engine} inspect --format '{{{{.State.Running}}}}' {CONTAINER}"))?;
    if running.trim() != "true" {
        bail!("the container does not run any more");
    }
    let text = guest.run(&format!("{engine} logs {CONTAINER}"))?;
    for (expected, line) in text.lines().enumerate() {
        if line.trim().parse() != Ok(expected) {
            bail!("the container printed {line:?} in the place of {expected}");
        }
    }
    Ok(text.lines().count())
}

/// A root file system with busybox, as a tar file in `directory`.
fn image_archive(directory: &Path) -> Result<std::path::PathBuf> {
    let busybox = command::locate("busybox").context("there is no busybox: install busybox-static")?;
    let bin = directory.join("container/bin");
    std::fs::create_dir_all(&bin).with_context(|| format!("making {}", bin.display()))?;
    std::fs::copy(&busybox, bin.join("busybox")).context("copying busybox")?;
    let archive = directory.join("container.tar");
    let mut tar = Command::new("tar");
    tar.arg("-cf").arg(&archive).arg("-C").arg(directory.join("container")).arg("bin");
    command::read(&mut tar)?;
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_has_is_read() {
        let abilities = Abilities::parse("sshd\npg_ctlcluster\r\npodman\n");
        assert!(abilities.ssh && abilities.postgresql);
        assert_eq!(abilities.containers, Some("podman"));
        assert!(abilities.missing().is_empty());
        assert_eq!(Abilities::parse(""), Abilities::default());
        assert_eq!(Abilities::parse("sshd\ndocker").missing(), ["PostgreSQL"]);
    }
}
