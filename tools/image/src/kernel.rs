//! Kernels: what is a kernel, and where it and its modules are from.
//!
//! A kernel is taken as its distribution made it. Its modules are a directory named by the release, as `/lib/modules/RELEASE` is.

mod apt;
mod package;

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

pub use apt::{Archive, Mirror, Suite};

use crate::elf;
use crate::progress::Progress;
use crate::store::Scratch;
use crate::tool::{Tool, ToolError};

/// The kernel of images that say nothing.
pub const DEFAULT_PACKAGE: &str = "linux-image-cloud-amd64";
/// Largest kernel that is taken.
const BYTES_MAX: u64 = 512 << 20;

/// Where a kernel is to be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// A Debian package, or one that depends on it.
    Package {
        /// Its name.
        package: String,
        /// Where it is from; what this machine's apt knows when absent.
        archive: Option<Archive>,
    },
    /// A kernel of this machine, and its modules if there are any.
    File {
        /// The kernel.
        kernel: PathBuf,
        /// The directory named by its release.
        modules: Option<PathBuf>,
    },
}

/// A kernel that is at hand.
#[derive(Debug)]
pub struct Kernel {
    /// A copy of it in the scratch directory.
    pub file: PathBuf,
    /// Its release.
    pub release: String,
    /// Its modules, indexed by `depmod`.
    pub modules: Option<PathBuf>,
}

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A file cannot be read or copied.
    #[error("cannot read {}", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file that is no kernel.
    #[error("{} is no kernel for x86-64: neither a bzImage nor an ELF file", .path.display())]
    None {
        /// The file.
        path: PathBuf,
    },
    /// The kernel does not say its release and nothing else does.
    #[error("the release of kernel {} is not known", .path.display())]
    Release {
        /// The file.
        path: PathBuf,
    },
    /// Modules of another kernel.
    #[error("the kernel is {kernel}, but the modules in {} are of another one", .modules.display())]
    OtherModules {
        /// The kernel's release.
        kernel: String,
        /// The directory.
        modules: PathBuf,
    },
    /// A package name that is none.
    #[error("`{0}` is not the name of a package with a kernel: it begins with linux-image-")]
    PackageName(String),
    /// The package is not to be had.
    #[error("the kernel's package `{package}` cannot be had")]
    Package {
        /// Which.
        package: String,
        /// Why.
        #[source]
        source: ToolError,
    },
    /// The package has no kernel.
    #[error("package `{package}` has no {what} in it")]
    Empty {
        /// Which.
        package: String,
        /// What was looked for.
        what: &'static str,
    },
    /// A suite's lists are not to be had.
    #[error("the lists of Debian's suite `{suite}` cannot be had")]
    Suite {
        /// Which.
        suite: String,
        /// Why.
        #[source]
        source: ToolError,
    },
    /// This machine's apt has no mirror of Debian.
    #[error("this machine's apt knows no mirror of Debian")]
    NoMirror,
    /// The modules' index cannot be made.
    #[error("the kernel's modules cannot be indexed")]
    Index(#[source] ToolError),
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> KernelError {
    let path = path.to_owned();
    move |source| KernelError::Io { path, source }
}

/// Brings a kernel and its modules into `scratch`; packages are kept in `cache`.
///
/// # Errors
/// [`KernelError`].
pub fn fetch(
    choice: &Choice,
    scratch: &Scratch,
    cache: &Path,
    progress: &dyn Progress,
) -> Result<Kernel, KernelError> {
    match choice {
        Choice::Package { package, archive } => {
            let directory = scratch.path().join("kernel-package");
            package::fetch(package, archive.as_ref(), &directory, cache, progress)
        }
        Choice::File { kernel, modules } => {
            progress.step("reading the kernel");
            let copy = scratch.path().join("vmlinuz");
            let found = release(kernel)?;
            fs::copy(kernel, &copy).map_err(io_error(kernel))?;
            let Some(given) = modules else {
                let release = found.ok_or_else(|| KernelError::Release { path: kernel.clone() })?;
                return Ok(Kernel { file: copy, release, modules: None });
            };
            // `DIR/` and `DIR/.` have no name of their own.
            let given = given.canonicalize().map_err(io_error(given))?;
            let named = given.file_name().and_then(|name| name.to_str()).map(str::to_owned);
            let other = |kernel: String| KernelError::OtherModules { kernel, modules: given.clone() };
            let release = match (found, named) {
                (Some(kernel), Some(named)) if kernel == named => kernel,
                (None, Some(named)) => named,
                (kernel, _) => return Err(other(kernel.unwrap_or_else(|| "unknown".to_owned()))),
            };
            if !given.join("modules.dep").is_file() {
                return Err(other(release));
            }
            Ok(Kernel { file: copy, release, modules: Some(given) })
        }
    }
}

/// Makes the modules' index below `base`.
fn index(base: &Path, release: &str) -> Result<(), KernelError> {
    Tool::new("depmod", "kmod").arg("-b").arg(base).arg(release).run().map(drop).map_err(KernelError::Index)
}

/// Checks that a file is a kernel; gives its release, where it says one.
///
/// # Errors
/// [`KernelError::None`] when it is none.
pub fn release(path: &Path) -> Result<Option<String>, KernelError> {
    let file = File::open(path).map_err(io_error(path))?;
    let none = || KernelError::None { path: path.to_owned() };
    let metadata = file.metadata().map_err(io_error(path))?;
    if !metadata.is_file() || metadata.len() > BYTES_MAX {
        return Err(none());
    }
    let mut start = Vec::new();
    file.take(128 << 10).read_to_end(&mut start).map_err(io_error(path))?;
    if elf::kind(&start).is_some() {
        return Ok(None);
    }
    if start.get(0x1fe..0x200) != Some(&[0x55, 0xaa]) || start.get(0x202..0x206) != Some(b"HdrS") {
        return Err(none());
    }
    Ok(spoken_release(&start))
}

/// The first word of the text that a bzImage's header points to.
fn spoken_release(start: &[u8]) -> Option<String> {
    let pointer = u16::from_le_bytes(start.get(0x20e..0x210)?.try_into().ok()?);
    let text = start.get(usize::from(pointer).checked_add(0x200)?..)?;
    let word: Vec<u8> =
        text.iter().copied().take(128).take_while(|&byte| byte != b' ' && byte != 0).collect();
    let word = String::from_utf8(word).ok()?;
    is_release(&word).then_some(word)
}

/// Whether a word can be a kernel's release: it becomes a directory's name.
fn is_release(word: &str) -> bool {
    let fitting = |byte: u8| byte.is_ascii_alphanumeric() || b".-_+~".contains(&byte);
    word.starts_with(|c: char| c.is_ascii_digit()) && word.len() <= 64 && word.bytes().all(fitting)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bzimage(text: &[u8]) -> Vec<u8> {
        let mut start = vec![0; 0x400];
        start[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        start[0x202..0x206].copy_from_slice(b"HdrS");
        start[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        start[0x300..0x300 + text.len()].copy_from_slice(text);
        start
    }

    #[test]
    fn kernels_and_others_are_told_apart() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("kernel");
        let judged = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            release(&path)
        };
        let debian = bzimage(b"6.1.0-50-cloud-amd64 (debian-kernel@lists.debian.org) #1 SMP\0");
        assert_eq!(judged(&debian).unwrap().as_deref(), Some("6.1.0-50-cloud-amd64"));
        assert_eq!(judged(&bzimage(b"../../etc x\0")).unwrap(), None);
        for bad in [&b""[..], b"no kernel", &debian[..0x203], &[0; 4096]] {
            assert!(matches!(judged(bad), Err(KernelError::None { .. })));
        }
        assert!(matches!(release(temporary.path()), Err(KernelError::None { .. })));
    }

    #[test]
    fn a_pointer_past_the_end_is_no_release() {
        let mut far = bzimage(b"6.1\0");
        far[0x20e..0x210].fill(0xff);
        assert_eq!(spoken_release(&far), None);
    }
}
