//! Images that lab hosts have from the start, as a host has those of machines it ran before. To fetch one takes an emulated host minutes.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;

use crate::fleet;

/// What is read of an image's manifest: which files it is made of.
#[derive(Deserialize)]
struct Manifest {
    disk: File,
    kernel: Option<File>,
    initrd: Option<File>,
}

#[derive(Deserialize)]
struct File {
    digest: String,
}

/// A directory with what a host's disk is to have at first; gone when dropped.
#[derive(Debug)]
pub(super) struct Seed(PathBuf);

impl Seed {
    /// Lays the files of `images`, which are in `store`, where `mashined` looks for them.
    ///
    /// # Errors
    /// When an image is not in the store.
    pub(super) fn lay(at: PathBuf, store: &Path, images: &[String]) -> Result<Self> {
        let seed = Self(at);
        let blobs = seed.0.join("images/blobs/sha256");
        std::fs::create_dir_all(&blobs).with_context(|| format!("making {}", blobs.display()))?;
        for image in images {
            for digest in digests(store, image)? {
                let from = store.join("blobs/sha256").join(&digest);
                let to = blobs.join(&digest);
                if to.exists() {
                    continue;
                }
                std::fs::hard_link(&from, &to)
                    .or_else(|_| std::fs::copy(&from, &to).map(drop))
                    .with_context(|| format!("taking {} of the image {image}", from.display()))?;
            }
        }
        Ok(seed)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        let _best_effort = std::fs::remove_dir_all(&self.0);
    }
}

/// Whether all of `images` are here, asked before the long work begins.
///
/// # Errors
/// The first that is not.
pub fn check(images: &[String]) -> Result<()> {
    images.iter().try_for_each(|image| digests(&fleet::images(), image).map(drop))
}

fn digests(store: &Path, image: &str) -> Result<Vec<String>> {
    let path = store.join("images").join(format!("{image}.json"));
    let text = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => bail!(
            "there is no image {image} in {}: `mashines image ls` lists them, `mashines image build` makes them",
            store.display()
        ),
        text => text.with_context(|| format!("reading {}", path.display()))?,
    };
    let manifest: Manifest =
        serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))?;
    let files = [Some(manifest.disk), manifest.kernel, manifest.initrd].into_iter().flatten();
    files
        .map(|file| {
            let hex =
                file.digest.strip_prefix("sha256:").filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
            hex.map(str::to_owned).ok_or_else(|| anyhow!("{}: {} is no digest", path.display(), file.digest))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_an_image_are_laid_and_swept_away() {
        let dir = tempfile::tempdir().unwrap();
        let (store, at) = (dir.path().join("store"), dir.path().join("seed"));
        std::fs::create_dir_all(store.join("blobs/sha256")).unwrap();
        std::fs::create_dir_all(store.join("images")).unwrap();
        std::fs::write(store.join("blobs/sha256/ab12"), "disk").unwrap();
        std::fs::write(store.join("images/x.json"), r#"{"disk": {"digest": "sha256:ab12"}, "kernel": null}"#)
            .unwrap();
        std::fs::write(store.join("images/bad.json"), r#"{"disk": {"digest": "sha256:../x"}}"#).unwrap();
        let seed = Seed::lay(at.clone(), &store, &["x".to_owned(), "x".to_owned()]).unwrap();
        assert_eq!(std::fs::read(seed.path().join("images/blobs/sha256/ab12")).unwrap(), b"disk");
        drop(seed);
        assert!(!at.exists());
        for wrong in ["bad", "nothing"] {
            assert!(Seed::lay(at.clone(), &store, &[wrong.to_owned()]).is_err(), "{wrong}");
            assert!(!at.exists());
        }
    }
}
