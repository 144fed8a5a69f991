//! Images, kernels and initial RAM disks: files known by the digest of their content.
//!
//! A blob that is not here is fetched from the control plane, once however many ask for it, beside its final name, and gets
//! that name only when its bytes have the digest that was asked for. A fetch that breaks goes on where it was when it is asked for again.
//! Nothing is ever written under a final name twice, so a directory may be shared between hosts.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use sha2::{Digest as _, Sha256};
use tokio::sync::Mutex;
use wire::fleet::RefusalCode;
use wire::ids::Digest;
use wire::streams::{StreamAnswer, StreamRequest};
use wire::vmm::FileRef;

use super::Host;
use super::commands::Refusal;
use super::link;

/// Most bytes taken from the stream at a time.
const READ_BYTES: usize = 1 << 20;

/// The blobs of this host.
pub(super) struct Blobs {
    dir: PathBuf,
    /// One fetch at a time of each blob.
    turns: std::cell::RefCell<BTreeMap<Digest, Rc<Mutex<()>>>>,
}

impl Blobs {
    /// In this directory, which need not be there yet.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, turns: std::cell::RefCell::default() }
    }

    fn path(&self, digest: Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    fn turn(&self, digest: Digest) -> Rc<Mutex<()>> {
        self.turns.borrow_mut().entry(digest).or_default().clone()
    }
}

impl Host {
    /// Opens a file for reading, and gets it first if need be.
    pub(super) async fn open_file(self: &Rc<Self>, file: &FileRef) -> Result<File, Refusal> {
        match file {
            FileRef::Path(path) => File::open(path).map_err(|error| {
                Refusal::new(RefusalCode::BadBoot, format!("cannot open {path} on this host: {error}"))
            }),
            FileRef::Blob(digest) => self.open_blob(*digest).await,
        }
    }

    /// Opens a blob, and fetches it first if it is not here.
    pub(super) async fn open_blob(self: &Rc<Self>, digest: Digest) -> Result<File, Refusal> {
        let path = self.blobs.path(digest);
        let turn = self.blobs.turn(digest);
        let _one_at_a_time = turn.lock().await;
        match File::open(&path) {
            Ok(file) => return Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(no_blob(format!("cannot open {}: {error}", path.display()))),
        }
        tracing::info!(%digest, "fetching a blob from the control plane");
        let part = path.with_extension(format!("{}.part", self.config.name));
        let dir = path.parent().unwrap_or(&path);
        std::fs::create_dir_all(dir)
            .map_err(|error| no_blob(format!("cannot use {} for images: {error}", dir.display())))?;
        self.fetch(digest, &part).await?;
        let (checked, final_path) = (part.clone(), path.clone());
        let file = tokio::task::spawn_blocking(move || settle(digest, &checked, &final_path));
        file.await.map_err(Refusal::host)?
    }

    /// Appends to `part` what it lacks of the blob.
    async fn fetch(&self, digest: Digest, part: &Path) -> Result<(), Refusal> {
        let local = |error: io::Error| {
            let code = if error.kind() == io::ErrorKind::StorageFull {
                RefusalCode::NoDisk
            } else {
                RefusalCode::HostError
            };
            Refusal::new(code, format!("cannot write {}: {error}", part.display()))
        };
        let lost =
            |error: io::Error| no_blob(format!("{digest} did not arrive from the control plane: {error}"));
        let mut out = File::options().create(true).append(true).open(part).map_err(local)?;
        let offset = out.metadata().map_err(local)?.len();
        let connection = self.connection.borrow().clone();
        let connection = connection
            .ok_or_else(|| no_blob(format!("{digest} is not here, and there is no link to fetch it")))?;
        let (mut send, mut receive) = connection.open_bi().await.map_err(|e| lost(e.into()))?;
        link::write(&mut send, &StreamRequest::Blob { digest, offset }).await.map_err(lost)?;
        let total = match link::read::<StreamAnswer>(&mut receive).await.map_err(lost)? {
            StreamAnswer::Open { bytes } => bytes,
            StreamAnswer::Refused { code, detail } => return Err(Refusal::new(code, detail)),
        };
        let mut have = offset;
        while let Some(chunk) = receive.read_chunk(READ_BYTES, true).await.map_err(|e| lost(e.into()))? {
            out.write_all(&chunk.bytes).map_err(local)?;
            have += chunk.bytes.len() as u64;
        }
        if have == total {
            return Ok(());
        }
        Err(lost(io::Error::other(format!("{have} of {total} bytes came; try again to go on from there"))))
    }
}

fn no_blob(detail: String) -> Refusal {
    Refusal::new(RefusalCode::NoBlob, detail)
}

/// Checks a fetched blob and gives it its name.
fn settle(digest: Digest, part: &Path, path: &Path) -> Result<File, Refusal> {
    let local = |error: io::Error| no_blob(format!("cannot keep {digest}: {error}"));
    let found = digest_of(part).map_err(local)?;
    if found != digest {
        let _best_effort = std::fs::remove_file(part);
        return Err(no_blob(format!("the control plane sent {found} for {digest}: import the image again")));
    }
    File::open(part).and_then(|file| file.sync_all()).map_err(local)?;
    std::fs::rename(part, path).map_err(local)?;
    File::open(path).map_err(local)
}

fn digest_of(path: &Path) -> io::Result<Digest> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(Digest(hash.finalize().into())),
            bytes => hash.update(&buffer[..bytes]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_bytes_get_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let (part, path) = (dir.path().join("x.part"), dir.path().join("x"));
        std::fs::write(&part, b"abc").unwrap();
        assert!(settle(Digest([0; 32]), &part, &path).is_err());
        assert!(!part.exists() && !path.exists());
        std::fs::write(&part, b"abc").unwrap();
        let abc = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad".parse().unwrap();
        settle(abc, &part, &path).unwrap();
        assert_eq!(std::fs::read(path).unwrap(), b"abc");
    }
}
