//! `image`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use image::debian::Flavour;
use image::kernel::{Mirror, Suite};
use image::name::ImageName;

use crate::units::parse_size;

/// `image`.
#[derive(Debug, Subcommand)]
pub enum Image {
    /// Build an image: busybox, debian-12, or a recipe with a base in a registry.
    Build(BuildImage),
    /// Import an OCI image or a root disk.
    Import(ImportImage),
    /// List images.
    Ls {
        /// Where images are.
        #[command(flatten)]
        store: Store,
    },
    /// Remove images, and the files that no image needs any more.
    Rm {
        /// Their names.
        #[arg(value_name = "IMAGE", required = true)]
        names: Vec<ImageName>,
        /// Where images are.
        #[command(flatten)]
        store: Store,
    },
}

/// Where images are.
#[derive(Debug, Args)]
pub struct Store {
    /// Directory of images.
    #[arg(
        long = "store",
        value_name = "DIR",
        env = "MASHINES_IMAGES",
        default_value = "/var/lib/mashines/images"
    )]
    pub directory: PathBuf,
}

/// What images of every kind have.
#[derive(Debug, Args)]
pub struct ImagePart {
    /// Name of the image; made of what it is from when absent.
    #[arg(long, value_name = "NAME")]
    pub name: Option<ImageName>,
    /// Debian package with the kernel.
    #[arg(long, value_name = "PACKAGE", default_value = image::kernel::DEFAULT_PACKAGE, conflicts_with = "kernel")]
    pub kernel_package: String,
    /// Suite of Debian that package is from, for example bookworm-backports; what this machine's apt knows when absent.
    #[arg(long, value_name = "SUITE", conflicts_with = "kernel")]
    pub kernel_suite: Option<Suite>,
    /// Mirror of Debian for --kernel-suite; the one of this machine's apt when absent.
    #[arg(long, value_name = "URL", requires = "kernel_suite")]
    pub debian_mirror: Option<Mirror>,
    /// Kernel of this machine instead of a package's: a bzImage or a vmlinux.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The modules of --kernel: /lib/modules/RELEASE.
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub modules: Option<PathBuf>,
    /// Agent that becomes the machine's init; by default `mashine-agent` beside this program.
    #[arg(long, value_name = "FILE", env = "MASHINES_AGENT")]
    pub agent: Option<PathBuf>,
    /// Size of the root disk; by default what is in it, and a quarter.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub size: Option<u64>,
    /// More for the kernel's command line.
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Where images are.
    #[command(flatten)]
    pub store: Store,
}

/// `image build`.
#[derive(Debug, Args)]
pub struct BuildImage {
    /// busybox, debian-12, or ubuntu-22.04, ubuntu-24.04, alpine-3.19 to alpine-3.22.
    pub recipe: String,
    /// What is for containers in it: dockerd, podman or minimal (not in busybox).
    #[arg(long, value_name = "FLAVOUR")]
    pub flavour: Option<Flavour>,
    /// Base instead of the recipe's own: the same system from another registry, a layout or an archive, as for `import`.
    #[arg(long, value_name = "REF|PATH")]
    pub base: Option<String>,
    /// One more Debian package; may be repeated (debian-12 only).
    #[arg(long = "package", value_name = "PACKAGE")]
    pub packages: Vec<String>,
    /// What images of every kind have.
    #[command(flatten)]
    pub part: ImagePart,
}

/// `image import`.
#[derive(Debug, Args)]
pub struct ImportImage {
    /// A reference (debian:12), oci:DIR, a tar of `docker save` or of an OCI layout, or a raw ext4 file system.
    #[arg(value_name = "REF|PATH")]
    pub from: String,
    /// Speak plain HTTP to the registry; loopback registries are spoken to so anyway.
    #[arg(long)]
    pub plain_http: bool,
    /// Leave the kernel's modules out of the root disk.
    #[arg(long)]
    pub without_modules: bool,
    /// What images of every kind have.
    #[command(flatten)]
    pub part: ImagePart,
}
