//! Files and directories as a tar stream, and back.
//!
//! Both ends of `mashines cp` use it, and neither trusts the other: what unpacks writes below its destination only. A path with `..`, an
//! absolute one, or one that leads through a symbolic link is an error; device nodes and pipes are passed over; set-user-id bits are dropped.
//! A symbolic link is made as it is, but never followed. Whole files appear under their names only when they are complete.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use tar::{Archive, Builder, Entry, EntryType, Header};

/// Why a stream was not unpacked to its end, or not made.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Reading or writing something.
    #[error("{}: {source}", path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The stream is no archive, or ends early.
    #[error("the archive cannot be read: {0}")]
    Stream(#[source] io::Error),
    /// A path that would leave the destination.
    #[error("the archive holds the path `{}`, which leads elsewhere", .0.display())]
    Elsewhere(PathBuf),
    /// The path has no last component.
    #[error("`{}` has no name", .0.display())]
    NoName(PathBuf),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> ArchiveError {
    move |source| ArchiveError::Io { path: path.to_owned(), source }
}

/// Writes `path` and everything below it; the first component of all names is its last one.
///
/// # Errors
/// [`ArchiveError`]; what was written before is of no use.
pub fn pack(path: &Path, to: impl Write) -> Result<(), ArchiveError> {
    let resolved = path.canonicalize().map_err(at(path))?;
    let name = path.file_name().or(resolved.file_name());
    let name = name.map_or_else(|| PathBuf::from("root"), PathBuf::from);
    let mut builder = Builder::new(to);
    builder.follow_symlinks(false);
    builder.sparse(false);
    if resolved.is_dir() {
        add_directory(&mut builder, &resolved, &name)?;
    } else {
        builder.append_path_with_name(&resolved, &name).map_err(at(path))?;
    }
    builder.into_inner().and_then(|mut to| to.flush()).map_err(ArchiveError::Stream)
}

fn add_directory<W: Write>(builder: &mut Builder<W>, path: &Path, name: &Path) -> Result<(), ArchiveError> {
    builder.append_dir(name, path).map_err(at(path))?;
    for entry in fs::read_dir(path).map_err(at(path))? {
        let entry = entry.map_err(at(path))?;
        let (path, name) = (entry.path(), name.join(entry.file_name()));
        let kind = entry.file_type().map_err(at(&path))?;
        if kind.is_dir() {
            add_directory(builder, &path, &name)?;
        } else if kind.is_file() || kind.is_symlink() {
            builder.append_path_with_name(&path, &name).map_err(at(&path))?;
        } else {
            eprintln!("{}: not a file, passed over", path.display());
        }
    }
    Ok(())
}

/// Where the top of an archive goes.
struct Destination {
    base: PathBuf,
    /// Name instead of the archive's first component.
    renamed: Option<OsString>,
}

impl Destination {
    fn of(path: &Path) -> Result<Self, ArchiveError> {
        if path.is_dir() {
            return Ok(Self { base: path.to_owned(), renamed: None });
        }
        let name = path.file_name().ok_or_else(|| ArchiveError::NoName(path.to_owned()))?;
        let base = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let base = base.unwrap_or(Path::new(".")).to_owned();
        Ok(Self { base, renamed: Some(name.to_owned()) })
    }

    /// Where an entry goes. All directories on the way exist afterwards, and none of them is a link.
    fn place(&self, name: &Path) -> Result<Option<PathBuf>, ArchiveError> {
        let elsewhere = || ArchiveError::Elsewhere(name.to_owned());
        let mut parts = Vec::new();
        for component in name.components() {
            match component {
                Component::Normal(part) => parts.push(part.to_owned()),
                Component::CurDir => {}
                _ => return Err(elsewhere()),
            }
        }
        if let (Some(first), Some(renamed)) = (parts.first_mut(), &self.renamed) {
            first.clone_from(renamed);
        }
        let Some(last) = parts.pop() else { return Ok(None) };
        let mut path = self.base.clone();
        for part in parts {
            path.push(part);
            match fs::symlink_metadata(&path) {
                Ok(metadata) if metadata.is_dir() => {}
                Ok(_) => return Err(elsewhere()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    fs::create_dir(&path).map_err(at(&path))?;
                }
                Err(error) => return Err(at(&path)(error)),
            }
        }
        Ok(Some(path.join(last)))
    }
}

/// Unpacks a stream: below `path` if that is a directory, else under its name.
///
/// # Errors
/// [`ArchiveError`]; what was unpacked before stays.
pub fn unpack(from: impl Read, path: &Path) -> Result<(), ArchiveError> {
    let destination = Destination::of(path)?;
    let mut archive = Archive::new(from);
    let mut any = false;
    for entry in archive.entries().map_err(ArchiveError::Stream)? {
        let mut entry = entry.map_err(ArchiveError::Stream)?;
        let name = entry.path().map_err(ArchiveError::Stream)?.into_owned();
        any = true;
        if let Some(place) = destination.place(&name)? {
            unpack_entry(&mut entry, &destination, &place)?;
        }
    }
    // An empty stream is one that ended early: there is no archive of nothing.
    if any { Ok(()) } else { Err(ArchiveError::Stream(io::ErrorKind::UnexpectedEof.into())) }
}

fn unpack_entry<R: Read>(
    entry: &mut Entry<'_, R>,
    to: &Destination,
    place: &Path,
) -> Result<(), ArchiveError> {
    let link = || -> Result<PathBuf, ArchiveError> {
        let link = entry.link_name().map_err(ArchiveError::Stream)?;
        Ok(link.ok_or_else(|| ArchiveError::NoName(place.to_owned()))?.into_owned())
    };
    match entry.header().entry_type() {
        EntryType::Directory => make_directory(entry.header(), place),
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => write_file(entry, place),
        EntryType::Symlink => {
            let target = link()?;
            clear(place)?;
            std::os::unix::fs::symlink(target, place).map_err(at(place))
        }
        EntryType::Link => {
            let target = link()?;
            let target = to.place(&target)?.ok_or(ArchiveError::NoName(target))?;
            clear(place)?;
            fs::hard_link(target, place).map_err(at(place))
        }
        _ => {
            eprintln!("{}: not a file, passed over", place.display());
            Ok(())
        }
    }
}

fn mode(header: &Header) -> u32 {
    header.mode().unwrap_or(0o644) & 0o777
}

fn make_directory(header: &Header, place: &Path) -> Result<(), ArchiveError> {
    match fs::symlink_metadata(place) {
        Ok(metadata) if metadata.is_dir() => return Ok(()),
        Ok(_) => return Err(ArchiveError::Elsewhere(place.to_owned())),
        Err(_) => fs::create_dir(place).map_err(at(place))?,
    }
    // Its owner must be able to write what follows.
    fs::set_permissions(place, fs::Permissions::from_mode(mode(header) | 0o700)).map_err(at(place))
}

fn write_file<R: Read>(entry: &mut Entry<'_, R>, place: &Path) -> Result<(), ArchiveError> {
    let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let part = place.with_file_name(format!(".{name}.part-{}", std::process::id()));
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).open(&part)?;
        io::copy(entry, &mut file)?;
        file.set_permissions(fs::Permissions::from_mode(mode(entry.header())))?;
        if let Ok(seconds) = entry.header().mtime() {
            let time = std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_secs(seconds));
            time.map(|time| file.set_modified(time)).transpose()?;
        }
        fs::rename(&part, place)
    })();
    written.map_err(|error| {
        let _ = fs::remove_file(&part);
        at(place)(error)
    })
}

/// Makes way for a link. A directory stays, and the link is an error.
fn clear(place: &Path) -> Result<(), ArchiveError> {
    match fs::remove_file(place) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(place)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
