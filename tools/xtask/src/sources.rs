//! The files of the repository, as the checks read them.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{command, repository};

/// A file that git knows or would take in.
#[derive(Debug)]
pub struct Source {
    /// Path from the root of the work tree, with slashes.
    pub path: String,
    /// Content.
    pub text: String,
}

/// All text files whose name ends with one of `endings`.
///
/// # Errors
/// When git cannot be asked or a file not be read.
pub fn ending_with(endings: &[&str]) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for path in paths()? {
        let file = repository::root().join(&path);
        // Deleted in the work tree, but not yet in the index.
        if !endings.iter().any(|ending| path.ends_with(ending)) || !file.is_file() {
            continue;
        }
        let text = std::fs::read_to_string(&file).with_context(|| format!("reading {path}"))?;
        sources.push(Source { path, text });
    }
    Ok(sources)
}

/// All files that git knows or would take in.
///
/// # Errors
/// When git cannot be asked.
pub fn paths() -> Result<Vec<String>> {
    let mut git = Command::new("git");
    git.current_dir(repository::root()).args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]);
    let text = command::read(&mut git).context("listing the files of the repository")?;
    Ok(text.split('\0').filter(|path| !path.is_empty()).map(str::to_owned).collect())
}

/// Where a path of the repository is on this machine.
pub fn absolute(path: &str) -> PathBuf {
    repository::root().join(path)
}
