//! Puts the entries of one layer into the tree.
//!
//! An entry's parent directory is resolved by the kernel with the tree as its root; its last name is never followed. So an entry is
//! made inside the tree, whatever links earlier entries left there. A link that climbs out is refused when something is put through it;
//! as a mere link it is harmless: it will be followed in the machine, if at all.
//!
//! Whiteouts (`.wh.NAME`, `.wh..wh..opq`) remove what lower layers have, never what this layer has brought, in whichever order
//! they come.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, chownat,
    fchmod, fsetxattr, linkat, mkdirat, mknodat, openat, openat2, readlinkat, symlinkat, utimensat,
};
use rustix::io::Errno;

use super::OciError;
use super::limits::Budget;
use super::member::{Kind, Member};
use crate::root::{self, Root};

/// What marks an entry of a lower layer as removed.
const WHITEOUT: &[u8] = b".wh.";
/// What marks all entries of a directory so.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Links in one path, as the kernel has it.
const LINKS_MAX: usize = 40;

/// What was left out.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Notes {
    /// Device nodes: a machine makes its own.
    pub devices: u64,
    /// Attributes that would mean something else here, or nothing.
    pub attributes: u64,
}

/// One layer being put in.
pub struct Unpacking<'a> {
    root: &'a Root,
    whiteouts: bool,
    /// What this layer has brought.
    brought: HashSet<PathBuf>,
    /// Times of directories, set when all is in them.
    directories: Vec<(PathBuf, i64)>,
    notes: Notes,
}

impl<'a> Unpacking<'a> {
    /// Into a tree; without whiteouts for archives that are no layers.
    pub fn new(root: &'a Root, whiteouts: bool) -> Self {
        Self { root, whiteouts, brought: HashSet::new(), directories: Vec::new(), notes: Notes::default() }
    }

    /// Puts one entry in.
    ///
    /// # Errors
    /// [`OciError`]; the tree is then to be thrown away.
    pub fn put(
        &mut self,
        member: &Member,
        content: &mut impl Read,
        budget: &mut Budget,
    ) -> Result<(), OciError> {
        budget.take(if let Kind::File(bytes) = member.kind { bytes } else { 0 })?;
        let Some(name) = member.path.file_name() else {
            return self.directory_itself(member);
        };
        let above = member.path.parent().unwrap_or(Path::new(""));
        if self.whiteouts && name.as_bytes().starts_with(WHITEOUT) {
            return self.whiteout(above, name);
        }
        if member.kind == Kind::Device {
            self.notes.devices += 1;
            return Ok(());
        }
        let parent = self.parent(above, &member.path)?;
        self.make(member, parent.as_fd(), name, content)?;
        self.brought.insert(member.path.clone());
        Ok(())
    }

    /// Sets the times of directories, and says what was left out.
    ///
    /// # Errors
    /// When a time cannot be set.
    pub fn finish(self) -> Result<Notes, OciError> {
        for (path, mtime) in self.directories.iter().rev() {
            // It may have become something else since.
            if let Ok(directory) = self.root.directory(path) {
                set_time(directory.as_fd(), OsStr::new("."), *mtime).map_err(OciError::entry(path))?;
            }
        }
        Ok(self.notes)
    }

    fn make(
        &mut self,
        member: &Member,
        parent: BorrowedFd<'_>,
        name: &OsStr,
        content: &mut impl Read,
    ) -> Result<(), OciError> {
        let wrong = || OciError::entry(&member.path);
        let there = root::kind(parent, name).map_err(wrong())?;
        if member.kind == Kind::Directory && there == Some(FileType::Directory) {
            return self.settle_directory(member, parent, name).map_err(wrong());
        }
        if let Kind::HardLink(target) = &member.kind {
            return self.hard_link(member, target, parent, name);
        }
        if there.is_some() {
            root::remove(parent, name).map_err(wrong())?;
        }
        match &member.kind {
            Kind::File(bytes) => self.file(member, *bytes, parent, name, content),
            Kind::Directory => mkdirat(parent, name, Mode::from_raw_mode(0o700))
                .map_err(io::Error::from)
                .and_then(|()| self.settle_directory(member, parent, name)),
            Kind::Link(target) => symlinkat(target, parent, name)
                .map_err(io::Error::from)
                .and_then(|()| own(member, parent, name))
                .and_then(|()| set_time(parent, name, member.mtime)),
            Kind::Fifo => mknodat(parent, name, FileType::Fifo, Mode::from_raw_mode(member.mode & 0o777), 0)
                .map_err(io::Error::from)
                .and_then(|()| own(member, parent, name))
                .and_then(|()| set_time(parent, name, member.mtime)),
            Kind::HardLink(_) | Kind::Device => Ok(()),
        }
        .map_err(wrong())
    }

    fn file(
        &mut self,
        member: &Member,
        bytes: u64,
        parent: BorrowedFd<'_>,
        name: &OsStr,
        content: &mut impl Read,
    ) -> io::Result<()> {
        let mut file = root::create(parent, name)?;
        if io::copy(&mut content.take(bytes), &mut file)? != bytes {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.finish_file(member, &file)?;
        set_time(parent, name, member.mtime)
    }

    /// Owner first: a change of owner takes set-uid bits and capabilities away.
    fn finish_file(&mut self, member: &Member, file: &File) -> io::Result<()> {
        rustix::fs::fchown(file, Some(Uid::from_raw(member.uid)), Some(Gid::from_raw(member.gid)))?;
        fchmod(file, Mode::from_raw_mode(member.mode))?;
        for (name, value) in &member.attributes {
            if !is_kept(name) {
                self.notes.attributes += 1;
                continue;
            }
            match fsetxattr(file, name, value, XattrFlags::empty()) {
                Ok(()) => {}
                // The store's file system has none of these.
                Err(Errno::OPNOTSUPP) => self.notes.attributes += 1,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn settle_directory(&mut self, member: &Member, parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        let directory = File::from(openat(parent, name, flags, Mode::empty())?);
        self.finish_file(member, &directory)?;
        self.directories.push((member.path.clone(), member.mtime));
        Ok(())
    }

    fn directory_itself(&mut self, member: &Member) -> Result<(), OciError> {
        if member.kind != Kind::Directory {
            return Err(OciError::Kind { path: PathBuf::from("."), kind: "the root must be a directory" });
        }
        let settled = self.settle_directory(member, self.root.descriptor(), OsStr::new("."));
        settled.map_err(OciError::entry(&member.path))
    }

    fn hard_link(
        &self,
        member: &Member,
        target: &Path,
        parent: BorrowedFd<'_>,
        name: &OsStr,
    ) -> Result<(), OciError> {
        let refused = || OciError::HardLink { path: member.path.clone(), target: target.to_owned() };
        let (Some(last), above) = (target.file_name(), target.parent().unwrap_or(Path::new(""))) else {
            return Err(refused());
        };
        if *target == member.path {
            return Err(refused());
        }
        let from = self.existing(above, target)?.ok_or_else(refused)?;
        let kind = root::kind(from.as_fd(), last).map_err(OciError::entry(&member.path))?;
        if !matches!(kind, Some(FileType::RegularFile | FileType::Symlink | FileType::Fifo)) {
            return Err(refused());
        }
        let wrong = || OciError::entry(&member.path);
        root::remove(parent, name).map_err(wrong())?;
        // The link itself is linked to, if it is one: nothing is followed.
        linkat(&from, last, parent, name, AtFlags::empty()).map_err(|error| match error {
            Errno::NOENT => refused(),
            error => wrong()(error.into()),
        })
    }

    fn whiteout(&mut self, above: &Path, name: &OsStr) -> Result<(), OciError> {
        let Some(parent) = self.existing(above, &above.join(name))? else { return Ok(()) };
        let wrong = || OciError::entry(&above.join(name));
        if name.as_bytes() == OPAQUE {
            return self.hide_lower(above.to_owned()).map_err(wrong());
        }
        let hidden = OsStr::from_bytes(name.as_bytes().get(WHITEOUT.len()..).unwrap_or_default());
        // `.wh..wh.` is a builder's own bookkeeping; `.wh.` and `.wh..` name nothing.
        if hidden.as_bytes().starts_with(WHITEOUT) || matches!(hidden.as_bytes(), b"" | b"." | b"..") {
            return Ok(());
        }
        let path = above.join(hidden);
        if self.brought.contains(&path) {
            return self.hide_lower(path).map_err(wrong());
        }
        root::remove(parent.as_fd(), hidden).map_err(wrong())
    }

    /// Removes what is in a directory, except what this layer brought, and what leads there.
    fn hide_lower(&self, directory: PathBuf) -> io::Result<()> {
        let mut leading: HashSet<&Path> = HashSet::new();
        for path in &self.brought {
            leading.extend(path.ancestors());
        }
        let mut pending = vec![directory];
        while let Some(path) = pending.pop() {
            let opened = match self.root.directory(&path) {
                Ok(opened) => opened,
                Err(error) if error.kind() == io::ErrorKind::NotADirectory => continue,
                Err(error) => return Err(error),
            };
            root::clear(opened.as_fd(), |name| !leading.contains(&*path.join(name)))?;
            for name in root::names(opened.as_fd())? {
                if root::kind(opened.as_fd(), &name)? == Some(FileType::Directory) {
                    pending.push(path.join(name));
                }
            }
        }
        Ok(())
    }

    /// The directory in which an entry is made; what is missing of it is made, as root's.
    fn parent(&self, above: &Path, entry: &Path) -> Result<OwnedFd, OciError> {
        match self.existing(above, entry)? {
            Some(directory) => Ok(directory),
            None => self.root.make_directory(above).map_err(OciError::entry(entry)),
        }
    }

    /// A directory of the tree, if it is there.
    fn existing(&self, above: &Path, entry: &Path) -> Result<Option<OwnedFd>, OciError> {
        let path = if above.as_os_str().is_empty() { Path::new(".") } else { above };
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let rules = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        match openat2(self.root.descriptor(), path, flags, Mode::empty(), rules) {
            Ok(directory) => return Ok(Some(directory)),
            Err(Errno::NOENT) => return Ok(None),
            // An absolute link, which is the image's own root's, or one that climbs.
            Err(Errno::XDEV) => {}
            Err(error) => return Err(OciError::entry(entry)(error.into())),
        }
        if climbs(self.root, path).map_err(OciError::entry(entry))? {
            return Err(OciError::Climbs(entry.to_owned()));
        }
        match self.root.directory(path) {
            Ok(directory) => Ok(Some(directory)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(OciError::entry(entry)(error)),
        }
    }
}

/// Whether a path goes above the root through a relative link. The kernel would stop it there; who makes such a link means harm.
fn climbs(root: &Root, path: &Path) -> io::Result<bool> {
    let mut left: Vec<OsString> = path.iter().rev().map(OsStr::to_owned).collect();
    let mut at = PathBuf::new();
    let mut links = 0;
    while let Some(name) = left.pop() {
        match name.as_bytes() {
            b"." => continue,
            b"/" => {
                at.clear();
                continue;
            }
            b".." if at.as_os_str().is_empty() => return Ok(true),
            b".." => {
                at.pop();
                continue;
            }
            _ => {}
        }
        let directory = match root.directory(&at) {
            Ok(directory) => directory,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        if root::kind(directory.as_fd(), &name)? != Some(FileType::Symlink) {
            at.push(name);
            continue;
        }
        links += 1;
        if links > LINKS_MAX {
            return Err(Errno::LOOP.into());
        }
        let target = readlinkat(&directory, &name, Vec::new())?;
        let target = Path::new(OsStr::from_bytes(target.as_bytes()));
        left.extend(target.iter().rev().map(OsStr::to_owned));
    }
    Ok(false)
}

/// Capabilities of programs, lists of access, and what users note. Others are this machine's or another kernel's business.
fn is_kept(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name == b"security.capability" || name.starts_with(b"user.") || name.starts_with(b"system.posix_acl_")
}

fn own(member: &Member, parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(member.uid), Gid::from_raw(member.gid));
    Ok(chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
}

fn set_time(parent: BorrowedFd<'_>, name: &OsStr, seconds: i64) -> io::Result<()> {
    let time = Timespec { tv_sec: seconds.clamp(0, 1 << 33), tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}
