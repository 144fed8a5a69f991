//! Images that others made.

use crate::Error;
use crate::assemble::Parts;
use crate::manifest::Manifest;
use crate::name::ImageName;
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::store::Store;

/// Why an image cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// TODO
    #[error("not yet")]
    NotYet,
}

impl OciError {
    /// What to do about it.
    pub const fn remedy(&self) -> &'static str {
        ""
    }
}

/// X.
#[derive(Debug)]
pub struct From;

impl From {
    /// X.
    pub fn parse(_: &str, _: bool) -> Result<Self, OciError> {
        Err(OciError::NotYet)
    }
    /// X.
    pub fn name(&self) -> Option<ImageName> {
        None
    }
}

/// X.
pub async fn from_recipe(_: &Store, _: &Recipe, _: &Parts, _: &dyn Progress) -> Result<Manifest, Error> {
    Err(OciError::NotYet.into())
}
/// X.
pub async fn import(_: &Store, _: &From, _: &Parts, _: bool, _: &dyn Progress) -> Result<Manifest, Error> {
    Err(OciError::NotYet.into())
}
