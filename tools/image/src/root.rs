//! The file tree of an image while it is made.
//!
//! An image's tree is foreign: its symbolic links may point anywhere. Every path is resolved by the kernel with the tree as its root
//! (`openat2`), as it will be in the machine, so that nothing outside can be read or written, whatever the links say.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, chownat, fchmod,
    mkdirat, open, openat, openat2, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

/// Directories below each other that are removed; deeper trees cannot be made either, by the limit of paths.
const DEPTH_MAX: usize = 4096;

/// A tree.
#[derive(Debug)]
pub struct Root {
    directory: OwnedFd,
    path: PathBuf,
}

/// Path components below the tree's root, without `.`; `..` and what is no name are refused.
///
/// # Errors
/// The path, when it climbs.
pub fn components(path: &Path) -> Result<Vec<&OsStr>, PathBuf> {
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name),
            Component::CurDir => {}
            Component::RootDir | Component::ParentDir | Component::Prefix(_) => return Err(path.to_owned()),
        }
    }
    Ok(names)
}

impl Root {
    /// The tree in a directory.
    ///
    /// # Errors
    /// When it is none.
    pub fn open(path: &Path) -> io::Result<Self> {
        let directory =
            openat(CWD, path, OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY, Mode::empty())?;
        Ok(Self { directory, path: path.to_owned() })
    }

    /// Where the tree is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tree's own directory.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Opens a directory of the tree; links are followed as in the machine.
    ///
    /// # Errors
    /// When there is none.
    pub fn directory(&self, path: &Path) -> io::Result<OwnedFd> {
        self.resolve(path, OFlags::DIRECTORY | OFlags::RDONLY)
    }

    /// Opens a regular file of the tree for reading; links are followed as in the machine.
    ///
    /// # Errors
    /// When there is none.
    pub fn open_file(&self, path: &Path) -> io::Result<File> {
        // A pipe would be waited for.
        let file = File::from(self.resolve(path, OFlags::RDONLY | OFlags::NONBLOCK)?);
        if file.metadata()?.is_file() {
            return Ok(file);
        }
        Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))
    }

    /// Reads a regular file of the tree.
    ///
    /// # Errors
    /// When there is none, or it is longer than `bytes_max`.
    pub fn read(&self, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open_file(path)?.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > bytes_max {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(bytes)
    }

    /// Whether the path leads to something.
    pub fn has(&self, path: &str) -> bool {
        self.resolve(Path::new(path), OFlags::PATH).is_ok()
    }

    fn resolve(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let rules = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(openat2(&self.directory, path, flags | OFlags::CLOEXEC, Mode::empty(), rules)?)
    }

    /// Opens a directory and makes what is missing of it, owned by root.
    ///
    /// # Errors
    /// When something in the way is no directory.
    pub fn make_directory(&self, path: &Path) -> io::Result<OwnedFd> {
        let names = components(path).map_err(|path| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("{} climbs", path.display()))
        })?;
        let mut so_far = PathBuf::new();
        let mut directory = self.directory(Path::new("."))?;
        for name in names {
            so_far.push(name);
            directory = match self.directory(&so_far) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    mkdirat(&directory, name, Mode::from_raw_mode(0o755))?;
                    self.directory(&so_far)?
                }
                other => other?,
            };
        }
        Ok(directory)
    }

    fn parent<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        Ok((self.make_directory(path.parent().unwrap_or(Path::new("")))?, name))
    }

    /// Writes a file of root's, instead of whatever has its name.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &str, bytes: &[u8], mode: u32) -> io::Result<()> {
        self.write_from(Path::new(path), &mut &*bytes, mode)
    }

    /// Makes a new file of root's; its directory is made where it is missing.
    ///
    /// # Errors
    /// When there is something of that name.
    pub fn create(&self, path: &Path) -> io::Result<File> {
        let (parent, name) = self.parent(path)?;
        create(parent.as_fd(), name)
    }

    /// As [`Root::write`], from a reader.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn write_from(&self, path: &Path, from: &mut impl Read, mode: u32) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        remove(parent.as_fd(), name)?;
        let mut file = create(parent.as_fd(), name)?;
        io::copy(from, &mut file)?;
        file.flush()?;
        Ok(fchmod(&file, Mode::from_raw_mode(mode))?)
    }

    /// Sets the mode of a file or directory.
    ///
    /// # Errors
    /// When there is none.
    pub fn mode(&self, path: &str, mode: u32) -> io::Result<()> {
        let file = self.resolve(Path::new(path), OFlags::RDONLY | OFlags::NONBLOCK)?;
        Ok(fchmod(&file, Mode::from_raw_mode(mode))?)
    }

    /// Sets the times that are later than `latest` to `epoch`, so that two trees of the same files become the same disk.
    ///
    /// # Errors
    /// When a time cannot be set.
    pub fn settle_times(&self, latest: u64, epoch: u64) -> io::Result<()> {
        let whole = |seconds| i64::try_from(seconds).unwrap_or(i64::MAX);
        let latest = (whole(latest), whole(epoch));
        let mut pending = vec![(self.directory(Path::new("."))?, false)];
        while let Some((directory, entered)) = pending.pop() {
            if entered {
                settle(&directory, OsStr::new("."), latest)?;
                continue;
            }
            let mut inner = Vec::new();
            for name in names(directory.as_fd())? {
                if kind(directory.as_fd(), &name)? == Some(FileType::Directory) {
                    inner.push((open_below(directory.as_fd(), &name)?, false));
                } else {
                    settle(&directory, &name, latest)?;
                }
            }
            pending.push((directory, true));
            pending.append(&mut inner);
        }
        Ok(())
    }

    /// Makes a symbolic link, instead of whatever has its name.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn link(&self, path: &str, target: &str) -> io::Result<()> {
        let (parent, name) = self.parent(Path::new(path))?;
        remove(parent.as_fd(), name)?;
        symlinkat(target, &parent, name)?;
        Ok(chownat(&parent, name, Some(Uid::ROOT), Some(Gid::ROOT), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Removes a file or a tree, if it is there; a link is removed itself.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, path: &str) -> io::Result<()> {
        let path = Path::new(path);
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        match self.directory(path.parent().unwrap_or(Path::new(""))) {
            Ok(parent) => remove(parent.as_fd(), name),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Removes what is in a directory, if it is there.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn empty(&self, path: &str) -> io::Result<()> {
        match self.directory(Path::new(path)) {
            Ok(directory) => clear(directory.as_fd(), |_| true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Copies a directory of this machine into the tree, as root's: directories, regular files and symbolic links.
    ///
    /// # Errors
    /// When something cannot be copied.
    pub fn copy_from(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut pending = vec![(from.to_owned(), to.to_owned())];
        while let Some((from, to)) = pending.pop() {
            self.make_directory(&to)?;
            for entry in std::fs::read_dir(&from)? {
                let entry = entry?;
                let (kind, target) = (entry.file_type()?, to.join(entry.file_name()));
                if kind.is_dir() {
                    pending.push((entry.path(), target));
                } else if kind.is_symlink() {
                    let link = std::fs::read_link(entry.path())?;
                    let (parent, name) = self.parent(&target)?;
                    remove(parent.as_fd(), name)?;
                    symlinkat(&link, &parent, name)?;
                } else if kind.is_file() {
                    let mut file = File::open(entry.path())?;
                    let time = file.metadata()?.modified()?;
                    self.write_from(&target, &mut file, 0o644)?;
                    File::from(self.resolve(&target, OFlags::RDONLY)?).set_modified(time)?;
                }
            }
        }
        Ok(())
    }
}

/// Makes a new file in a directory; nothing is followed.
///
/// # Errors
/// When there is something of that name.
pub fn create(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<File> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
    Ok(openat(parent, name, flags, Mode::from_raw_mode(0o600))?.into())
}

/// Removes whatever has a name in a directory, if anything: a tree with all that is in it.
///
/// # Errors
/// When it cannot be removed.
pub fn remove(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    let inner = open_below(parent, name)?;
    clear(inner.as_fd(), |_| true)?;
    Ok(unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

/// Removes from a directory what `chosen` says of its entries.
///
/// # Errors
/// When something cannot be removed.
pub fn clear(directory: BorrowedFd<'_>, chosen: impl Fn(&OsStr) -> bool) -> io::Result<()> {
    for name in names(directory)?.into_iter().filter(|name| chosen(name)) {
        if unlinkat(directory, &name, AtFlags::empty()).is_ok() {
            continue;
        }
        empty_tree(open_below(directory, &name)?)?;
        unlinkat(directory, &name, AtFlags::REMOVEDIR)?;
    }
    Ok(())
}

/// Empties a tree without recursion, because its depth is a stranger's choice: one open directory for each level.
fn empty_tree(top: OwnedFd) -> io::Result<()> {
    let mut levels: Vec<(OwnedFd, Vec<OsString>)> = Vec::new();
    let listed = names(top.as_fd())?;
    levels.push((top, listed));
    while let Some((directory, left)) = levels.last_mut() {
        let Some(name) = left.last().cloned() else {
            levels.pop();
            if let Some((above, left)) = levels.last_mut()
                && let Some(done) = left.pop()
            {
                unlinkat(&*above, &done, AtFlags::REMOVEDIR)?;
            }
            continue;
        };
        if unlinkat(&*directory, &name, AtFlags::empty()).is_ok() {
            left.pop();
            continue;
        }
        if levels.len() >= DEPTH_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "directories are nested too deep"));
        }
        let Some((directory, _)) = levels.last() else { break };
        let inner = open_below(directory.as_fd(), &name)?;
        let listed = names(inner.as_fd())?;
        levels.push((inner, listed));
    }
    Ok(())
}

/// Sets the time of reading to that of writing; of a time later than the first, both become the second.
fn settle(directory: &OwnedFd, name: &OsStr, (latest, epoch): (i64, i64)) -> io::Result<()> {
    let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let seconds = if stat.st_mtime > latest { epoch } else { stat.st_mtime };
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(utimensat(directory, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn open_below(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(openat(parent, name, flags, Mode::empty())?)
}

/// The names in a directory, sorted.
///
/// # Errors
/// When it cannot be read.
pub fn names(directory: BorrowedFd<'_>) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// What has a name in a directory, if anything; a link is a link.
///
/// # Errors
/// When it cannot be found out.
pub fn kind(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<Option<FileType>> {
    match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Makes an empty tree in a new directory.
///
/// # Errors
/// When it cannot be made.
pub fn new(path: &Path) -> io::Result<Root> {
    std::fs::create_dir(path)?;
    let directory = open(path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    fchmod(&directory, Mode::from_raw_mode(0o755))?;
    Root::open(path)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_of_the_tree_do_not_lead_out_of_it() {
        let temporary = tempfile::tempdir().unwrap();
        let outside = temporary.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "secret").unwrap();
        let root = new(&temporary.path().join("root")).unwrap();
        symlink(&outside, root.path().join("absolute")).unwrap();
        symlink("../outside", root.path().join("climbing")).unwrap();
        for link in ["absolute", "climbing"] {
            assert!(root.read(&Path::new(link).join("secret"), 10).is_err());
            let _ = root.write(&format!("{link}/file"), b"x", 0o644);
            root.remove(&format!("{link}/secret")).unwrap();
        }
        assert_eq!(
            names(open(&outside, OFlags::RDONLY, Mode::empty()).unwrap().as_fd()).unwrap(),
            ["secret"]
        );
    }

    #[test]
    fn trees_are_written_and_removed() {
        let temporary = tempfile::tempdir().unwrap();
        let root = new(&temporary.path().join("root")).unwrap();
        root.write("a/b/c", b"1", 0o600).unwrap();
        root.write("a/b/c", b"2", 0o644).unwrap();
        assert_eq!(root.read(Path::new("a/b/c"), 10).unwrap(), b"2");
        root.make_directory(Path::new("a/d/e")).unwrap();
        root.write("a", b"file", 0o644).unwrap();
        assert_eq!(root.read(Path::new("a"), 10).unwrap(), b"file");
        root.write("x/y/z", b"", 0o644).unwrap();
        root.empty("x").unwrap();
        assert!(root.has("x") && !root.has("x/y"));
        assert!(root.make_directory(Path::new("../x")).is_err());
    }
}
