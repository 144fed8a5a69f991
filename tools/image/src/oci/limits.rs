//! How much of a stranger's image is taken. Generous for what is real, and an end for what is not.

use super::OciError;

/// Largest index, manifest or configuration.
pub const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
/// Most layers; overlay file systems stop at 128, and builders with them.
pub const LAYERS_MAX: usize = 256;
/// Longest path of an entry, as the kernel has it.
pub const PATH_MAX: usize = 4096;
/// Longest name of one component.
pub const NAME_MAX: usize = 255;
/// Largest header extension (long names, attributes) of one entry.
pub const EXTENSION_BYTES_MAX: u64 = 1 << 20;

/// How much is taken.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of all unpacked layers.
    pub bytes: u64,
    /// Entries of all layers.
    pub files: u64,
    /// Unpacked bytes for each byte of a layer...
    pub ratio: u64,
    /// ...beyond these, for small layers of zeros are harmless.
    pub ratio_from_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 64 << 30, files: 4_000_000, ratio: 200, ratio_from_bytes: 256 << 20 }
    }
}

impl Limits {
    /// A fresh count.
    pub fn budget(&self) -> Budget {
        Budget { limits: self.clone(), bytes: 0, files: 0 }
    }
}

/// What is left of the limits.
#[derive(Debug)]
pub struct Budget {
    limits: Limits,
    bytes: u64,
    files: u64,
}

impl Budget {
    /// Takes an entry of `bytes`, before it is unpacked.
    ///
    /// # Errors
    /// [`OciError::TooLarge`].
    pub fn take(&mut self, bytes: u64) -> Result<(), OciError> {
        self.files += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        if self.files > self.limits.files {
            return Err(OciError::TooLarge { what: "files", limit: self.limits.files });
        }
        if self.bytes > self.limits.bytes {
            return Err(OciError::TooLarge { what: "bytes", limit: self.limits.bytes });
        }
        Ok(())
    }

    /// How much a layer may grow in unpacking.
    pub const fn growth(&self) -> Growth {
        // Headers and padding come on top of the files.
        let bytes = self.limits.bytes.saturating_mul(2);
        Growth { ratio: self.limits.ratio, from: self.limits.ratio_from_bytes, bytes }
    }
}

/// How much a layer may grow in unpacking.
#[derive(Debug, Clone, Copy)]
pub struct Growth {
    /// So many times...
    pub ratio: u64,
    from: u64,
    bytes: u64,
}

impl Growth {
    /// Whether `packed` bytes may have become `unpacked`.
    pub const fn fits(self, packed: u64, unpacked: u64) -> bool {
        unpacked <= self.bytes && (unpacked <= self.from || unpacked <= packed.saturating_mul(self.ratio))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_ends_it() {
        let limits = Limits { bytes: 100, files: 2, ratio: 10, ratio_from_bytes: 50 };
        let mut budget = limits.budget();
        budget.take(100).unwrap();
        assert!(matches!(budget.take(1), Err(OciError::TooLarge { what: "bytes", .. })));
        let mut budget = limits.budget();
        budget.take(0).and_then(|()| budget.take(0)).unwrap();
        assert!(matches!(budget.take(0), Err(OciError::TooLarge { what: "files", .. })));
        assert!(matches!(limits.budget().take(u64::MAX), Err(OciError::TooLarge { .. })));
        let growth = budget.growth();
        assert!(
            growth.fits(1, 50) && growth.fits(10, 100) && !growth.fits(10, 101) && !growth.fits(1000, 201)
        );
    }
}
