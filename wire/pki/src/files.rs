//! Reading and writing PEM files; private keys are never readable by others, not even for a moment.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::PkiError;

/// PEM files are a few KiB; more than this is the wrong file.
const PEM_BYTES_MAX: u64 = 256 * 1024;

/// Who may read a file that is written.
#[derive(Clone, Copy)]
pub(crate) enum Secrecy {
    /// Certificates: mode 0644.
    Public,
    /// Private keys: mode 0600.
    Private,
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> PkiError + 'a {
    move |source| PkiError::File { action, path: path.to_owned(), source }
}

/// Writes `text` to `path` durably. The new content appears under the name at once or not at all.
pub(crate) fn write(path: &Path, text: &str, secrecy: Secrecy) -> Result<(), PkiError> {
    let mode = match secrecy {
        Secrecy::Public => 0o644,
        Secrecy::Private => 0o600,
    };
    let draft = path.with_extension(format!("tmp{}", std::process::id()));
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&draft)
        .map_err(failed("creating", &draft))?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    let placed = written.and_then(|()| std::fs::rename(&draft, path));
    if placed.is_err() {
        // The draft is of no use to anybody; the error that matters is the one being returned.
        let _ = std::fs::remove_file(&draft);
    }
    placed.map_err(failed("writing", path))
}

/// Reads a PEM file; a private one must not be readable by group or others.
pub(crate) fn read(path: &Path, secrecy: Secrecy) -> Result<String, PkiError> {
    let file = File::open(path).map_err(failed("opening", path))?;
    if let Secrecy::Private = secrecy {
        let mode = file.metadata().map_err(failed("inspecting", path))?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(PkiError::KeyMode { path: path.to_owned(), mode });
        }
    }
    let mut text = String::new();
    file.take(PEM_BYTES_MAX).read_to_string(&mut text).map_err(failed("reading", path))?;
    Ok(text)
}
