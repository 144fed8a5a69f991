//! Why an image cannot be imported.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::{Digest, ParseIdError};

/// Why an image cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// A file of this machine.
    #[error("cannot read or write {}", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What was given is neither a reference nor a file.
    #[error("`{0}` is no reference to an image, and there is no such file")]
    Reference(String),
    /// The registry.
    #[error("the registry did not give `{reference}`")]
    Registry {
        /// What was asked for.
        reference: String,
        /// Why.
        #[source]
        source: Box<oci_client::errors::OciDistributionError>,
    },
    /// Bytes are not those that they were named as.
    #[error("{what} has digest {found}, but {wanted} was promised")]
    Digest {
        /// What.
        what: String,
        /// What was promised.
        wanted: Digest,
        /// What came.
        found: Digest,
    },
    /// More or fewer bytes than were promised.
    #[error("{what} has {found} bytes or more, but {wanted} were promised")]
    Length {
        /// What.
        what: String,
        /// What was promised.
        wanted: u64,
        /// What came.
        found: u64,
    },
    /// A digest that is none, or of a kind that is not known.
    #[error(transparent)]
    BadDigest(#[from] ParseIdError),
    /// A description that cannot be read.
    #[error("{what} cannot be read")]
    Json {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A description that says something impossible.
    #[error("the image is malformed: {0}")]
    Malformed(&'static str),
    /// Something is not there.
    #[error("the image lacks {what}")]
    Lacks {
        /// What.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A kind of blob that is not an image's.
    #[error("media type `{0}` is not one of an image or its layers")]
    MediaType(String),
    /// Not for x86-64 Linux.
    #[error("the image is for {0}, not for linux/amd64")]
    Architecture(String),
    /// A path that leads out of the image.
    #[error("entry `{}` leads out of the image", .0.display())]
    Climbs(PathBuf),
    /// A hard link to something that cannot be linked to.
    #[error("entry `{}` is a hard link to `{}`, which cannot be linked to", .path.display(), .target.display())]
    HardLink {
        /// The entry.
        path: PathBuf,
        /// What it links to.
        target: PathBuf,
    },
    /// A kind of entry that images do not have.
    #[error("entry `{}` is of a kind that is not taken: {kind}", .path.display())]
    Kind {
        /// The entry.
        path: PathBuf,
        /// Its kind.
        kind: &'static str,
    },
    /// An entry that cannot be made.
    #[error("entry `{}` cannot be unpacked", .path.display())]
    Entry {
        /// The entry.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Bytes that are no archive, or one that is broken.
    #[error("the archive cannot be read")]
    Archive(#[source] io::Error),
    /// More than is taken.
    #[error("the image is too large: {what} (limit {limit})")]
    TooLarge {
        /// Of what.
        what: &'static str,
        /// The most.
        limit: u64,
    },
    /// A recipe's step.
    #[error("the recipe's step `{step}` failed")]
    Step {
        /// The step.
        step: String,
        /// Why.
        #[source]
        source: crate::tool::ToolError,
    },
}

impl OciError {
    /// For errors of a file of this machine.
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    /// For errors of an entry.
    pub(super) fn entry(path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Entry { path, source }
    }

    /// What to do about it.
    pub const fn remedy(&self) -> &'static str {
        match self {
            Self::Io { .. } | Self::Entry { .. } => "check the file, and free space in the store's directory",
            Self::Reference(_) => "give a reference (debian:12), oci:DIR, or a path of a tar or a disk",
            Self::Registry { .. } => {
                "check the reference and the network; a registry without TLS needs --plain-http"
            }
            Self::Digest { .. } | Self::Length { .. } => {
                "do not use this image; get it again from where it was made"
            }
            Self::Architecture(_) => "give an image for linux/amd64",
            Self::MediaType(_) => "give an image for containers, with plain, gzip or zstd layers",
            Self::TooLarge { .. } => "make the image smaller",
            Self::Climbs(_) | Self::HardLink { .. } | Self::Kind { .. } => "do not use this image",
            Self::BadDigest(_)
            | Self::Json { .. }
            | Self::Malformed(_)
            | Self::Lacks { .. }
            | Self::Archive(_) => "make the archive again, with `docker save` or `skopeo copy`",
            Self::Step { .. } => "see its messages above",
        }
    }
}
