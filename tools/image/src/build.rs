//! Whole jobs: an image is built here, or imported.

use crate::assemble::{About, Contents, Parts, assemble, precheck};
use crate::debian::Flavour;
use crate::manifest::{Manifest, Source};
use crate::progress::Progress;
use crate::recipe::{Recipe, RecipeError};
use crate::root;
use crate::store::Store;
use crate::{Error, busybox, debian, oci};

/// What is built.
#[derive(Debug, Clone)]
pub enum Build {
    /// The small image for tests.
    Busybox,
    /// Debian 12.
    Debian {
        /// Its flavour.
        flavour: Flavour,
        /// More packages.
        packages: Vec<String>,
    },
    /// An image of a registry, made ours.
    Recipe(Recipe),
}

impl Build {
    /// What the words of a command line mean.
    ///
    /// # Errors
    /// When there is no such recipe, or it takes no flavour, packages or base.
    pub fn new(
        name: &str,
        flavour: Option<Flavour>,
        packages: Vec<String>,
        base: Option<oci::From>,
    ) -> Result<Self, RecipeError> {
        let is_own = ["busybox", "debian-12"].contains(&name);
        if is_own && base.is_some() {
            return Err(RecipeError::NoBase(name.to_owned()));
        }
        if name == "debian-12" {
            return Ok(Self::Debian { flavour: flavour.unwrap_or(Flavour::Dockerd), packages });
        }
        if !packages.is_empty() {
            return Err(RecipeError::Packages(name.to_owned()));
        }
        match (name, flavour) {
            ("busybox", None) => Ok(Self::Busybox),
            ("busybox", Some(_)) => Err(RecipeError::Flavour(name.to_owned())),
            (name, flavour) => {
                let recipe = Recipe::named(name, flavour)?;
                let base = base.unwrap_or_else(|| recipe.base.clone());
                Ok(Self::Recipe(Recipe { base, ..recipe }))
            }
        }
    }
}

fn recipe_source(name: &str) -> Source {
    Source { kind: "recipe".to_owned(), reference: name.to_owned(), digest: None }
}

/// Builds an image.
///
/// # Errors
/// [`Error`]; the store is then as it was.
pub async fn build(
    store: &Store,
    what: &Build,
    parts: &Parts,
    progress: &dyn Progress,
) -> Result<Manifest, Error> {
    precheck(parts)?;
    must_be_root()?;
    let tree = |scratch: &crate::store::Scratch| scratch.path().join("root");
    match what {
        Build::Busybox => {
            let scratch = store.scratch()?;
            progress.step("putting busybox together");
            let root = root::new(&tree(&scratch)).map_err(Error::Tree)?;
            let config = busybox::fill(&root)?;
            let about = About { source: recipe_source("busybox"), config, flavour: None, modules: false };
            assemble(store, &scratch, &Contents::Tree(&root), parts, about, progress)
        }
        Build::Debian { flavour, packages } => {
            let scratch = store.scratch()?;
            let (root, config) = debian::fill(&tree(&scratch), *flavour, packages, progress)?;
            let flavour = Some(flavour.as_str().to_owned());
            let about = About { source: recipe_source("debian-12"), config, flavour, modules: true };
            assemble(store, &scratch, &Contents::Tree(&root), parts, about, progress)
        }
        Build::Recipe(recipe) => oci::from_recipe(store, recipe, parts, progress).await,
    }
}

/// Imports an image.
///
/// # Errors
/// [`Error`]; the store is then as it was.
pub async fn import(
    store: &Store,
    from: &oci::From,
    parts: &Parts,
    modules: bool,
    progress: &dyn Progress,
) -> Result<Manifest, Error> {
    precheck(parts)?;
    oci::import(store, from, parts, modules, progress).await
}

/// Trees have files of many owners.
pub(crate) fn must_be_root() -> Result<(), Error> {
    if rustix::process::geteuid().is_root() { Ok(()) } else { Err(Error::NotRoot) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_takes_another_base_and_no_packages() {
        let mirror = || oci::From::parse("mirror.example/ubuntu:22.04", false).ok();
        let made = Build::new("ubuntu-22.04", None, Vec::new(), mirror());
        assert!(matches!(made, Ok(Build::Recipe(recipe)) if Some(&recipe.base) == mirror().as_ref()));
        for own in ["busybox", "debian-12"] {
            assert!(matches!(Build::new(own, None, Vec::new(), mirror()), Err(RecipeError::NoBase(_))));
        }
        let packages = vec!["vim".to_owned()];
        assert!(matches!(Build::new("alpine-3.22", None, packages, None), Err(RecipeError::Packages(_))));
    }
}
