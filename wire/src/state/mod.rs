//! State archives.
