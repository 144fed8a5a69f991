//! From a file tree to an image: kernel, root disk, initial RAM disk, manifest, in this order; the last line makes it visible.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::kernel::{self, Choice};
use crate::manifest::{Config, KernelBlob, Manifest, SCHEMA, Source};
use crate::name::ImageName;
use crate::progress::Progress;
use crate::root::Root;
use crate::store::{Scratch, Store};
use crate::{Error, disk, initrd};

/// The command line of images that say nothing. A kernel that panics before it has a driver for the panic port ends in a reset,
/// which is reported, instead of standing still. The disk may be given read-only; then init lays something writable over it.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 root=/dev/vda rootfstype=ext4 rw panic=-1";
/// Longest command line that the kernel takes.
const CMDLINE_MAX: usize = 2047;

/// What all images need, whatever is in them.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The image's name.
    pub name: ImageName,
    /// The kernel.
    pub kernel: Choice,
    /// The program that becomes `/init`.
    pub agent: PathBuf,
    /// The root disk's size; by default what is in it, and a quarter.
    pub size_bytes: Option<u64>,
    /// More for the kernel's command line.
    pub cmdline: Option<String>,
}

/// What is particular to an image.
#[derive(Debug, Clone)]
pub struct About {
    /// Where its files are from.
    pub source: Source,
    /// What runs in it.
    pub config: Config,
    /// Its flavour.
    pub flavour: Option<String>,
    /// Whether all modules of the kernel go to its root disk.
    pub modules: bool,
}

/// What a root disk is made of.
pub enum Contents<'a> {
    /// A tree, in the scratch directory.
    Tree(&'a Root),
    /// A disk that was made elsewhere, in the scratch directory.
    Disk(&'a Path),
}

/// Checks what can be checked before anything is downloaded.
///
/// # Errors
/// When the agent or the command line will not do.
pub fn precheck(parts: &Parts) -> Result<(), Error> {
    initrd::agent(&parts.agent)?;
    if let Choice::File { kernel, .. } = &parts.kernel {
        kernel::release(kernel)?;
    }
    cmdline(parts).map(drop)
}

fn cmdline(parts: &Parts) -> Result<String, Error> {
    let line = match &parts.cmdline {
        Some(more) => format!("{DEFAULT_CMDLINE} {more}"),
        None => DEFAULT_CMDLINE.to_owned(),
    };
    let good = line.len() <= CMDLINE_MAX && line.chars().all(|c| c.is_ascii_graphic() || c == ' ');
    if good { Ok(line) } else { Err(Error::Cmdline) }
}

/// Makes the image and publishes it.
///
/// # Errors
/// [`Error`]; the store is then as it was.
pub fn assemble(
    store: &Store,
    scratch: &Scratch,
    contents: &Contents<'_>,
    parts: &Parts,
    about: About,
    progress: &dyn Progress,
) -> Result<Manifest, Error> {
    let cmdline = cmdline(parts)?;
    let init = initrd::agent(&parts.agent)?;
    let kernel = kernel::fetch(&parts.kernel, scratch, &store.cache(), progress)?;
    let disk_file = match contents {
        Contents::Disk(file) => (*file).to_owned(),
        Contents::Tree(root) => {
            if let Some(modules) = kernel.modules.as_ref().filter(|_| about.modules) {
                progress.step("copying the kernel's modules");
                let target = Path::new("lib/modules").join(&kernel.release);
                root.copy_from(modules, &target).map_err(Error::Tree)?;
            }
            progress.step("making the root disk");
            let (latest, epoch) = times(scratch);
            root.settle_times(latest, epoch).map_err(Error::Tree)?;
            let file = scratch.path().join("disk");
            disk::make(root.path(), &file, parts.size_bytes, &parts.name.to_string())?;
            file
        }
    };
    disk::check(&disk_file)?;
    progress.step("making the initial RAM disk");
    let initrd_file = scratch.path().join("initrd");
    let description = initrd::Description {
        name: parts.name.clone(),
        kernel: kernel.release.clone(),
        config: about.config.clone(),
    };
    let absent = initrd::make(&initrd_file, &init, &kernel, &description)?;
    if !absent.is_empty() && kernel.modules.is_some() {
        progress.note(&format!("kernel {} does not have {}", kernel.release, absent.join(", ")));
    }
    progress.step("hashing");
    let (disk, kernel_file, initrd) =
        (store.admit(&disk_file)?, store.admit(&kernel.file)?, store.admit(&initrd_file)?);
    let manifest = Manifest {
        schema: SCHEMA,
        name: parts.name.clone(),
        created_unix_ms: now_unix_ms(),
        disk: disk.blob,
        kernel: KernelBlob {
            digest: kernel_file.blob.digest,
            bytes: kernel_file.blob.bytes,
            release: kernel.release,
        },
        initrd: initrd.blob,
        cmdline,
        source: about.source,
        config: about.config,
        flavour: about.flavour,
    };
    store.publish(&manifest, vec![disk, kernel_file, initrd])?;
    Ok(manifest)
}

/// The latest time that a file may keep, and the one that later files get: those are made by this job, and when is nobody's business.
/// With `SOURCE_DATE_EPOCH` it is both.
fn times(scratch: &Scratch) -> (u64, u64) {
    let epoch = disk::epoch();
    if std::env::var_os("SOURCE_DATE_EPOCH").is_some() {
        return (epoch, epoch);
    }
    let began = scratch.began().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    (began.saturating_sub(1), epoch)
}

fn now_unix_ms() -> u64 {
    // With SOURCE_DATE_EPOCH the whole manifest is the same each time.
    if std::env::var_os("SOURCE_DATE_EPOCH").is_some() {
        return disk::epoch().saturating_mul(1000);
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
