//! An image's documents and layers at hand, wherever they came from.

use std::path::{Path, PathBuf};

use super::OciError;
use super::format::{self, Descriptor, DockerManifest, Document};
use super::layer::Layer;
use super::limits::{DOCUMENT_BYTES_MAX, LAYERS_MAX, Limits};
use crate::digest::{Digest, digest_of};
use crate::manifest::Config;
use crate::root::Root;

/// Lists within lists, before it is taken for a game.
const DEPTH_MAX: usize = 4;

/// An image, before it is unpacked.
#[derive(Debug)]
pub(super) struct Bundle {
    /// Where its files are.
    pub root: Root,
    /// What runs in it.
    pub config: Config,
    /// From the lowest to the uppermost.
    pub layers: Vec<Layer>,
    /// The manifest's digest, where there is a manifest.
    pub digest: Option<Digest>,
}

/// The file of a blob in a layout.
pub(super) fn blob_path(digest: Digest) -> PathBuf {
    Path::new("blobs/sha256").join(digest.hex())
}

fn read(root: &Root, path: &Path) -> Result<Vec<u8>, OciError> {
    root.read(path, DOCUMENT_BYTES_MAX).map_err(|source| match source.kind() {
        std::io::ErrorKind::FileTooLarge => {
            OciError::TooLarge { what: "bytes of a document", limit: DOCUMENT_BYTES_MAX }
        }
        _ => OciError::Lacks { what: path.display().to_string(), source },
    })
}

/// Reads a document and checks that it is the one that is meant.
fn read_blob(root: &Root, descriptor: &Descriptor) -> Result<Vec<u8>, OciError> {
    let path = blob_path(descriptor.digest);
    let bytes = read(root, &path)?;
    verify(&bytes, descriptor.digest, "a document")?;
    Ok(bytes)
}

/// Checks bytes against a digest.
pub(super) fn verify(bytes: &[u8], wanted: Digest, what: &str) -> Result<(), OciError> {
    let found = digest_of(bytes);
    if found == wanted { Ok(()) } else { Err(OciError::Digest { what: what.to_owned(), wanted, found }) }
}

/// The image of an OCI layout.
pub(super) fn of_layout(root: Root, limits: &Limits) -> Result<Bundle, OciError> {
    let mut document = format::document(&read(&root, Path::new("index.json"))?)?;
    let mut digest = None;
    for _ in 0..DEPTH_MAX {
        match document {
            Document::Manifest(manifest) => return of_manifest(root, manifest, digest, limits),
            Document::Index(descriptor) => {
                document = format::document(&read_blob(&root, &descriptor)?)?;
                digest = Some(descriptor.digest);
            }
        }
    }
    Err(OciError::Malformed("its lists of images lead on and on"))
}

/// The image of a manifest whose blobs are in the root.
pub(super) fn of_manifest(
    root: Root,
    manifest: format::ImageManifest,
    digest: Option<Digest>,
    limits: &Limits,
) -> Result<Bundle, OciError> {
    let (config, unpacked) = format::config(&read_blob(&root, &manifest.config)?)?;
    if unpacked.len() != manifest.layers.len() {
        return Err(OciError::Malformed("its configuration has other layers than its manifest"));
    }
    let packed = manifest.layers.iter().fold(0_u64, |sum, layer| sum.saturating_add(layer.size));
    if packed > limits.bytes {
        return Err(OciError::TooLarge { what: "bytes", limit: limits.bytes });
    }
    let layers = manifest.layers.iter().zip(unpacked).map(|(layer, unpacked)| Layer {
        path: blob_path(layer.digest),
        blob: Some((layer.digest, layer.size)),
        unpacked,
    });
    Ok(Bundle { layers: layers.collect(), root, config, digest })
}

/// The image of an archive of `docker save`.
pub(super) fn of_docker(root: Root) -> Result<Bundle, OciError> {
    let text = read(&root, Path::new("manifest.json"))?;
    let mut manifests: Vec<DockerManifest> =
        serde_json::from_slice(&text).map_err(|source| OciError::Json { what: "manifest.json", source })?;
    let manifest = match manifests.len() {
        1 => manifests.remove(0),
        0 => return Err(OciError::Malformed("the archive has no image")),
        _ => return Err(OciError::Malformed("the archive has several images; save one")),
    };
    let (config, unpacked) = format::config(&read(&root, Path::new(&manifest.config))?)?;
    if manifest.layers.is_empty() || unpacked.len() != manifest.layers.len() {
        return Err(OciError::Malformed("its configuration has other layers than its manifest"));
    }
    if manifest.layers.len() > LAYERS_MAX {
        return Err(OciError::TooLarge { what: "layers", limit: LAYERS_MAX as u64 });
    }
    // Such a layer has no digest of its own; what it unpacks to has.
    let layers = manifest.layers.into_iter().zip(unpacked);
    let layers = layers.map(|(path, unpacked)| Layer { path: PathBuf::from(path), blob: None, unpacked });
    Ok(Bundle { layers: layers.collect(), root, config, digest: None })
}
