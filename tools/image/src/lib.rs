//! Images of machines: what a machine boots from, kept by content.
//!
//! An image is a root disk, a kernel, an initial RAM disk and a command line. The three files are blobs named by their SHA-256; a
//! [`manifest`] names them. The [`store`] is a directory that the command line fills and that the control plane and hosts read.
//!
//! * [`digest`], [`name`], [`manifest`]: the store's vocabulary. * [`store`]: publishing, listing, removing.
//! * [`root`]: an image's file tree while it is made; no path of a foreign archive leads out of it.
//! * [`disk`]: a tree becomes an ext4 file system. * [`kernel`]: a Debian package or a file becomes a kernel and its modules.
//! * [`initrd`]: init and the few modules that reach the root disk. * [`assemble`]: all of these make an image.
//! * [`debian`], [`busybox`]: images built here. * [`recipe`]: images built from a base in a registry.
//! * [`oci`]: images that others made, from registries, layouts and archives. * [`build`]: whole jobs.
//!
//! What goes wrong is a typed error ([`Error`]) with a remedy, and leaves the store as it was: everything is made in a scratch
//! directory and appears in one rename. Scratch of a process that died is removed by the next one.

pub mod assemble;
pub mod build;
pub mod busybox;
pub mod debian;
pub mod digest;
pub mod disk;
pub mod elf;
mod error;
pub mod initrd;
pub mod kernel;
pub mod manifest;
pub mod name;
pub mod oci;
pub mod progress;
pub mod recipe;
pub mod root;
pub mod store;
pub mod tool;

pub use error::Error;
