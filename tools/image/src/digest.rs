//! Digests of blobs: SHA-256 over their bytes, as OCI has it.

use std::io::{self, Read, Write};

use sha2::{Digest as _, Sha256};
pub use wire::ids::{Digest, ParseIdError};

/// The digest of `bytes`.
pub fn digest_of(bytes: &[u8]) -> Digest {
    Digest(Sha256::digest(bytes).into())
}

/// Hashes and counts what passes through.
pub struct Hashing<T> {
    inner: T,
    hasher: Sha256,
    bytes: u64,
}

impl<T> Hashing<T> {
    /// Hashes what is read from or written to `inner`.
    pub fn new(inner: T) -> Self {
        Self { inner, hasher: Sha256::new(), bytes: 0 }
    }

    /// What passed: its digest, how long it was, and the inner thing.
    pub fn finish(self) -> (Digest, u64, T) {
        (Digest(self.hasher.finalize().into()), self.bytes, self.inner)
    }

    fn note(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.bytes = self.bytes.saturating_add(bytes.len() as u64);
    }
}

impl<T: Read> Read for Hashing<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.note(buffer.get(..read).unwrap_or_default());
        Ok(read)
    }
}

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(buffer)?;
        self.note(buffer.get(..written).unwrap_or_default());
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn digests_are_texts_in_json() {
        assert_eq!(digest_of(b"").to_string(), EMPTY);
        let json = format!("\"{EMPTY}\"");
        assert_eq!(serde_json::to_string(&digest_of(b"")).unwrap(), json);
        assert_eq!(serde_json::from_str::<Digest>(&json).unwrap(), digest_of(b""));
        for bad in ["\"\"", "\"sha256:../../../etc/passwd\"", "1", "null", &json[..70]] {
            assert!(serde_json::from_str::<Digest>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_passes_is_hashed() {
        let mut through = Hashing::new(&b"abc"[..]);
        io::copy(&mut through, &mut io::sink()).unwrap();
        let (digest, bytes, _) = through.finish();
        assert_eq!((digest, bytes), (digest_of(b"abc"), 3));
    }
}
