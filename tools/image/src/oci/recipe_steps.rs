//! Following a recipe: the base is unpacked, and commands are run in it.
//!
//! The commands are the base's own programs (its package manager), with root's rights, in namespaces of their own: they see their own
//! mounts and processes, and the tree as the root. Like any image builder's, they are trusted as much as the base is.

use std::path::Path;

use super::{OciError, source, tree};
use crate::Error;
use crate::assemble::{About, Contents, Parts, assemble};
use crate::build;
use crate::manifest::{Config, Manifest};
use crate::oci::limits::Limits;
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::root::Root;
use crate::store::Store;
use crate::tool::Tool;

/// Mounts what package managers expect, in the step's own mount namespace, and changes into the tree. `$1` is the tree, `$2` the step.
const ENTER: &str = "set -e
mount --bind \"$1\" \"$1\"; cd \"$1\"
mount -t tmpfs -o mode=755 dev ./dev
for node in null zero full random urandom tty; do touch ./dev/$node; mount --bind /dev/$node ./dev/$node; done
mount -t proc proc ./proc
exec chroot . /bin/sh -ec \"$2\"";

/// Builds an image by a recipe.
///
/// # Errors
/// [`Error`]; the store is then as it was.
pub async fn from_recipe(
    store: &Store,
    recipe: &Recipe,
    parts: &Parts,
    progress: &dyn Progress,
) -> Result<Manifest, Error> {
    build::must_be_root()?;
    let scratch = store.scratch()?;
    let (root, base, from) = tree(&scratch, &recipe.base, &Limits::default(), progress).await?;
    prepare(&root).map_err(Error::Tree)?;
    for step in &recipe.steps {
        progress.step(&format!("running {}", step.lines().next().unwrap_or_default()));
        run(root.path(), step).map_err(|source| OciError::Step { step: step.clone(), source })?;
    }
    root.write("etc/resolv.conf", b"", 0o644).map_err(Error::Tree)?;
    let mut source = source("recipe", &recipe.base, from.digest);
    source.reference = format!("{} on {}", recipe.name, recipe.base);
    let config = Config { entrypoint: recipe.entrypoint.clone(), cmd: Vec::new(), ..base };
    let flavour = Some(recipe.flavour.as_str().to_owned());
    let about = About { source, config, flavour, modules: true };
    assemble(store, &scratch, &Contents::Tree(&root), parts, about, progress)
}

/// Mount points, and the resolver of this machine while packages are downloaded.
fn prepare(root: &Root) -> std::io::Result<()> {
    // Links in their place would lead the mounts elsewhere.
    for directory in ["dev", "proc"] {
        root.remove(directory)?;
        root.make_directory(Path::new(directory))?;
    }
    let resolver = std::fs::read("/etc/resolv.conf").unwrap_or_default();
    root.write("etc/resolv.conf", &resolver, 0o644)
}

fn run(root: &Path, step: &str) -> Result<(), crate::tool::ToolError> {
    Tool::new("unshare", "util-linux")
        .args(["--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"])
        .args(["sh", "-c", ENTER, "step"])
        .arg(root)
        .arg(step)
        .run()
        .map(drop)
}
