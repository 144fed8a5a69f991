//! apt as this machine has it set up, or with another suite of Debian and lists of its own.
//!
//! Another suite leaves this machine's lists and packages alone: `directory` has a source, its lists and nothing else. apt checks what it downloads against
//! the suite's signed index, with the keys of the package debian-archive-keyring.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{KernelError, io_error};
use crate::progress::Progress;
use crate::tool::{Tool, ToolError};

/// The keys that Debian signs its suites with.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A suite of Debian's archive: `bookworm`, `bookworm-backports`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suite(String);

impl Suite {
    /// Its name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Suite {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fitting = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let good = text.starts_with(|c: char| c.is_ascii_lowercase()) && text.len() <= 64;
        if good && text.bytes().all(fitting) {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!("`{text}` is no suite of Debian; give one like bookworm-backports"))
        }
    }
}

/// A mirror of Debian's archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror(String);

impl FromStr for Mirror {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let web = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
        // It becomes a word of a line for apt.
        let fitting = |byte: u8| byte.is_ascii_graphic() && !b"[]#\"'".contains(&byte);
        match web {
            Some(rest) if !rest.is_empty() && text.len() <= 512 && text.bytes().all(fitting) => {
                Ok(Self(text.to_owned()))
            }
            _ => Err(format!("`{text}` is no mirror of Debian; give an http or https URL")),
        }
    }
}

/// Where packages are from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive {
    /// The suite.
    pub suite: Suite,
    /// The mirror; without one, that which this machine's apt uses for Debian.
    pub mirror: Option<Mirror>,
}

/// apt, set up.
#[derive(Debug, Default)]
pub(super) struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// apt with the suite, whose lists are kept in `directory` and brought up to date.
    pub(super) fn of(
        archive: &Archive,
        directory: &Path,
        progress: &dyn Progress,
    ) -> Result<Self, KernelError> {
        let suite = archive.suite.as_str();
        let mirror = match &archive.mirror {
            Some(mirror) => mirror.clone(),
            None => own_mirror()?,
        };
        let lists = directory.join("lists");
        let downloads = directory.join("cache/archives/partial");
        for path in [&lists.join("partial"), &downloads] {
            fs::create_dir_all(path).map_err(io_error(path))?;
        }
        let source = directory.join("source.list");
        let line = format!("deb [signed-by={KEYRING}] {} {suite} main\n", mirror.0);
        fs::write(&source, line).map_err(io_error(&source))?;
        let option = |name: &str, path: PathBuf| format!("{name}={}", path.display());
        let apt = Self {
            options: vec![
                option("Dir::Etc::sourcelist", source),
                option("Dir::Etc::sourceparts", "/dev/null".into()),
                // What is installed here does not matter there.
                option("Dir::State::status", "/dev/null".into()),
                option("Dir::State::lists", lists),
                option("Dir::Cache", directory.join("cache")),
            ],
        };
        progress.step(&format!("reading the lists of Debian's {suite}"));
        match apt.tool("apt-get").args(["-q", "update"]).run() {
            Ok(_) => Ok(apt),
            Err(source) => {
                // Lists of what may be no suite at all are of no use; those that were good come again.
                let _ = fs::remove_dir_all(directory);
                // Goes only when nothing was ever downloaded from it.
                let _ = directory.parent().map(fs::remove_dir);
                Err(KernelError::Suite { suite: suite.to_owned(), source })
            }
        }
    }

    fn tool(&self, program: &str) -> Tool {
        let options = self.options.iter().flat_map(|option| ["-o", option.as_str()]);
        // The download's own user cannot write where we want it.
        Tool::new(program, "apt").args(options).args(["-o", "APT::Sandbox::User=root"])
    }

    /// The record of the newest version of a package.
    pub(super) fn record(&self, package: &str) -> Result<String, ToolError> {
        let text = self.tool("apt-cache").args(["show", "--no-all-versions", package]).run()?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Downloads a package into a directory; one that is there already is checked only.
    pub(super) fn download(&self, package: &str, directory: &Path) -> Result<(), ToolError> {
        self.tool("apt-get").args(["-q", "download", package]).current_dir(directory).run().map(drop)
    }
}

/// The mirror of Debian that this machine uses.
fn own_mirror() -> Result<Mirror, KernelError> {
    let targets = ["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian"];
    let text = Tool::new("apt-get", "apt").args(targets).arg("Label: Debian").run();
    let text = text.ok().unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines().find_map(|line| line.trim().parse().ok()).ok_or(KernelError::NoMirror)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_be_more_than_a_word_of_apts_source_is_refused() {
        assert_eq!("bookworm-backports".parse::<Suite>().unwrap().as_str(), "bookworm-backports");
        for bad in ["", "-x", "a b", "../x", "a\nb", "A", "sid main", "[x]"] {
            assert!(bad.parse::<Suite>().is_err(), "{bad}");
        }
        assert!("http://mirror.example/debian".parse::<Mirror>().is_ok());
        for bad in ["", "http://", "file:///etc", "http://a b", "http://a\nb", "http://[x]", "a"] {
            assert!(bad.parse::<Mirror>().is_err(), "{bad}");
        }
    }
}
