//! Why there is no image, and what to do about it.

use std::io;

use crate::busybox::BusyboxError;
use crate::debian::DebianError;
use crate::disk::DiskError;
use crate::initrd::InitrdError;
use crate::kernel::KernelError;
use crate::oci::OciError;
use crate::recipe::RecipeError;
use crate::store::StoreError;
use crate::tool::ToolError;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The root disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initial RAM disk.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// An image that others made.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// Debian's packages.
    #[error(transparent)]
    Debian(#[from] DebianError),
    /// busybox.
    #[error(transparent)]
    Busybox(#[from] BusyboxError),
    /// Recipes.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// The image's files cannot be written.
    #[error("the image's files cannot be written")]
    Tree(#[source] io::Error),
    /// The command line.
    #[error("the kernel's command line is too long, or has characters that it cannot have")]
    Cmdline,
    /// Owners cannot be kept.
    #[error("files of other owners can only be made by root")]
    NotRoot,
}

impl Error {
    /// What to do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Store(StoreError::NoSuchImage(_)) => "see `mashines image ls`",
            Self::Store(StoreError::Io { .. }) => {
                "check the store's directory (--store or MASHINES_IMAGES), its owner and its free space"
            }
            Self::Store(StoreError::Incomplete { .. }) => "build or import the image again",
            Self::Store(_) => "use the release that wrote it, or remove the file and build the image again",
            Self::Disk(DiskError::Make(tool)) | Self::Kernel(KernelError::Index(tool)) => tool_remedy(tool),
            Self::Disk(DiskError::Size { .. }) => "give --size a multiple of 2M, for example 2G",
            Self::Disk(DiskError::TooSmall { .. }) => "give a larger --size, or none",
            Self::Disk(DiskError::None { .. }) => "give a raw ext4 file system: mke2fs -t ext4 -b 4096",
            Self::Kernel(KernelError::Package { source: ToolError::Failed { .. }, .. }) => {
                "run `apt-get update`, or give --kernel FILE and --modules DIR"
            }
            Self::Kernel(KernelError::Package { source, .. }) => tool_remedy(source),
            Self::Kernel(KernelError::Suite { .. }) => {
                "give a suite of Debian (bookworm-backports), a mirror that has it, and install debian-archive-keyring"
            }
            Self::Kernel(KernelError::NoMirror) => "give --debian-mirror URL",
            Self::Kernel(KernelError::None { .. }) => "give a bzImage (vmlinuz) or a vmlinux for x86-64",
            Self::Kernel(KernelError::OtherModules { .. } | KernelError::Release { .. }) => {
                "give --modules /lib/modules/RELEASE of that kernel, indexed by depmod"
            }
            Self::Kernel(KernelError::PackageName(_) | KernelError::Empty { .. }) => {
                "give --kernel-package linux-image-cloud-amd64 or linux-image-amd64"
            }
            Self::Initrd(InitrdError::AgentMissing { .. } | InitrdError::Agent { .. }) => {
                "build the agent (mashine-agent, static) and give it with --agent, or put it beside `mashines`"
            }
            Self::Initrd(InitrdError::Modules(_)) => "give another kernel",
            Self::Debian(DebianError::Tool(tool)) | Self::Busybox(BusyboxError::Tool(tool)) => {
                tool_remedy(tool)
            }
            Self::Debian(DebianError::Package(_)) => "give names of Debian packages to --package",
            Self::Busybox(_) => "install Debian's package busybox-static",
            Self::Oci(error) => error.remedy(),
            Self::Recipe(_) => "see `mashines image build --help` for what can be built",
            Self::Cmdline => "give a shorter --cmdline of printable ASCII",
            Self::NotRoot => "run it as root",
            Self::Disk(DiskError::Io { .. })
            | Self::Kernel(KernelError::Io { .. })
            | Self::Initrd(_)
            | Self::Debian(_)
            | Self::Tree(_) => "check the file, and free space in the store's directory",
        }
    }
}

fn tool_remedy(tool: &ToolError) -> &'static str {
    match tool {
        ToolError::Missing { .. } => "install the package with apt-get install",
        _ => "see its messages above",
    }
}
