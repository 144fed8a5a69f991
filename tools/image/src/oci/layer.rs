//! One layer: from its blob, through decompression, into the tree; every byte is hashed on both sides.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::OciError;
use super::limits::{Budget, Growth};
use super::member;
use super::unpack::{Notes, Unpacking};
use crate::digest::{Digest, Hashing};
use crate::root::Root;

/// zstd windows up to 128 MiB: what `zstd --long` makes, and no stranger's larger wish.
const WINDOW_LOG_MAX: u32 = 27;

/// A layer to unpack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its file in the bundle.
    pub path: PathBuf,
    /// What the blob must be, where a manifest says.
    pub blob: Option<(Digest, u64)>,
    /// What it must unpack to.
    pub unpacked: Digest,
}

/// Unpacks a layer over what is in the tree.
///
/// # Errors
/// [`OciError`]; the tree is then to be thrown away.
pub fn apply(root: &Root, bundle: &Root, layer: &Layer, budget: &mut Budget) -> Result<Notes, OciError> {
    let what = layer.path.display().to_string();
    let lacks = |source| OciError::Lacks { what: format!("its layer {what}"), source };
    let file = bundle.open_file(&layer.path).map_err(lacks)?;
    let found = file.metadata().map_err(lacks)?.len();
    if let Some((_, wanted)) = layer.blob
        && wanted != found
    {
        return Err(OciError::Length { what: format!("layer {what}"), wanted, found });
    }
    let (notes, packed, unpacked) = stream(root, file, true, budget)?;
    if let Some((wanted, _)) = layer.blob
        && wanted != packed
    {
        return Err(OciError::Digest { what: format!("layer {what}"), wanted, found: packed });
    }
    if layer.unpacked != unpacked {
        let what = format!("layer {what}, unpacked,");
        return Err(OciError::Digest { what, wanted: layer.unpacked, found: unpacked });
    }
    Ok(notes)
}

/// Unpacks an archive that holds an image, in which nothing is a whiteout.
///
/// # Errors
/// As [`apply`].
pub fn unpack_archive(root: &Root, file: File, budget: &mut Budget) -> Result<(), OciError> {
    stream(root, file, false, budget).map(drop)
}

fn stream(
    root: &Root,
    file: File,
    whiteouts: bool,
    budget: &mut Budget,
) -> Result<(Notes, Digest, Digest), OciError> {
    let read = Arc::new(AtomicU64::new(0));
    let mut packed = Hashing::new(Counting { inner: file, read: Arc::clone(&read) });
    let (notes, unpacked) = {
        let decoded = decode(&mut packed)?;
        let growth = budget.growth();
        let growing = Growing { inner: decoded, packed: &read, unpacked: 0, growth, exceeded: false };
        unpack(root, growing, whiteouts, budget)?
    };
    // What follows the end of the stream belongs to the blob too.
    io::copy(&mut packed, &mut io::sink()).map_err(OciError::Archive)?;
    Ok((notes, packed.finish().0, unpacked))
}

fn unpack<R: Read>(
    root: &Root,
    growing: Growing<'_, R>,
    whiteouts: bool,
    budget: &mut Budget,
) -> Result<(Notes, Digest), OciError> {
    let mut hashing = Hashing::new(growing);
    let mut unpacking = Unpacking::new(root, whiteouts);
    let walked = member::each(&mut hashing, |member, content| unpacking.put(&member, content, budget));
    // What follows the archive's end is padding, and part of what is hashed.
    let drained =
        walked.and_then(|()| io::copy(&mut hashing, &mut io::sink()).map(drop).map_err(OciError::Archive));
    let (digest, _, growing) = hashing.finish();
    if growing.exceeded {
        return Err(OciError::TooLarge {
            what: "growth of a layer in unpacking",
            limit: growing.growth.ratio,
        });
    }
    drained?;
    Ok((unpacking.finish()?, digest))
}

/// The decompressed stream. What it is compressed with is read off its first bytes: media types are often wrong, bytes are not.
fn decode<'a>(packed: &'a mut Hashing<Counting>) -> Result<Box<dyn Read + 'a>, OciError> {
    let mut start = [0; 4];
    let mut length = 0;
    while let Some(rest) = start.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match packed.read(rest).map_err(OciError::Archive)? {
            0 => break,
            read => length += read,
        }
    }
    let start = start.into_iter().take(length).collect::<Vec<u8>>();
    let kind = start.clone();
    let whole = io::Cursor::new(start).chain(packed);
    match &*kind {
        [0x1f, 0x8b, ..] => Ok(Box::new(flate2::read::MultiGzDecoder::new(io::BufReader::new(whole)))),
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let mut decoder = zstd::Decoder::new(whole).map_err(OciError::Archive)?;
            decoder.window_log_max(WINDOW_LOG_MAX).map_err(OciError::Archive)?;
            Ok(Box::new(decoder))
        }
        _ => Ok(Box::new(io::BufReader::new(whole))),
    }
}

/// Counts what was read of the file.
struct Counting {
    inner: File,
    read: Arc<AtomicU64>,
}

impl Read for Counting {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.read.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

/// A stream that may not grow beyond its limit.
struct Growing<'a, R> {
    inner: R,
    packed: &'a AtomicU64,
    unpacked: u64,
    growth: Growth,
    exceeded: bool,
}

impl<R: Read> Read for Growing<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.unpacked = self.unpacked.saturating_add(read as u64);
        if !self.growth.fits(self.packed.load(Ordering::Relaxed), self.unpacked) {
            self.exceeded = true;
            return Err(io::Error::other("the stream grows beyond its limit"));
        }
        Ok(read)
    }
}
