//! Entries of a tar, with their extensions, as values that cannot be wrong.
//!
//! The archive is read raw: extensions (long names, PAX records) are read here and bounded, because their length is a stranger's
//! word. Sparse files are refused: container builders do not make them, and they promise more bytes than they have.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use tar::{Archive, Entry, EntryType, Header, PaxExtensions};

use super::OciError;
use super::limits::{EXTENSION_BYTES_MAX, NAME_MAX, PATH_MAX};
use crate::root;

/// PAX records with extended attributes.
const ATTRIBUTE: &str = "SCHILY.xattr.";

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file of so many bytes.
    File(u64),
    /// A directory.
    Directory,
    /// A symbolic link; it may say anything.
    Link(OsString),
    /// Another name of an entry.
    HardLink(PathBuf),
    /// A named pipe.
    Fifo,
    /// A device: never made.
    Device,
}

/// An entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Below the root, of plain names only; empty is the root itself.
    pub path: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change, in seconds.
    pub mtime: i64,
    /// Extended attributes.
    pub attributes: Vec<(OsString, Vec<u8>)>,
}

/// What was said about the entry to come.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    uid: Option<u64>,
    gid: Option<u64>,
    size: Option<u64>,
    mtime: Option<i64>,
    attributes: Vec<(OsString, Vec<u8>)>,
    sparse: bool,
}

/// Gives each entry of an archive, and its bytes, to `each`.
///
/// # Errors
/// What is wrong with the archive, or what `each` says.
pub fn each<R: Read>(
    reader: R,
    mut each: impl FnMut(Member, &mut Entry<'_, R>) -> Result<(), OciError>,
) -> Result<(), OciError> {
    let mut archive = Archive::new(reader);
    let mut next = Extensions::default();
    for entry in archive.entries().map_err(OciError::Archive)?.raw(true) {
        let mut entry = entry.map_err(OciError::Archive)?;
        match entry.header().entry_type() {
            EntryType::GNULongName => next.path = Some(name(&mut entry)?),
            EntryType::GNULongLink => next.link = Some(name(&mut entry)?),
            EntryType::XHeader => records(&bounded(&mut entry)?, &mut next)?,
            // Comments for the whole archive, like git's.
            EntryType::XGlobalHeader => drop(bounded(&mut entry)?),
            _ => {
                let member = member(entry.header(), std::mem::take(&mut next))?;
                each(member, &mut entry)?;
            }
        }
    }
    Ok(())
}

fn bounded(entry: &mut impl Read) -> Result<Vec<u8>, OciError> {
    let mut bytes = Vec::new();
    entry.take(EXTENSION_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(OciError::Archive)?;
    if bytes.len() as u64 > EXTENSION_BYTES_MAX {
        return Err(OciError::TooLarge { what: "bytes of a header", limit: EXTENSION_BYTES_MAX });
    }
    Ok(bytes)
}

fn name(entry: &mut impl Read) -> Result<Vec<u8>, OciError> {
    let mut bytes = bounded(entry)?;
    // GNU tar ends names with a zero.
    if bytes.last() == Some(&0) {
        bytes.pop();
    }
    Ok(bytes)
}

fn records(bytes: &[u8], next: &mut Extensions) -> Result<(), OciError> {
    for record in PaxExtensions::new(bytes) {
        let record = record.map_err(OciError::Archive)?;
        let key = record.key().map_err(|_| OciError::Malformed("a header's key is no text"))?;
        let value = record.value_bytes();
        let number = || {
            let text = std::str::from_utf8(value).ok().and_then(|text| text.parse::<u64>().ok());
            text.ok_or(OciError::Malformed("a header's number is none"))
        };
        match key {
            "path" => next.path = Some(value.to_owned()),
            "linkpath" => next.link = Some(value.to_owned()),
            "uid" => next.uid = Some(number()?),
            "gid" => next.gid = Some(number()?),
            "size" => next.size = Some(number()?),
            "mtime" => next.mtime = seconds(value),
            key if key.starts_with("GNU.sparse.") => next.sparse = true,
            key => {
                if let Some(attribute) = key.strip_prefix(ATTRIBUTE) {
                    next.attributes.push((OsString::from(attribute), value.to_owned()));
                }
            }
        }
    }
    Ok(())
}

fn seconds(value: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(value).ok()?;
    text.split('.').next()?.parse().ok()
}

fn member(header: &Header, next: Extensions) -> Result<Member, OciError> {
    let raw = next.path.unwrap_or_else(|| header.path_bytes().into_owned());
    let path = plain(&raw)?;
    let kind = kind(header, &path, next.link, next.size, next.sparse)?;
    let bad = |_: io::Error| OciError::Malformed("a header's number is none");
    let narrow =
        |id: u64| u32::try_from(id).map_err(|_| OciError::Malformed("an owner's number is too large"));
    let mtime = match next.mtime {
        Some(seconds) => seconds,
        None => i64::try_from(header.mtime().map_err(bad)?).unwrap_or(0),
    };
    Ok(Member {
        path,
        kind,
        mode: header.mode().map_err(bad)? & 0o7777,
        uid: narrow(next.uid.map_or_else(|| header.uid(), Ok).map_err(bad)?)?,
        gid: narrow(next.gid.map_or_else(|| header.gid(), Ok).map_err(bad)?)?,
        mtime,
        attributes: next.attributes,
    })
}

fn kind(
    header: &Header,
    path: &Path,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    sparse: bool,
) -> Result<Kind, OciError> {
    let refused = |kind| OciError::Kind { path: path.to_owned(), kind };
    let target = || {
        let target = link.or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
        target.filter(|target| !target.is_empty() && target.len() < PATH_MAX && !target.contains(&0))
    };
    if sparse {
        return Err(refused("sparse file"));
    }
    match header.entry_type() {
        EntryType::Regular | EntryType::Continuous => {
            let own = header.entry_size().map_err(OciError::Archive)?;
            // Raw reading goes by the header; a record that says otherwise (a file of more than 8 GiB) would be read wrongly.
            if size.is_some_and(|size| size != own) {
                return Err(refused("file of more than 8 GiB"));
            }
            // Before POSIX, a directory was a file whose name ends so.
            let old_directory = header.path_bytes().ends_with(b"/");
            if old_directory && own == 0 { Ok(Kind::Directory) } else { Ok(Kind::File(own)) }
        }
        EntryType::Directory => Ok(Kind::Directory),
        EntryType::Symlink => Ok(Kind::Link(
            OsStr::from_bytes(&target().ok_or_else(|| refused("symbolic link without a target"))?).to_owned(),
        )),
        EntryType::Link => {
            Ok(Kind::HardLink(plain(&target().ok_or_else(|| refused("hard link without a target"))?)?))
        }
        EntryType::Fifo => Ok(Kind::Fifo),
        EntryType::Char | EntryType::Block => Ok(Kind::Device),
        EntryType::GNUSparse => Err(refused("sparse file")),
        _ => Err(refused("unknown")),
    }
}

/// A path below the root, of plain names.
fn plain(raw: &[u8]) -> Result<PathBuf, OciError> {
    let path = Path::new(OsStr::from_bytes(raw));
    if raw.len() >= PATH_MAX || raw.contains(&0) {
        return Err(OciError::TooLarge { what: "bytes of a path", limit: PATH_MAX as u64 });
    }
    let names = root::components(path).map_err(OciError::Climbs)?;
    if names.iter().any(|name| name.len() > NAME_MAX) {
        return Err(OciError::TooLarge { what: "bytes of a name", limit: NAME_MAX as u64 });
    }
    Ok(names.into_iter().collect())
}
