//! What an image consists of: the one file of the store that is not named by its content.

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::name::ImageName;

/// The version of the manifest's form. Readers refuse others.
pub const SCHEMA: u32 = 1;

/// Largest manifest that is read.
pub const BYTES_MAX: u64 = 1 << 20;

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Its name.
    pub name: ImageName,
    /// When it was made.
    pub created_unix_ms: u64,
    /// The root disk: a raw ext4 file system without a partition table.
    pub disk: Blob,
    /// The kernel: a bzImage, or an ELF file with a PVH entry.
    pub kernel: KernelBlob,
    /// The initial RAM disk.
    pub initrd: Blob,
    /// The kernel's command line.
    pub cmdline: String,
    /// Where the root disk's files are from.
    pub source: Source,
    /// What runs in it.
    pub config: Config,
    /// `dockerd`, `podman`, `minimal`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flavour: Option<String>,
}

impl Manifest {
    /// The blobs it names.
    pub fn digests(&self) -> [Digest; 3] {
        [self.disk.digest, self.kernel.digest, self.initrd.digest]
    }

    /// Bytes of its blobs.
    pub fn bytes(&self) -> u64 {
        self.disk.bytes.saturating_add(self.kernel.bytes).saturating_add(self.initrd.bytes)
    }
}

/// A file of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Its name.
    pub digest: Digest,
    /// Its length.
    pub bytes: u64,
}

/// A kernel of the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelBlob {
    /// Its name.
    pub digest: Digest,
    /// Its length.
    pub bytes: u64,
    /// What `uname -r` says, and the name of its directory in `/lib/modules`.
    pub release: String,
}

/// Where the files of a root disk are from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// `recipe`, `registry`, `oci-layout`, `oci-archive`, `docker-archive` or `disk`.
    pub kind: String,
    /// The recipe's name, or the reference or path as it was given.
    pub reference: String,
    /// The digest of the OCI manifest, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
}

/// What runs in a machine of this image; the fields are those of an OCI image's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// The program, and arguments that stay.
    #[serde(default)]
    pub entrypoint: Vec<String>,
    /// Arguments that are replaced when others are given.
    #[serde(default)]
    pub cmd: Vec<String>,
    /// `NAME=value`.
    #[serde(default)]
    pub env: Vec<String>,
    /// User and perhaps group, by name or number: `app`, `1000:1000`; empty is root.
    #[serde(default)]
    pub user: String,
    /// Where it starts; empty is `/`.
    #[serde(default)]
    pub workdir: String,
    /// The signal that asks it to end, `SIGTERM` where empty.
    #[serde(default)]
    pub stop_signal: String,
    /// `80/tcp`.
    #[serde(default)]
    pub exposed_ports: Vec<String>,
}
