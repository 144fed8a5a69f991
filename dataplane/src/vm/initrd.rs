//! The guest's configuration, in front of its initial RAM disk.
//!
//! Linux unpacks several archives that follow each other, each at a multiple of 4 bytes
//! (Documentation/driver-api/early-userspace/buffer-format.rst in its sources), so a configuration of the machine's own needs no change to the image's archive. It comes first, because what follows a
//! compressed archive depends on the decompressor, and plain ones may precede any.

use std::fs::File;
use std::io::{self, Seek as _, Write as _};

use cpio::newc::{Builder, ModeFileType, trailer};
use rustix::fs::MemfdFlags;

/// Where init finds it.
const PATH: &str = "mashines/config.json";

/// Puts `config` into a memfd of our own, and `initrd` behind it.
///
/// # Errors
/// Reading the archive, or memory.
pub fn with_config(initrd: Option<File>, config: &[u8]) -> io::Result<File> {
    let mut out = File::from(rustix::fs::memfd_create("mashine-initrd", MemfdFlags::CLOEXEC)?);
    let length = u32::try_from(config.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let directory = Builder::new("mashines").ino(1).mode(0o755).set_mode_file_type(ModeFileType::Directory);
    directory.write(&mut out, 0).finish()?;
    // Keys and user data: for root only.
    let file = Builder::new(PATH).ino(2).mode(0o600).set_mode_file_type(ModeFileType::Regular);
    let mut file = file.write(&mut out, length);
    file.write_all(config)?;
    file.finish()?;
    trailer(&mut out)?;
    while !out.stream_position()?.is_multiple_of(4) {
        out.write_all(&[0])?;
    }
    if let Some(mut initrd) = initrd {
        io::copy(&mut initrd, &mut out)?;
    }
    out.rewind()?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    #[test]
    fn the_archive_follows_the_configuration_at_a_multiple_of_four() {
        let mut first = tempfile::tempfile().unwrap();
        first.write_all(b"12345").unwrap();
        first.rewind().unwrap();
        let mut whole = Vec::new();
        with_config(Some(first), b"{\"a\":1}").unwrap().read_to_end(&mut whole).unwrap();
        let at = whole.len() - 5;
        assert!(at.is_multiple_of(4) && whole.ends_with(b"12345"));
        let reader = cpio::newc::Reader::new(&whole[..at]).unwrap();
        assert_eq!(reader.entry().name(), "mashines");
        let mut reader = cpio::newc::Reader::new(reader.finish().unwrap()).unwrap();
        assert_eq!((reader.entry().name(), reader.entry().mode() & 0o777), (PATH, 0o600));
        let mut config = String::new();
        reader.read_to_string(&mut config).unwrap();
        assert_eq!(config, "{\"a\":1}");
    }
}
