//! Recipes.

use crate::debian::Flavour;

/// A recipe.
#[derive(Debug, Clone)]
pub struct Recipe;

impl Recipe {
    /// X.
    pub fn named(name: &str, _: Option<Flavour>) -> Result<Self, RecipeError> {
        Err(RecipeError::Unknown(name.to_owned()))
    }
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
    /// It has no such flavour.
    #[error("recipe `{0}` does not have that flavour")]
    Flavour(String),
}
