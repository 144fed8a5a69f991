//! The archive format of an initramfs (`newc`, see cpio(5)), as far as one is written here: directories and files.
//!
//! ```text
//!   "070701" | 13 numbers of 8 hexadecimal digits | name, NUL, padding to 4 | content, padding to 4
//! ```

use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
/// Name of the entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// An archive being written.
#[derive(Debug)]
pub(super) struct Archive<W> {
    output: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(output: W) -> Self {
        Self { output, entries: 0 }
    }

    /// Adds a directory; its parent must be there already.
    pub(super) fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, DIRECTORY, &[])
    }

    /// Adds a file that may be executed.
    pub(super) fn file(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        self.entry(name, PROGRAM, content)
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.entry(TRAILER, 0, &[])?;
        self.output.flush()?;
        Ok(self.output)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let too_long = |_| io::Error::new(io::ErrorKind::InvalidInput, format!("`{name}` is too long"));
        let size = u32::try_from(content.len()).map_err(too_long)?;
        let name_size = u32::try_from(name.len() + 1).map_err(too_long)?;
        self.entries += 1;
        // inode, mode, owner, group, links, time, size, device (2), device it is (2), size of the name, checksum (unused)
        let numbers = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        let mut header = String::from("070701");
        for number in numbers {
            use std::fmt::Write as _;
            write!(header, "{number:08x}").map_err(io::Error::other)?;
        }
        self.output.write_all(header.as_bytes())?;
        self.output.write_all(name.as_bytes())?;
        self.output.write_all(&[0])?;
        self.pad(header.len() + name.len() + 1)?;
        self.output.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, written: usize) -> io::Result<()> {
        let missing = written.next_multiple_of(4) - written;
        self.output.write_all(&[0; 3][..missing])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_named() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("bin").unwrap();
        archive.file("bin/a", b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        // 110 bytes of header and "bin\0" make 114: two bytes of padding, then the next header.
        assert_eq!(&bytes[110..122], b"bin\x00\x00\x00070701");
        let file = &bytes[116..];
        assert_eq!(&file[54..62], b"00000005", "size of the content");
        assert_eq!(&file[110..124], b"bin/a\0hello\0\0\0");
        assert!(bytes.windows(11).any(|window| window == b"TRAILER!!!\0"));
    }

    #[test]
    fn a_system_program_reads_it() {
        let Some(busybox) = crate::command::locate("busybox") else {
            println!("SKIPPED: there is no busybox to read the archive with");
            return;
        };
        let mut archive = Archive::new(Vec::new());
        archive.directory("d").unwrap();
        archive.file("d/x", &[7; 1001]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.cpio");
        std::fs::write(&path, archive.finish().unwrap()).unwrap();
        let status = std::process::Command::new(busybox)
            .args(["cpio", "-id"])
            .current_dir(dir.path())
            .stdin(std::fs::File::open(&path).unwrap())
            .status();
        assert!(status.unwrap().success());
        assert_eq!(std::fs::read(dir.path().join("d/x")).unwrap(), vec![7; 1001]);
    }
}
