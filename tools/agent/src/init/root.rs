//! Mounting, and moving from the initramfs to the image's root.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::mount::{MountFlags, mount, mount_move};

use super::config::Volume;
use super::device;
use crate::say;

/// Where the image's root is mounted while we are still in the initramfs.
pub const NEW_ROOT: &str = "/newroot";
/// File systems that a volume may hold.
const VOLUME_KINDS: [&str; 3] = ["ext4", "xfs", "btrfs"];
/// A disk whose first bytes are all zero holds neither a file system nor a partition table: the last mark among those that we could mount is btrfs's, at 64 KiB.
const BLANK_BYTES: usize = 1 << 20;

fn mount_kind(what: &str, place: &str, kind: &str, flags: MountFlags, options: &str) -> io::Result<()> {
    let options = CString::new(options).map_err(io::Error::from)?;
    Ok(mount(what, place, kind, flags, options.as_c_str())?)
}

/// The kernel's own file systems.
pub fn mount_basics() {
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let device = MountFlags::NOSUID;
    let all = [
        ("proc", "/proc", "proc", plain, ""),
        ("sysfs", "/sys", "sysfs", plain, ""),
        ("devtmpfs", "/dev", "devtmpfs", device, "mode=0755"),
        // The agent opens terminals from its first moment on, which is before the image's init mounts anything.
        (
            "devpts",
            "/dev/pts",
            "devpts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            "gid=5,mode=620,ptmxmode=000",
        ),
        ("tmpfs", "/run", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=0755"),
    ];
    for (what, place, kind, flags, options) in all {
        let made = fs::create_dir_all(place).and_then(|()| mount_kind(what, place, kind, flags, options));
        // The kernel may have mounted /dev already.
        if let Err(error) =
            made.or_else(|e| if e.raw_os_error() == Some(libc::EBUSY) { Ok(()) } else { Err(e) })
        {
            say!("mounting {place}: {error}");
        }
    }
}

/// Shared memory and control groups, for images that have no init to mount them.
pub fn mount_rest() {
    let shared = MountFlags::NOSUID | MountFlags::NODEV;
    for (what, place, kind, flags, options) in [
        ("tmpfs", "/dev/shm", "tmpfs", shared, "mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", shared, ""),
    ] {
        let made = fs::create_dir_all(place).and_then(|()| mount_kind(what, place, kind, flags, options));
        if let Err(error) = made {
            say!("mounting {place}: {error}");
        }
    }
}

/// Mounts the image's root, and lets it fill its device.
///
/// # Errors
/// The kernel's.
pub fn mount_root(device: &str, kind: &str, read_only: bool) -> io::Result<()> {
    fs::create_dir_all(NEW_ROOT)?;
    let flags = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    mount_kind(device, NEW_ROOT, kind, flags, "")?;
    if !read_only
        && kind == "ext4"
        && let Err(error) = device::grow(Path::new(device), Path::new(NEW_ROOT))
    {
        say!("growing the root file system: {error}");
    }
    Ok(())
}

/// Makes the mounted image the root of everything, and frees the initramfs.
///
/// # Errors
/// The kernel's.
pub fn switch() -> io::Result<()> {
    for place in ["/proc", "/sys", "/dev", "/run"] {
        let target = format!("{NEW_ROOT}{place}");
        // On a root that is read-only and has no such directory it cannot be had.
        let moved = fs::create_dir_all(&target).and_then(|()| Ok(mount_move(place, target.as_str())?));
        if let Err(error) = moved {
            say!("moving {place}: {error}");
        }
    }
    let device = fs::metadata("/")?.dev();
    clear(Path::new("/"), device);
    rustix::process::chdir(NEW_ROOT)?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    Ok(())
}

/// Deletes what is on the initramfs: it is memory that nobody would use again. Never leaves the file system.
fn clear(directory: &Path, device: u64) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if metadata.dev() != device {
            continue;
        }
        if metadata.is_dir() {
            clear(&path, device);
            let _ = fs::remove_dir(&path);
        } else {
            let _ = fs::remove_file(&path);
        }
    }
}

/// Mounts a volume; a blank disk is formatted first, with the image's own tools.
///
/// # Errors
/// When it holds something that cannot be mounted, or cannot be formatted.
pub fn mount_volume(volume: &Volume) -> io::Result<()> {
    let (device, place) = (volume.device.as_str(), volume.mountpoint.as_str());
    if !place.starts_with('/') || Path::new(place).components().any(|part| part.as_os_str() == "..") {
        return Err(io::Error::other("the mount point is not an absolute path"));
    }
    fs::create_dir_all(place)?;
    let attempt = || {
        let mut last = io::Error::from(io::ErrorKind::Unsupported);
        for kind in VOLUME_KINDS {
            match mount_kind(device, place, kind, MountFlags::empty(), "") {
                Ok(()) => {
                    if kind == "ext4" {
                        let _ = device::grow(Path::new(device), Path::new(place));
                    }
                    return Ok(());
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    attempt().or_else(|error| {
        if !is_blank(device)? {
            return Err(error);
        }
        let mut format = Command::new("mkfs.ext4");
        format.args(["-q", "-F", device]).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
        let status = format.stdin(Stdio::null()).stdout(Stdio::null()).status()?;
        if status.success() { attempt() } else { Err(io::Error::other(format!("mkfs.ext4: {status}"))) }
    })
}

fn is_blank(device: &str) -> io::Result<bool> {
    use std::io::Read as _;
    let mut bytes = Vec::with_capacity(BLANK_BYTES);
    fs::File::open(device)?.take(BLANK_BYTES as u64).read_to_end(&mut bytes)?;
    Ok(bytes.iter().all(|&byte| byte == 0))
}
