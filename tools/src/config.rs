//! Where the control plane is and how to show who one is.
//!
//! `MASHINES_URL` and `MASHINES_TOKEN` come first, then the file that `mashines login` writes (`MASHINES_CONFIG`, or
//! `mashines/config.json` in `XDG_CONFIG_HOME` or `~/.config`), then the control plane's own default address.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::exit::Failure;

/// Where `mashines-control` listens by default.
const DEFAULT_URL: &str = "http://127.0.0.1:7070";

/// How to reach the control plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `http://IP:PORT` or `unix:PATH`.
    pub url: String,
    /// Its token; none is needed over a Unix socket.
    pub token: Option<String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct File {
    url: Option<String>,
    token: Option<String>,
}

impl Config {
    /// Gathers it from the environment and the file.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn load() -> Result<Self, Failure> {
        let file = read_file()?;
        let url = std::env::var("MASHINES_URL").ok().or(file.url);
        let token = std::env::var("MASHINES_TOKEN").ok().or(file.token);
        Ok(Self { url: url.unwrap_or_else(|| DEFAULT_URL.to_owned()), token })
    }

    /// Writes it to the file, readable only by its owner. Gives the file's path.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self) -> Result<PathBuf, Failure> {
        let path = path().ok_or_else(|| {
            Failure::usage("there is no place for the configuration", "set HOME or MASHINES_CONFIG")
        })?;
        let failed = |error: std::io::Error| {
            Failure::local(format!("writing {}", path.display()), error, "check the directory's permissions")
        };
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        let file = File { url: Some(self.url.clone()), token: self.token.clone() };
        let text = serde_json::to_string_pretty(&file)
            .map_err(|error| Failure::local("writing the configuration", error, "report this as a defect"))?;
        // A draft with tight permissions takes the place of the old file, whatever those of the old one were.
        let draft = path.with_extension(format!("tmp{}", std::process::id()));
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let written = options
            .open(&draft)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .and_then(|()| std::fs::rename(&draft, &path));
        if written.is_err() {
            // The first error is the one that matters.
            let _ = std::fs::remove_file(&draft);
        }
        written.map_err(failed)?;
        Ok(path)
    }
}

/// Where the configuration and what belongs to it lie.
pub fn directory() -> Option<PathBuf> {
    path()?.parent().map(PathBuf::from)
}

fn path() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("MASHINES_CONFIG") {
        return Some(path.into());
    }
    let base = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config")))?;
    Some(base.join("mashines").join("config.json"))
}

fn read_file() -> Result<File, Failure> {
    let Some(path) = path() else { return Ok(File::default()) };
    let remedy = "correct or remove it, or write it anew with `mashines login`";
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| Failure::local(format!("reading {}", path.display()), error, remedy)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(File::default()),
        Err(error) => Err(Failure::local(format!("reading {}", path.display()), error, remedy)),
    }
}
