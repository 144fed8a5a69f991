//! What a long job tells about itself. The library says it, the program shows it.

/// Who is told.
pub trait Progress: Send + Sync {
    /// A step begins, for example `downloading linux-image-cloud-amd64`.
    fn step(&self, text: &str);
    /// Of the step's bytes, `done` are done; `total` where it is known.
    fn bytes(&self, done: u64, total: Option<u64>);
    /// Something a person should know that is no failure.
    fn note(&self, text: &str);
}

/// Nobody is told.
pub struct Silent;

impl Progress for Silent {
    fn step(&self, _: &str) {}
    fn bytes(&self, _: u64, _: Option<u64>) {}
    fn note(&self, _: &str) {}
}
