//! A small image for tests: one static program and a handful of files; it boots in a moment.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::manifest::Config;
use crate::root::Root;
use crate::tool::{Tool, ToolError};

/// Where Debian's package busybox-static has it.
const PROGRAM: &str = "/bin/busybox";

/// What busybox starts: a console on the serial line, and an orderly end.
const INITTAB: &str = "\
::sysinit:/etc/init.d/rcS
ttyS0::respawn:/sbin/getty -n -l /bin/sh -L 115200 ttyS0 vt100
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/umount -a -r
";

/// What is mounted, unless our init did it already.
const RCS: &str = "\
#!/bin/sh
# Our init mounts these before it starts this one; another may not.
mounted() { grep -q \" $1 \" /proc/mounts; }
[ -e /proc/self ] || mount -t proc proc /proc
mounted /sys || mount -t sysfs sysfs /sys
mounted /dev || mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mounted /dev/pts || mount -t devpts devpts /dev/pts
mounted /dev/shm || mount -t tmpfs tmpfs /dev/shm
mounted /run || mount -t tmpfs tmpfs /run
ip link set lo up
[ -s /etc/hostname ] && hostname -F /etc/hostname
echo mashines: busybox is up
";

/// Files besides the program: path, content, mode.
const FILES: [(&str, &str, u32); 10] = [
    ("etc/inittab", INITTAB, 0o644),
    ("etc/init.d/rcS", RCS, 0o755),
    ("etc/hostname", "busybox\n", 0o644),
    ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n", 0o644),
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
        0o644,
    ),
    ("etc/shadow", "root:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n", 0o640),
    ("etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n", 0o644),
    ("etc/fstab", "", 0o644),
    ("etc/os-release", "NAME=busybox\nID=busybox\nPRETTY_NAME=\"busybox on mashines\"\n", 0o644),
    ("etc/profile", "export PATH=/usr/sbin:/usr/bin:/sbin:/bin\nexport PS1='\\h:\\w\\$ '\n", 0o644),
];

/// Why there is no busybox.
#[derive(Debug, thiserror::Error)]
pub enum BusyboxError {
    /// It is not there.
    #[error("there is no {PROGRAM} (Debian package busybox-static)")]
    Missing(#[source] io::Error),
    /// It does not run.
    #[error("busybox does not say what it can do")]
    Tool(#[from] ToolError),
    /// It needs libraries.
    #[error("{} needs a dynamic loader", .0.display())]
    Dynamic(PathBuf),
    /// A file cannot be written.
    #[error("the image's files cannot be written")]
    Write(#[source] io::Error),
}

/// Fills a tree.
///
/// # Errors
/// [`BusyboxError`].
pub fn fill(root: &Root) -> Result<Config, BusyboxError> {
    let program = fs::read(PROGRAM).map_err(BusyboxError::Missing)?;
    if crate::elf::kind(&program) != Some(crate::elf::Elf::Static) {
        return Err(BusyboxError::Dynamic(PathBuf::from(PROGRAM)));
    }
    let applets = Tool::new(PROGRAM, "busybox-static").arg("--list-full").run()?;
    let write = || -> io::Result<()> {
        for directory in [
            "bin", "sbin", "usr/bin", "usr/sbin", "dev", "proc", "sys", "run", "tmp", "root", "etc", "mnt",
            "var/log", "home",
        ] {
            root.make_directory(directory.as_ref())?;
        }
        root.write("bin/busybox", &program, 0o755)?;
        for applet in String::from_utf8_lossy(&applets).lines() {
            let plain = applet.split('/').all(|part| !part.is_empty() && part != "..");
            if plain && applet != "bin/busybox" {
                root.link(applet, "/bin/busybox")?;
            }
        }
        for (path, content, mode) in FILES {
            root.write(path, content.as_bytes(), mode)?;
        }
        root.mode("tmp", 0o1777)?;
        root.mode("root", 0o700)
    };
    write().map_err(BusyboxError::Write)?;
    Ok(Config {
        entrypoint: vec!["/sbin/init".to_owned()],
        env: vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned()],
        ..Config::default()
    })
}
