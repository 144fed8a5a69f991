//! Recipes: images made of a base in a registry, by installing packages in it. They are data, in `recipes/`.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::debian::Flavour;
use crate::oci::{From, OciError};

/// The recipes that come with the program.
const TEXTS: [(&str, &str); 6] = [
    ("ubuntu-22.04", include_str!("../recipes/ubuntu-22.04.toml")),
    ("ubuntu-24.04", include_str!("../recipes/ubuntu-24.04.toml")),
    ("alpine-3.19", include_str!("../recipes/alpine-3.19.toml")),
    ("alpine-3.20", include_str!("../recipes/alpine-3.20.toml")),
    ("alpine-3.21", include_str!("../recipes/alpine-3.21.toml")),
    ("alpine-3.22", include_str!("../recipes/alpine-3.22.toml")),
];

/// A recipe, with a flavour chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// Its name.
    pub name: String,
    /// What it is made of.
    pub base: From,
    /// The flavour.
    pub flavour: Flavour,
    /// Shell commands, run in the image, in this order.
    pub steps: Vec<String>,
    /// What starts the machine.
    pub entrypoint: Vec<String>,
}

/// Why a recipe cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// No such recipe.
    #[error("there is no recipe `{0}`")]
    Unknown(String),
    /// It takes no packages.
    #[error("recipe `{0}` takes no --package")]
    Packages(String),
    /// It has no base.
    #[error("`{0}` is not made of a base: it takes no --base")]
    NoBase(String),
    /// It has no such flavour.
    #[error("recipe `{0}` does not have that flavour")]
    Flavour(String),
    /// It cannot be read.
    #[error("recipe `{name}` cannot be read")]
    Read {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: toml::de::Error,
    },
    /// Its base is none.
    #[error("recipe `{name}` has no usable base")]
    Base {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: Box<OciError>,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    /// A reference.
    base: String,
    /// What starts the machine.
    entrypoint: Vec<String>,
    /// A command that is followed by packages.
    install: String,
    /// What all flavours have.
    packages: Vec<String>,
    /// Commands before.
    #[serde(default)]
    before: Vec<String>,
    /// Commands after.
    #[serde(default)]
    after: Vec<String>,
    /// What flavours have besides.
    flavour: BTreeMap<String, More>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct More {
    packages: Vec<String>,
    after: Vec<String>,
}

impl Recipe {
    /// The recipe of that name.
    ///
    /// # Errors
    /// When there is none, or none of that flavour.
    pub fn named(name: &str, flavour: Option<Flavour>) -> Result<Self, RecipeError> {
        let (_, text) = TEXTS
            .iter()
            .find(|(known, _)| *known == name)
            .ok_or_else(|| RecipeError::Unknown(name.chars().take(100).collect()))?;
        Self::parse(name, text, flavour.unwrap_or(Flavour::Dockerd))
    }

    /// Reads a recipe.
    ///
    /// # Errors
    /// When it is wrong, or has no such flavour.
    pub fn parse(name: &str, text: &str, flavour: Flavour) -> Result<Self, RecipeError> {
        let text: Text =
            toml::from_str(text).map_err(|source| RecipeError::Read { name: name.to_owned(), source })?;
        let base = From::parse(&text.base, false)
            .map_err(|source| RecipeError::Base { name: name.to_owned(), source: Box::new(source) })?;
        let more = text.flavour.get(flavour.as_str()).ok_or_else(|| RecipeError::Flavour(name.to_owned()))?;
        let packages: Vec<&str> = text.packages.iter().chain(&more.packages).map(String::as_str).collect();
        let mut steps = text.before;
        if !packages.is_empty() {
            steps.push(format!("{} {}", text.install, packages.join(" ")));
        }
        steps.extend(text.after.into_iter().chain(more.after.iter().cloned()));
        Ok(Self { name: name.to_owned(), base, flavour, steps, entrypoint: text.entrypoint })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_recipes_are_whole() {
        for (name, _) in TEXTS {
            for flavour in Flavour::ALL {
                let recipe = Recipe::named(name, Some(flavour)).unwrap();
                assert!(matches!(&recipe.base, From::Registry { plain_http: false, .. }), "{name}");
                assert!(recipe.base.to_string().ends_with(&name.replace('-', ":")), "{name}");
                let all = recipe.steps.join("\n");
                assert!(all.contains("openssh"), "{name} has no ssh server");
                // No two machines with one key.
                assert!(all.contains("rm -f /etc/ssh/ssh_host_"), "{name} keeps host keys");
                assert_eq!(all.contains("podman"), flavour == Flavour::Podman, "{name}");
                assert_eq!(all.contains("compose"), flavour != Flavour::Minimal, "{name}");
                // Ubuntu's machines run Debian's kernel, where dockerd starts no container without its parser.
                let armed = name.starts_with("ubuntu") && flavour == Flavour::Dockerd;
                assert_eq!(all.contains("apparmor"), armed, "{name}");
                assert!(!recipe.entrypoint.is_empty());
            }
        }
    }

    #[test]
    fn wrong_recipes_are_refused() {
        assert!(matches!(Recipe::named("debian-13", None), Err(RecipeError::Unknown(_))));
        let good = "base = \"oci:/x\"\nentrypoint = [\"/init\"]\ninstall = \"add\"\npackages = []\n[flavour.minimal]\n";
        assert!(Recipe::parse("x", good, Flavour::Minimal).is_ok());
        assert!(matches!(Recipe::parse("x", good, Flavour::Podman), Err(RecipeError::Flavour(_))));
        let unknown = format!("typo = 1\n{good}");
        assert!(matches!(Recipe::parse("x", &unknown, Flavour::Minimal), Err(RecipeError::Read { .. })));
        let base = good.replace("oci:/x", "/no/such");
        assert!(matches!(Recipe::parse("x", &base, Flavour::Minimal), Err(RecipeError::Base { .. })));
    }
}
