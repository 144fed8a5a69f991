//! Debian 12, built from its packages by mmdebstrap: systemd, ssh, cron, and Docker or Podman.
//!
//! Nothing in an image may be the same in two machines that are made of it: host keys, the machine's id and seeds of randomness
//! are removed, and made at first boot.

use std::io;
use std::path::Path;
use std::str::FromStr;

use crate::manifest::Config;
use crate::progress::Progress;
use crate::root::{self, Root};
use crate::tool::{Tool, ToolError};

/// The release that is built.
const SUITE: &str = "bookworm";

/// What each flavour has.
const ALWAYS: &str = "systemd,systemd-sysv,libpam-systemd,dbus,udev,kmod,iproute2,iputils-ping,netbase,procps,\
openssh-server,cron,ca-certificates,less,e2fsprogs,util-linux,bash,passwd,gzip,tar";
/// What the flavours with containers have besides.
const CONTAINERS: &str = "iptables,nftables,curl,rsync,xz-utils,vim-tiny,sudo,git";

/// What is for containers in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// Docker's daemon and docker-compose.
    Dockerd,
    /// Podman, which needs no daemon.
    Podman,
    /// Nothing.
    Minimal,
}

impl Flavour {
    /// All flavours.
    pub const ALL: [Self; 3] = [Self::Dockerd, Self::Podman, Self::Minimal];

    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Dockerd => "dockerd",
            Self::Podman => "podman",
            Self::Minimal => "minimal",
        }
    }

    const fn packages(self) -> &'static str {
        match self {
            // Kernels of Debian have AppArmor on: without its parser dockerd starts no container.
            Self::Dockerd => "docker.io,docker-compose,containerd,runc,apparmor",
            Self::Podman => {
                "podman,crun,slirp4netns,fuse-overlayfs,uidmap,netavark,aardvark-dns,podman-compose"
            }
            Self::Minimal => "",
        }
    }
}

impl FromStr for Flavour {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|flavour| flavour.as_str() == text)
            .ok_or_else(|| format!("`{text}` is no flavour; give dockerd, podman or minimal"))
    }
}

/// Host keys that a machine makes for itself, before its ssh server starts.
const HOST_KEYS_UNIT: &str = "\
[Unit]
Description=Make this machine's SSH host keys
ConditionPathExistsGlob=!/etc/ssh/ssh_host_*_key
Before=ssh.service
After=local-fs.target systemd-random-seed.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/ssh-keygen -A

[Install]
WantedBy=multi-user.target
RequiredBy=ssh.service
";

/// Root comes in by key only; keys are written by the agent.
const SSHD: &str = "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUseDNS no\n";

/// Memory, power and migration are the host's business; the machine's console shows the journal of its start only.
const JOURNAL: &str = "[Journal]\nSystemMaxUse=64M\n";

/// Forwarding, as containers need it.
const SYSCTL: &str = "net.ipv4.ip_forward = 1\nnet.ipv6.conf.all.forwarding = 1\n";

/// A machine's disk is an image with a layer of its own: the overlay driver works on it.
const DOCKER: &str = "{\n  \"storage-driver\": \"overlay2\",\n  \"log-driver\": \"json-file\",\n  \"log-opts\": { \"max-size\": \"10m\", \"max-file\": \"3\" }\n}\n";

/// Units that a machine has no use for: its network is set up by the agent, its clock follows the host's.
const MASKED: [&str; 6] = [
    "systemd-networkd-wait-online.service",
    "systemd-timesyncd.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
];

/// Why there is no Debian.
#[derive(Debug, thiserror::Error)]
pub enum DebianError {
    /// mmdebstrap said no.
    #[error("Debian cannot be put together")]
    Tool(#[from] ToolError),
    /// A package name that is none.
    #[error("`{0}` is not the name of a Debian package")]
    Package(String),
    /// A file cannot be written.
    #[error("the image's files cannot be written")]
    Write(#[from] io::Error),
}

/// A package's name, as Debian's policy has it.
fn is_package(name: &str) -> bool {
    let fitting = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"+-.".contains(&byte);
    name.len() >= 2
        && name.bytes().all(fitting)
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
}

/// The packages of a flavour, with more.
///
/// # Errors
/// When one of `more` is no package's name.
pub fn packages(flavour: Flavour, more: &[String]) -> Result<Vec<String>, DebianError> {
    if let Some(bad) = more.iter().find(|name| !is_package(name)) {
        return Err(DebianError::Package(bad.clone()));
    }
    let containers = if flavour == Flavour::Minimal { "" } else { CONTAINERS };
    let own = [ALWAYS, containers, flavour.packages()];
    let own = own.iter().flat_map(|list| list.split(',')).filter(|name| !name.is_empty());
    let mut all: Vec<String> = own.map(str::to_owned).chain(more.iter().cloned()).collect();
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// Builds Debian in `directory`, which must not exist.
///
/// # Errors
/// [`DebianError`].
pub fn fill(
    directory: &Path,
    flavour: Flavour,
    more: &[String],
    progress: &dyn Progress,
) -> Result<(Root, Config), DebianError> {
    let packages = packages(flavour, more)?;
    progress.step(&format!("installing Debian 12 with {} packages and what they need", packages.len()));
    Tool::new("mmdebstrap", "mmdebstrap")
        .args(["--mode=root", "--format=directory", "--variant=minbase", "--components=main"])
        .arg(format!("--include={}", packages.join(",")))
        .arg(SUITE)
        .arg(directory)
        .run()?;
    let root = Root::open(directory)?;
    progress.step("preparing Debian for many machines");
    settle(&root, flavour)?;
    let config = Config {
        entrypoint: vec!["/sbin/init".to_owned()],
        env: vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()],
        stop_signal: "SIGRTMIN+4".to_owned(),
        exposed_ports: vec!["22/tcp".to_owned()],
        ..Config::default()
    };
    Ok((root, config))
}

/// Takes out what must be a machine's own, and puts in what makes it one of ours.
fn settle(root: &Root, flavour: Flavour) -> io::Result<()> {
    let ssh = root.make_directory("etc/ssh".as_ref())?;
    root::clear(std::os::fd::AsFd::as_fd(&ssh), |name| {
        let name = name.to_string_lossy();
        name.starts_with("ssh_host_")
    })?;
    for gone in [
        "var/lib/dbus/machine-id",
        "var/lib/systemd/random-seed",
        "etc/resolv.conf",
        "var/log/alternatives.log",
    ] {
        root.remove(gone)?;
    }
    for emptied in
        ["var/log/apt", "var/cache/apt", "var/lib/apt/lists", "tmp", "run", "var/cache/ldconfig", "dev"]
    {
        root.empty(emptied)?;
    }
    // systemd takes this for a first boot, and makes an id.
    root.write("etc/machine-id", b"uninitialized\n", 0o444)?;
    root.write("etc/hostname", b"debian\n", 0o644)?;
    root.write("etc/hosts", b"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n", 0o644)?;
    root.write("etc/resolv.conf", b"", 0o644)?;
    root.write("etc/fstab", b"# The root is mounted by init.\n", 0o644)?;
    root.write("etc/ssh/sshd_config.d/mashines.conf", SSHD.as_bytes(), 0o644)?;
    root.write("etc/systemd/journald.conf.d/mashines.conf", JOURNAL.as_bytes(), 0o644)?;
    let units = "etc/systemd/system";
    root.write(&format!("{units}/mashines-host-keys.service"), HOST_KEYS_UNIT.as_bytes(), 0o644)?;
    for wanting in ["multi-user.target.wants", "ssh.service.requires"] {
        root.link(&format!("{units}/{wanting}/mashines-host-keys.service"), "../mashines-host-keys.service")?;
    }
    for unit in MASKED {
        root.link(&format!("{units}/{unit}"), "/dev/null")?;
    }
    if flavour != Flavour::Minimal {
        root.write("etc/sysctl.d/90-mashines.conf", SYSCTL.as_bytes(), 0o644)?;
    }
    if flavour == Flavour::Dockerd {
        root.write("etc/docker/daemon.json", DOCKER.as_bytes(), 0o644)?;
        root.write("etc/modules-load.d/mashines.conf", b"overlay\nbr_netfilter\n", 0o644)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flavours_have_their_packages() {
        let has = |flavour, name: &str| packages(flavour, &[]).unwrap().iter().any(|package| package == name);
        assert!(has(Flavour::Dockerd, "docker.io") && has(Flavour::Dockerd, "iptables"));
        assert!(has(Flavour::Podman, "podman") && !has(Flavour::Podman, "docker.io"));
        assert!(!has(Flavour::Minimal, "podman") && has(Flavour::Minimal, "openssh-server"));
        let more = packages(Flavour::Minimal, &["postgresql".to_owned(), "cron".to_owned()]).unwrap();
        assert_eq!(more.iter().filter(|name| *name == "cron").count(), 1);
        assert!(more.contains(&"postgresql".to_owned()));
    }

    #[test]
    fn what_is_no_package_is_refused() {
        for bad in ["", "a", "-x", "--include=x", "a,b", "a b", "../x", "A", "./local.deb"] {
            let error = packages(Flavour::Minimal, &[bad.to_owned()]).unwrap_err();
            assert!(matches!(error, DebianError::Package(_)), "{bad}");
        }
        assert!("docker".parse::<Flavour>().is_err());
    }

    #[test]
    fn nothing_of_one_machine_stays() {
        let temporary = tempfile::tempdir().unwrap();
        let root = root::new(&temporary.path().join("root")).unwrap();
        for file in [
            "etc/ssh/ssh_host_rsa_key",
            "etc/ssh/ssh_host_rsa_key.pub",
            "var/lib/systemd/random-seed",
            "etc/ssh/sshd_config",
        ] {
            root.write(file, b"x", 0o600).unwrap();
        }
        root.write("etc/machine-id", b"0123", 0o444).unwrap();
        settle(&root, Flavour::Dockerd).unwrap();
        for gone in
            ["etc/ssh/ssh_host_rsa_key", "etc/ssh/ssh_host_rsa_key.pub", "var/lib/systemd/random-seed"]
        {
            assert!(!root.has(gone), "{gone}");
        }
        assert!(root.has("etc/ssh/sshd_config") && root.has("etc/docker/daemon.json"));
        assert_eq!(root.read("etc/machine-id".as_ref(), 100).unwrap(), b"uninitialized\n");
        assert!(root.has("etc/systemd/system/ssh.service.requires/mashines-host-keys.service"));
    }
}
