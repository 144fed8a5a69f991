//! The initial RAM disk: init, the modules that reach the root disk, and two lists that init reads.
//!
//! ```text
//! /init                        the agent, a static program; the kernel starts it as process 1
//! /lib/modules/RELEASE/...     the modules, uncompressed
//! /mashines/modules            their paths, one a line, in the order in which they are to be loaded
//! /mashines/image.json         name, kernel release and configuration of the image
//! /dev /proc /sys /run /newroot   empty, to mount on
//! ```
//!
//! The same parts give the same bytes.

mod modules;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read as _, Write};
use std::path::{Path, PathBuf};

use cpio::NewcBuilder;
use cpio::newc::{ModeFileType, trailer};
use serde::{Deserialize, Serialize};

pub use modules::ModulesError;

use crate::elf::{self, Elf};
use crate::kernel::Kernel;
use crate::manifest::Config;
use crate::name::ImageName;

/// Largest init that is taken.
const INIT_BYTES_MAX: u64 = 64 << 20;
/// zstd's level: made once, read at each boot.
const LEVEL: i32 = 19;

/// Why there is no initial RAM disk.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The agent is not there.
    #[error("there is no agent at {}", .path.display())]
    AgentMissing {
        /// Where it was looked for.
        path: PathBuf,
        /// Why it cannot be read.
        #[source]
        source: io::Error,
    },
    /// The agent is something else.
    #[error("{} cannot be the first program of a machine: {why}", .path.display())]
    Agent {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        why: &'static str,
    },
    /// The modules do not do.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// It cannot be written.
    #[error("the initial RAM disk cannot be written")]
    Write(#[from] io::Error),
    /// The description cannot be written.
    #[error("the image cannot be described to its init")]
    Describe(#[from] serde_json::Error),
}

/// What init is told of its image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The image's name.
    pub name: ImageName,
    /// The kernel's release.
    pub kernel: String,
    /// What is to run.
    pub config: Config,
}

/// Reads and checks the agent.
///
/// # Errors
/// When it is missing, no program, or needs a loader that is not there yet.
pub fn agent(path: &Path) -> Result<Vec<u8>, InitrdError> {
    let missing = |source| InitrdError::AgentMissing { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(missing)?;
    file.take(INIT_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(missing)?;
    let wrong = |why| InitrdError::Agent { path: path.to_owned(), why };
    if bytes.len() as u64 > INIT_BYTES_MAX {
        return Err(wrong("it is larger than 64 MiB"));
    }
    match elf::kind(&bytes) {
        Some(Elf::Static) => Ok(bytes),
        Some(Elf::Dynamic) => Err(wrong("it is linked dynamically; build it for x86_64-unknown-linux-musl")),
        None => Err(wrong("it is no program for x86-64")),
    }
}

/// Writes the initial RAM disk, compressed with zstd. Gives the wanted modules that the kernel does not have.
///
/// # Errors
/// [`InitrdError`].
pub fn make(
    file: &Path,
    init: &[u8],
    kernel: &Kernel,
    description: &Description,
) -> Result<Vec<&'static str>, InitrdError> {
    let mut archive = Archive::new(zstd::Encoder::new(fs::File::create(file)?, LEVEL)?);
    for directory in ["dev", "proc", "sys", "run", "newroot"] {
        archive.directory(Path::new(directory))?;
    }
    archive.console()?;
    archive.file(Path::new("init"), init, 0o755)?;
    archive.file(Path::new("mashines/image.json"), &serde_json::to_vec_pretty(description)?, 0o644)?;
    let mut absent = Vec::new();
    let mut list = String::new();
    if let Some(directory) = &kernel.modules {
        let plan = modules::plan(directory)?;
        let base = Path::new("lib/modules").join(&kernel.release);
        for path in &plan.order {
            let (name, bytes) = modules::read(directory, path)?;
            let target = base.join(name);
            list.push_str(&format!("/{}\n", target.display()));
            archive.file(&target, &bytes, 0o644)?;
        }
        absent = plan.absent;
    }
    archive.file(Path::new("mashines/modules"), list.as_bytes(), 0o644)?;
    archive.end()?.finish()?.sync_all()?;
    Ok(absent)
}

/// A cpio archive that makes the directories of what is put in.
struct Archive<W: Write> {
    to: Option<W>,
    made: BTreeSet<PathBuf>,
    next: u32,
}

impl<W: Write> Archive<W> {
    const fn new(to: W) -> Self {
        Self { to: Some(to), made: BTreeSet::new(), next: 1 }
    }

    fn entry(&mut self, path: &Path, mode: u32, kind: ModeFileType, bytes: &[u8]) -> io::Result<()> {
        let name = path.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        let header = NewcBuilder::new(name).ino(self.next).mode(mode).nlink(1).set_mode_file_type(kind);
        self.put(header, bytes)
    }

    fn put(&mut self, header: NewcBuilder, bytes: &[u8]) -> io::Result<()> {
        self.next = self.next.saturating_add(1);
        let to = self.to.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let length = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut writer = header.write(to, length);
        writer.write_all(bytes)?;
        self.to = Some(writer.finish()?);
        Ok(())
    }

    fn directory(&mut self, path: &Path) -> io::Result<()> {
        for ancestor in path.ancestors().collect::<Vec<_>>().into_iter().rev() {
            if !ancestor.as_os_str().is_empty() && self.made.insert(ancestor.to_owned()) {
                self.entry(ancestor, 0o755, ModeFileType::Directory, &[])?;
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
        self.directory(path.parent().unwrap_or(Path::new("")))?;
        self.entry(path, mode, ModeFileType::Regular, bytes)
    }

    /// `/dev/console`: the kernel opens it for init before anything is mounted.
    fn console(&mut self) -> io::Result<()> {
        let header = NewcBuilder::new("dev/console")
            .ino(self.next)
            .mode(0o600)
            .nlink(1)
            .rdev_major(5)
            .rdev_minor(1)
            .set_mode_file_type(ModeFileType::Char);
        self.put(header, &[])
    }

    fn end(mut self) -> io::Result<W> {
        trailer(self.to.take().ok_or(io::ErrorKind::BrokenPipe)?)
    }
}

#[cfg(test)]
mod tests;
