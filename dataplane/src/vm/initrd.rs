//! The guest's configuration, behind its initial RAM disk.
//!
//! Linux unpacks several archives that follow each other, each at a multiple of 4 bytes
//! (Documentation/driver-api/early-userspace/buffer-format.rst in its sources), so a configuration of the machine's own needs no change to the image's archive.

use std::fs::File;
use std::io::{self, Seek as _, Write as _};

use cpio::newc::{Builder, ModeFileType, trailer};
use rustix::fs::MemfdFlags;

/// Where init finds it.
const PATH: &str = "mashines/config.json";

/// Copies `initrd` into a memfd of our own, and `config` behind it.
///
/// # Errors
/// Reading the archive, or memory.
pub fn with_config(initrd: Option<File>, config: &[u8]) -> io::Result<File> {
    let mut out = File::from(rustix::fs::memfd_create("mashine-initrd", MemfdFlags::CLOEXEC)?);
    let mut bytes = match initrd {
        Some(mut initrd) => io::copy(&mut initrd, &mut out)?,
        None => 0,
    };
    while !bytes.is_multiple_of(4) {
        out.write_all(&[0])?;
        bytes += 1;
    }
    let length = u32::try_from(config.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let directory = Builder::new("mashines").ino(1).mode(0o755).set_mode_file_type(ModeFileType::Directory);
    directory.write(&mut out, 0).finish()?;
    // Keys and user data: for root only.
    let file = Builder::new(PATH).ino(2).mode(0o600).set_mode_file_type(ModeFileType::Regular);
    let mut file = file.write(&mut out, length);
    file.write_all(config)?;
    file.finish()?;
    trailer(&mut out)?;
    out.rewind()?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    #[test]
    fn the_configuration_follows_the_archive_at_a_multiple_of_four() {
        let mut first = tempfile::tempfile().unwrap();
        first.write_all(b"12345").unwrap();
        first.rewind().unwrap();
        let mut whole = Vec::new();
        with_config(Some(first), b"{\"a\":1}").unwrap().read_to_end(&mut whole).unwrap();
        assert_eq!(&whole[..8], b"12345\0\0\0");
        let reader = cpio::newc::Reader::new(&whole[8..]).unwrap();
        assert_eq!(reader.entry().name(), "mashines");
        let mut reader = cpio::newc::Reader::new(reader.finish().unwrap()).unwrap();
        assert_eq!((reader.entry().name(), reader.entry().mode() & 0o777), (PATH, 0o600));
        let mut config = String::new();
        reader.read_to_string(&mut config).unwrap();
        assert_eq!(config, "{\"a\":1}");
    }
}
