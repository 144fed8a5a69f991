//! Images that others made: from registries, OCI layouts, archives of `docker save`, and disks.
//!
//! ```text
//!  registry ---------> downloads --+
//!  archive (tar) ----> unpacked  --+--> bundle: config + layers --> tree, layer by layer --> root disk
//!  oci:DIR -----------------------+
//! ```
//!
//! All of it is a stranger's word. Every blob must have the digest it was named by, the unpacked layers those of the configuration;
//! [`unpack`] keeps files inside the tree; [`limits`] bounds bytes, files and names. Whatever is wrong ends the import, and the
//! scratch directory goes with all that was unpacked.

mod bundle;
mod error;
mod format;
mod from;
pub mod layer;
pub mod limits;
mod member;
mod recipe_steps;
mod registry;
pub mod unpack;

use std::fs::File;
use std::io::Read as _;

pub use error::OciError;
pub use from::From;
pub use recipe_steps::from_recipe;

use self::bundle::Bundle;
use self::limits::Limits;
use crate::assemble::{About, Contents, Parts, assemble};
use crate::manifest::{Config, Manifest, Source};
use crate::progress::Progress;
use crate::root::{self, Root};
use crate::store::{Scratch, Store};
use crate::{Error, build, disk};

/// Imports an image.
///
/// # Errors
/// [`Error`]; the store is then as it was.
pub async fn import(
    store: &Store,
    from: &From,
    parts: &Parts,
    modules: bool,
    progress: &dyn Progress,
) -> Result<Manifest, Error> {
    let scratch = store.scratch()?;
    if let From::File(path) = from
        && is_disk(path)?
    {
        disk::check(path)?;
        let copy = scratch.path().join("disk");
        progress.step("copying the disk");
        std::fs::copy(path, &copy).map_err(OciError::io(path))?;
        let source = source("disk", from, None);
        let config = Config { entrypoint: vec!["/sbin/init".to_owned()], ..Config::default() };
        let about = About { source, config, flavour: None, modules: false };
        return assemble(store, &scratch, &Contents::Disk(&copy), parts, about, progress);
    }
    build::must_be_root()?;
    let (root, config, source) = tree(&scratch, from, &Limits::default(), progress).await?;
    let about = About { source, config, flavour: None, modules };
    assemble(store, &scratch, &Contents::Tree(&root), parts, about, progress)
}

/// Brings an image's files into a tree of the scratch directory.
///
/// # Errors
/// [`OciError`].
pub async fn tree(
    scratch: &Scratch,
    from: &From,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<(Root, Config, Source), OciError> {
    let (kind, bundle) = fetch(scratch, from, limits, progress).await?;
    let path = scratch.path().join("root");
    let root = root::new(&path).map_err(OciError::io(&path))?;
    let mut budget = limits.budget();
    for (number, layer) in (1..).zip(&bundle.layers) {
        progress.step(&format!("unpacking layer {number} of {}", bundle.layers.len()));
        let notes = layer::apply(&root, &bundle.root, layer, &mut budget)?;
        if notes.devices > 0 {
            progress.note(&format!("layer {number}: {} device nodes left out", notes.devices));
        }
        if notes.attributes > 0 {
            progress.note(&format!("layer {number}: {} extended attributes left out", notes.attributes));
        }
    }
    let source = source(kind, from, bundle.digest);
    Ok((root, bundle.config, source))
}

async fn fetch(
    scratch: &Scratch,
    from: &From,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<(&'static str, Bundle), OciError> {
    let directory = scratch.path().join("oci");
    match from {
        From::Layout(path) => {
            let root = Root::open(path).map_err(OciError::io(path))?;
            Ok(("oci-layout", bundle::of_layout(root, limits)?))
        }
        From::File(path) => {
            progress.step("unpacking the archive");
            let root = root::new(&directory).map_err(OciError::io(&directory))?;
            let file = File::open(path).map_err(OciError::io(path))?;
            let mut budget = limits.budget();
            layer::unpack_archive(&root, file, &mut budget)?;
            if root.has("index.json") {
                return Ok(("oci-archive", bundle::of_layout(root, limits)?));
            }
            Ok(("docker-archive", bundle::of_docker(root)?))
        }
        From::Registry { reference, plain_http } => {
            let root = root::new(&directory).map_err(OciError::io(&directory))?;
            Ok(("registry", registry::pull(root, reference, *plain_http, limits, progress).await?))
        }
    }
}

fn source(kind: &str, from: &From, digest: Option<crate::digest::Digest>) -> Source {
    Source { kind: kind.to_owned(), reference: from.to_string(), digest }
}

/// Whether a file begins like a disk and not like a tar. What is neither is unpacked, and that says what is wrong.
fn is_disk(path: &std::path::Path) -> Result<bool, OciError> {
    let mut start = Vec::new();
    let file = File::open(path).map_err(OciError::io(path))?;
    file.take(2048).read_to_end(&mut start).map_err(OciError::io(path))?;
    let tar = start.get(257..262) == Some(b"ustar");
    let packed = start.starts_with(&[0x1f, 0x8b]) || start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]);
    let partitions = start.get(510..512) == Some(&[0x55, 0xaa]);
    Ok(!tar && !packed && (disk::looks_like(&start) || partitions || start.starts_with(b"QFI\xfb")))
}
