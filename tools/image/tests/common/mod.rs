//! Images and archives that the tests make.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use image::digest::{Digest, digest_of};
use image::oci::limits::Limits;
use image::oci::{From, OciError};
use image::progress::Silent;
use image::root::Root;
use image::store::{Scratch, Store};
use tar::{Builder, EntryType, Header};

/// Skips loudly what needs root: files of other owners.
pub fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIPPED: {test} needs root, because it makes files of other owners");
    }
    root
}

/// One entry of an archive; names go in as they are, however wrong.
pub struct Entry {
    pub path: Vec<u8>,
    pub kind: EntryType,
    pub link: Vec<u8>,
    pub content: Vec<u8>,
    pub mode: u32,
    pub uid: u64,
    pub pax: Vec<(String, Vec<u8>)>,
    pub size: Option<u64>,
}

impl Entry {
    pub fn new(path: impl AsRef<[u8]>, kind: EntryType) -> Self {
        let mode = if kind == EntryType::Directory { 0o755 } else { 0o644 };
        Self {
            path: path.as_ref().to_owned(),
            kind,
            link: Vec::new(),
            content: Vec::new(),
            mode,
            uid: 0,
            pax: Vec::new(),
            size: None,
        }
    }

    pub fn file(path: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> Self {
        Self { content: content.as_ref().to_owned(), ..Self::new(path, EntryType::Regular) }
    }

    pub fn directory(path: impl AsRef<[u8]>) -> Self {
        Self::new(path, EntryType::Directory)
    }

    pub fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self { link: target.as_ref().to_owned(), ..Self::new(path, EntryType::Symlink) }
    }

    pub fn hard_link(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self { link: target.as_ref().to_owned(), ..Self::new(path, EntryType::Link) }
    }

    #[must_use]
    pub fn pax(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax.push((key.to_owned(), value.as_ref().to_owned()));
        self
    }
}

/// A tar of these entries.
pub fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for entry in entries {
        if !entry.pax.is_empty() {
            let records = entry.pax.iter().map(|(key, value)| (key.as_str(), &**value));
            builder.append_pax_extensions(records).unwrap();
        }
        let mut header = Header::new_gnu();
        if entry.path.len() > 100 {
            let mut long = Header::new_gnu();
            long.set_entry_type(EntryType::GNULongName);
            long.set_size(entry.path.len() as u64 + 1);
            long.set_cksum();
            let mut name = entry.path.clone();
            name.push(0);
            builder.append(&long, &*name).unwrap();
        }
        // By hand: the library refuses names that a hostile archive has.
        let name = &mut header.as_old_mut().name;
        name.iter_mut().zip(&entry.path).for_each(|(to, from)| *to = *from);
        let link = &mut header.as_old_mut().linkname;
        link.iter_mut().zip(&entry.link).for_each(|(to, from)| *to = *from);
        header.set_entry_type(entry.kind);
        header.set_mode(entry.mode);
        header.set_uid(entry.uid);
        header.set_gid(entry.uid);
        header.set_mtime(1_600_000_000);
        header.set_size(entry.size.unwrap_or(entry.content.len() as u64));
        header.set_cksum();
        builder.append(&header, &*entry.content).unwrap();
    }
    builder.into_inner().unwrap()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

/// A layer as it is stored: media type, blob, and the digest of what it unpacks to.
pub struct Packed {
    pub media_type: &'static str,
    pub blob: Vec<u8>,
    pub unpacked: Digest,
}

pub fn plain_layer(entries: &[Entry]) -> Packed {
    let tar = tar(entries);
    Packed { media_type: "application/vnd.oci.image.layer.v1.tar", unpacked: digest_of(&tar), blob: tar }
}

pub fn gzip_layer(entries: &[Entry]) -> Packed {
    let tar = tar(entries);
    Packed {
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip",
        unpacked: digest_of(&tar),
        blob: gzip(&tar),
    }
}

pub fn zstd_layer(entries: &[Entry]) -> Packed {
    let tar = tar(entries);
    Packed {
        media_type: "application/vnd.oci.image.layer.v1.tar+zstd",
        unpacked: digest_of(&tar),
        blob: zstd(&tar),
    }
}

/// The blobs of an image: configuration, layers, manifest last.
pub struct Image {
    pub blobs: Vec<Vec<u8>>,
    pub manifest: Vec<u8>,
    pub config: Vec<u8>,
}

pub fn image(layers: &[Packed]) -> Image {
    let ids: Vec<String> = layers.iter().map(|layer| layer.unpacked.to_string()).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Entrypoint": ["/app"], "Cmd": ["--serve"], "Env": ["A=b"], "User": "7:7", "WorkingDir": "/srv",
                    "StopSignal": "SIGINT", "ExposedPorts": { "80/tcp": {} } },
        "rootfs": { "type": "layers", "diff_ids": ids },
    });
    let config = serde_json::to_vec(&config).unwrap();
    let described: Vec<_> = layers
        .iter()
        .map(|layer| serde_json::json!({ "mediaType": layer.media_type, "digest": digest_of(&layer.blob), "size": layer.blob.len() }))
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest_of(&config), "size": config.len() },
        "layers": described,
    });
    let manifest = serde_json::to_vec(&manifest).unwrap();
    let mut blobs: Vec<Vec<u8>> = layers.iter().map(|layer| layer.blob.clone()).collect();
    blobs.push(config.clone());
    blobs.push(manifest.clone());
    Image { blobs, manifest, config }
}

/// Writes an OCI layout of an image.
pub fn layout(directory: &Path, image: &Image) {
    fs::create_dir_all(directory.join("blobs/sha256")).unwrap();
    for blob in &image.blobs {
        fs::write(directory.join("blobs/sha256").join(digest_of(blob).hex()), blob).unwrap();
    }
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": digest_of(&image.manifest), "size": image.manifest.len(),
        "platform": { "os": "linux", "architecture": "amd64" } }] });
    fs::write(directory.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
    fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// A place to unpack to.
pub struct Ground {
    pub directory: tempfile::TempDir,
    pub store: Store,
}

impl Ground {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("store")).unwrap();
        Self { directory, store }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Unpacks what `from` has.
    pub fn tree(&self, from: &str, limits: &Limits) -> Result<(Scratch, Root), OciError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let scratch = self.store.scratch().unwrap();
        let from = From::parse(from, false)?;
        let (root, _, _) = runtime.block_on(image::oci::tree(&scratch, &from, limits, &Silent))?;
        Ok((scratch, root))
    }

    /// Unpacks an image of these layers, through a layout.
    pub fn layers(&self, layers: &[Packed], limits: &Limits) -> Result<(Scratch, Root), OciError> {
        let directory = tempfile::tempdir_in(self.directory.path()).unwrap();
        layout(directory.path(), &image(layers));
        self.tree(&format!("oci:{}", directory.path().display()), limits)
    }

    /// What is left in the scratch directory.
    pub fn left_behind(&self) -> usize {
        fs::read_dir(self.path("store/scratch")).unwrap().count()
    }
}
