//! Images of a registry: its documents and layers are downloaded into a layout, and believed only by their digests.

use std::io::Write as _;
use std::path::Path;
use std::str::FromStr as _;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use oci_client::Reference;
use oci_client::client::{Client, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;

use super::OciError;
use super::bundle::{self, Bundle, blob_path};
use super::format::{self, Descriptor, Document};
use super::limits::{DOCUMENT_BYTES_MAX, Limits};
use crate::digest::{Digest, Hashing, digest_of};
use crate::progress::Progress;
use crate::root::Root;

/// How long to wait for a connection, and for the next bytes.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);
const READ_LIMIT: Duration = Duration::from_secs(60);

/// Who asks for what.
struct Registry<'a> {
    client: Client,
    reference: &'a Reference,
    progress: &'a dyn Progress,
}

/// Downloads an image into `root`.
pub(super) async fn pull(
    root: Root,
    reference: &Reference,
    plain_http: bool,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<Bundle, OciError> {
    // The library leaves the choice of cryptography to the program. Where one was made, it stays.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let config = ClientConfig {
        protocol: if plain_http { ClientProtocol::Http } else { ClientProtocol::Https },
        connect_timeout: Some(CONNECT_LIMIT),
        read_timeout: Some(READ_LIMIT),
        user_agent: concat!("mashines/", env!("CARGO_PKG_VERSION")),
        ..ClientConfig::default()
    };
    let registry = Registry { client: Client::new(config), reference, progress };
    progress.step(&format!("asking {} for {}", reference.resolve_registry(), reference.repository()));
    let (manifest, digest) = registry.manifest().await?;
    let whole = manifest.layers.iter().fold(0_u64, |sum, layer| sum.saturating_add(layer.size));
    if whole > limits.bytes {
        return Err(OciError::TooLarge { what: "bytes", limit: limits.bytes });
    }
    if manifest.config.size > DOCUMENT_BYTES_MAX {
        return Err(OciError::TooLarge { what: "bytes of a document", limit: DOCUMENT_BYTES_MAX });
    }
    let blobs = Path::new("blobs/sha256");
    root.make_directory(blobs).map_err(OciError::io(blobs))?;
    registry.blob(&root, &manifest.config, "the configuration").await?;
    for (number, layer) in (1..).zip(&manifest.layers) {
        let what = format!("layer {number} of {}", manifest.layers.len());
        progress.step(&format!("downloading {what}"));
        registry.blob(&root, layer, &what).await?;
    }
    bundle::of_manifest(root, manifest, Some(digest), limits)
}

impl Registry<'_> {
    fn failed(&self) -> impl FnOnce(OciDistributionError) -> OciError {
        let reference = self.reference.whole();
        move |source| OciError::Registry { reference, source: Box::new(source) }
    }

    /// The manifest for this machine, and its digest.
    async fn manifest(&self) -> Result<(format::ImageManifest, Digest), OciError> {
        let mut wanted = match self.reference.digest() {
            Some(digest) => Some(Digest::from_str(digest)?),
            None => None,
        };
        let mut reference = self.reference.clone();
        let accepted = format::accepted();
        // A list, and an image of it.
        for _ in 0..2 {
            let pulled = self.client.pull_manifest_raw(&reference, &RegistryAuth::Anonymous, &accepted);
            let (bytes, _) = pulled.await.map_err(self.failed())?;
            if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
                return Err(OciError::TooLarge { what: "bytes of a document", limit: DOCUMENT_BYTES_MAX });
            }
            if let Some(wanted) = wanted {
                bundle::verify(&bytes, wanted, "the manifest")?;
            }
            match format::document(&bytes)? {
                Document::Manifest(manifest) => return Ok((manifest, digest_of(&bytes))),
                Document::Index(descriptor) => {
                    reference = self.reference.clone_with_digest(descriptor.digest.to_string());
                    wanted = Some(descriptor.digest);
                }
            }
        }
        Err(OciError::Malformed("its lists of images lead on and on"))
    }

    /// Downloads a blob, no byte more than was promised, and checks it.
    async fn blob(&self, root: &Root, descriptor: &Descriptor, what: &str) -> Result<(), OciError> {
        let path = blob_path(descriptor.digest);
        if root.open_file(&path).is_ok() {
            return Ok(());
        }
        let digest = descriptor.digest.to_string();
        let mut stream =
            self.client.pull_blob_stream(self.reference, digest.as_str()).await.map_err(self.failed())?;
        let length = |found| OciError::Length { what: what.to_owned(), wanted: descriptor.size, found };
        let file = root.create(&path).map_err(OciError::io(&path))?;
        let mut hashing = Hashing::new(file);
        let mut found = 0_u64;
        loop {
            let chunk = match stream.stream.try_next().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break,
                Err(error) => return Err(self.failed()(OciDistributionError::IoError(error))),
            };
            found = found.saturating_add(chunk.len() as u64);
            if found > descriptor.size {
                return Err(length(found));
            }
            hashing.write_all(&chunk).map_err(OciError::io(&path))?;
            self.progress.bytes(found, Some(descriptor.size));
        }
        if found != descriptor.size {
            return Err(length(found));
        }
        let (came, _, _) = hashing.finish();
        if came == descriptor.digest {
            return Ok(());
        }
        Err(OciError::Digest { what: what.to_owned(), wanted: descriptor.digest, found: came })
    }
}
