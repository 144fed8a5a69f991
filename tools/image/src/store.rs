//! The directory that images are kept in.
//!
//! ```text
//! blobs/sha256/<64 hex>   root disks, kernels, initial RAM disks: read-only, named by their content
//! images/<name>.json      manifests; a tag is `<name>@<tag>.json`
//! scratch/                what is being made; a directory whose maker died is removed by the next one
//! cache/                  downloads that can be had again
//! lock                    held for the few renames that publish or remove, never while something is made
//! ```
//!
//! Everything appears by rename, after it was written and synced: a reader sees a whole image or none, and needs no lock. Whoever has
//! opened a blob keeps it, also when it is removed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};

use crate::digest::{Digest, Hashing, ParseIdError};
use crate::manifest::{BYTES_MAX, Blob, Manifest, SCHEMA};
use crate::name::ImageName;

/// A store.
#[derive(Debug, Clone)]
pub struct Store {
    directory: PathBuf,
}

/// Why a store did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system said no.
    #[error("cannot {doing} {}", .path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No such image.
    #[error("there is no image `{0}`")]
    NoSuchImage(ImageName),
    /// A manifest that cannot be read.
    #[error("the manifest {} cannot be read", .path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A manifest of another release, too long, or in another image's place.
    #[error("the manifest {} is not one of this release: {why}", .path.display())]
    Unsuitable {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A manifest names a blob that is not there, or not whole.
    #[error("image `{name}` lacks its {what} ({digest})")]
    Incomplete {
        /// The image.
        name: ImageName,
        /// The file.
        what: &'static str,
        /// Its name.
        digest: Digest,
    },
}

type Result<T> = std::result::Result<T, StoreError>;

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { doing, path, source }
}

/// A file that is ready to become a blob: written, synced, hashed.
#[derive(Debug)]
pub struct Admitted {
    path: PathBuf,
    /// What it will be called.
    pub blob: Blob,
}

/// What `remove` freed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freed {
    /// Blobs.
    pub blobs: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// A directory of its own for something that is being made; it goes when this is dropped.
#[derive(Debug)]
pub struct Scratch {
    directory: tempfile::TempDir,
    began: SystemTime,
    // Its lock says that the maker lives.
    _alive: File,
}

impl Scratch {
    /// The directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// When it was made.
    pub fn began(&self) -> SystemTime {
        self.began
    }
}

impl Store {
    /// The store in `directory`, which is made where it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(directory: &Path) -> Result<Self> {
        let store = Self { directory: directory.to_owned() };
        for path in [store.blobs(), store.images(), store.scratch_directory(), store.cache()] {
            fs::create_dir_all(&path).map_err(io_error("make", &path))?;
        }
        // What is being unpacked has other systems' owners and set-uid programs.
        let scratch = store.scratch_directory();
        fs::set_permissions(&scratch, fs::Permissions::from_mode(0o700))
            .map_err(io_error("protect", &scratch))?;
        Ok(store)
    }

    /// The store in `directory` for reading; one that does not exist has no images.
    pub fn reading(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// The directory of downloads that can be had again.
    pub fn cache(&self) -> PathBuf {
        self.directory.join("cache")
    }

    fn blobs(&self) -> PathBuf {
        self.directory.join("blobs/sha256")
    }

    fn images(&self) -> PathBuf {
        self.directory.join("images")
    }

    fn scratch_directory(&self) -> PathBuf {
        self.directory.join("scratch")
    }

    /// The file of a blob.
    pub fn blob(&self, digest: Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    fn lock(&self) -> Result<File> {
        let path = self.directory.join("lock");
        let options = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = options.map_err(io_error("open", &path))?;
        flock(&file, FlockOperation::LockExclusive)
            .map_err(io::Error::from)
            .map_err(io_error("lock", &path))?;
        Ok(file)
    }

    /// A scratch directory on the store's file system; removes those of makers that died.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn scratch(&self) -> Result<Scratch> {
        let _lock = self.lock()?;
        let parent = self.scratch_directory();
        for entry in fs::read_dir(&parent).map_err(io_error("read", &parent))?.flatten() {
            let path = entry.path();
            let dead = File::open(&path)
                .is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok());
            // One that cannot be removed now is tried again next time.
            if dead && fs::remove_dir_all(&path).is_err() {
                continue;
            }
        }
        let directory = tempfile::Builder::new()
            .prefix("make-")
            .tempdir_in(&parent)
            .map_err(io_error("make", &parent))?;
        let alive = File::open(directory.path()).map_err(io_error("open", directory.path()))?;
        flock(&alive, FlockOperation::NonBlockingLockExclusive)
            .map_err(io::Error::from)
            .map_err(io_error("lock", directory.path()))?;
        Ok(Scratch { directory, began: SystemTime::now(), _alive: alive })
    }

    /// Hashes and syncs a file of a scratch directory of this store.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn admit(&self, path: &Path) -> Result<Admitted> {
        let file = File::open(path).map_err(io_error("open", path))?;
        file.set_permissions(fs::Permissions::from_mode(0o444)).map_err(io_error("protect", path))?;
        file.sync_all().map_err(io_error("sync", path))?;
        let mut hashing = Hashing::new(file);
        let mut buffer = vec![0; 1 << 20];
        while hashing.read(&mut buffer).map_err(io_error("read", path))? > 0 {}
        let (digest, bytes, _) = hashing.finish();
        Ok(Admitted { path: path.to_owned(), blob: Blob { digest, bytes } })
    }

    /// Makes an image appear, instead of one of the same name. Its blobs are those admitted, or in the store already.
    ///
    /// # Errors
    /// When a blob is missing or cannot be moved; then the image of that name is the one it was.
    pub fn publish(&self, manifest: &Manifest, files: Vec<Admitted>) -> Result<()> {
        let text = serde_json::to_vec_pretty(manifest)
            .map_err(|source| StoreError::Manifest { path: self.manifest_path(&manifest.name), source })?;
        let _lock = self.lock()?;
        for file in files {
            let path = self.blob(file.blob.digest);
            if self.has(file.blob) {
                continue;
            }
            fs::rename(&file.path, &path).map_err(io_error("move a file to", &path))?;
        }
        sync_directory(&self.blobs())?;
        self.whole(manifest)?;
        let images = self.images();
        let mut file = tempfile::Builder::new()
            .prefix(".new-")
            .permissions(fs::Permissions::from_mode(0o644))
            .tempfile_in(&images)
            .map_err(io_error("write in", &images))?;
        let path = self.manifest_path(&manifest.name);
        file.write_all(&text).and_then(|()| file.as_file().sync_all()).map_err(io_error("write", &path))?;
        file.persist(&path).map_err(|error| error.error).map_err(io_error("write", &path))?;
        sync_directory(&images)
    }

    fn has(&self, blob: Blob) -> bool {
        fs::metadata(self.blob(blob.digest)).is_ok_and(|found| found.is_file() && found.len() == blob.bytes)
    }

    /// Checks that the image's blobs are there, with their lengths.
    ///
    /// # Errors
    /// [`StoreError::Incomplete`].
    pub fn whole(&self, manifest: &Manifest) -> Result<()> {
        let kernel = Blob { digest: manifest.kernel.digest, bytes: manifest.kernel.bytes };
        for (what, blob) in [("root disk", manifest.disk), ("kernel", kernel), ("initrd", manifest.initrd)] {
            if !self.has(blob) {
                return Err(StoreError::Incomplete {
                    name: manifest.name.clone(),
                    what,
                    digest: blob.digest,
                });
            }
        }
        Ok(())
    }

    fn manifest_path(&self, name: &ImageName) -> PathBuf {
        self.images().join(name.file())
    }

    /// The manifest of an image.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub fn image(&self, name: &ImageName) -> Result<Manifest> {
        read_manifest(&self.manifest_path(name), name)
    }

    /// All images by name.
    ///
    /// # Errors
    /// When one of them cannot be read.
    pub fn list(&self) -> Result<Vec<Manifest>> {
        let mut names = self.names()?;
        names.sort_unstable();
        let mut list = Vec::with_capacity(names.len());
        for name in names {
            match self.image(&name) {
                Ok(manifest) => list.push(manifest),
                // Removed since the directory was read.
                Err(StoreError::NoSuchImage(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(list)
    }

    fn names(&self) -> Result<Vec<ImageName>> {
        let images = self.images();
        let entries = match fs::read_dir(&images) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error("read", &images)(error)),
        };
        Ok(entries.flatten().filter_map(|entry| ImageName::from_file(entry.file_name().to_str()?)).collect())
    }

    /// Removes an image, and the blobs that no image names any more.
    ///
    /// # Errors
    /// When there is no such image, or another image's manifest cannot be read: then nobody knows what it names, and no blob goes.
    pub fn remove(&self, name: &ImageName) -> Result<Freed> {
        let path = self.manifest_path(name);
        if !path.exists() {
            return Err(StoreError::NoSuchImage(name.clone()));
        }
        let _lock = self.lock()?;
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::NoSuchImage(name.clone()));
            }
            Err(error) => return Err(io_error("remove", &path)(error)),
        }
        sync_directory(&self.images())?;
        self.collect()
    }

    /// Removes what no manifest names. The caller holds the lock, so nobody is about to name one.
    fn collect(&self) -> Result<Freed> {
        let named: Vec<Digest> = self.list()?.iter().flat_map(Manifest::digests).collect();
        let blobs = self.blobs();
        let mut freed = Freed::default();
        for entry in fs::read_dir(&blobs).map_err(io_error("read", &blobs))?.flatten() {
            let digest: std::result::Result<Digest, ParseIdError> =
                Digest::from_hex(entry.file_name().to_str().unwrap_or_default());
            // What is not a blob is not ours to remove.
            let Ok(digest) = digest else { continue };
            if named.contains(&digest) {
                continue;
            }
            let bytes = entry.metadata().map_or(0, |metadata| metadata.len());
            fs::remove_file(entry.path()).map_err(io_error("remove", &entry.path()))?;
            freed.blobs += 1;
            freed.bytes = freed.bytes.saturating_add(bytes);
        }
        Ok(freed)
    }
}

fn read_manifest(path: &Path, name: &ImageName) -> Result<Manifest> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(StoreError::NoSuchImage(name.clone()));
        }
        Err(error) => return Err(io_error("open", path)(error)),
    };
    let unsuitable = |why: String| StoreError::Unsuitable { path: path.to_owned(), why };
    let mut text = Vec::new();
    file.take(BYTES_MAX + 1).read_to_end(&mut text).map_err(io_error("read", path))?;
    if text.len() as u64 > BYTES_MAX {
        return Err(unsuitable(format!("it is longer than {BYTES_MAX} bytes")));
    }
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|source| StoreError::Manifest { path: path.to_owned(), source })?;
    if manifest.schema != SCHEMA {
        return Err(unsuitable(format!("its schema is {}, ours is {SCHEMA}", manifest.schema)));
    }
    if manifest.name != *name {
        return Err(unsuitable(format!("it is of `{}`", manifest.name)));
    }
    Ok(manifest)
}

fn sync_directory(path: &Path) -> Result<()> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(io_error("sync", path))
}
