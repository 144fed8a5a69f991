//! What can be imported, as it is typed.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr as _;

use oci_client::Reference;

use super::OciError;
use crate::name::ImageName;

/// How containers-transports(5) marks an archive.
const ARCHIVES: [&str; 2] = ["docker-archive:", "oci-archive:"];
/// How containers-transports(5) marks a reference.
const REGISTRY: &str = "docker://";

/// Where an image is to be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum From {
    /// A registry.
    Registry {
        /// Registry, repository, and tag or digest.
        reference: Reference,
        /// Whether to do without TLS.
        plain_http: bool,
    },
    /// A directory with an OCI layout.
    Layout(PathBuf),
    /// A tar with an image, or a disk.
    File(PathBuf),
}

impl From {
    /// What is meant: `oci:DIR`; a file, if there is one or it looks like a path; else a reference. What skopeo
    /// and podman write before an archive or a reference may stand there.
    ///
    /// # Errors
    /// When it is none of these.
    pub fn parse(text: &str, plain_http: bool) -> Result<Self, OciError> {
        if let Some(directory) = text.strip_prefix("oci:") {
            return Ok(Self::Layout(PathBuf::from(directory)));
        }
        if let Some(file) = ARCHIVES.iter().find_map(|transport| text.strip_prefix(transport)) {
            return if Path::new(file).is_file() { Ok(Self::File(file.into())) } else { Err(unknown(file)) };
        }
        let text = text.strip_prefix(REGISTRY).unwrap_or(text);
        let path = Path::new(text);
        if path.is_dir() {
            return Ok(Self::Layout(path.to_owned()));
        }
        let like_path = text.starts_with(['/', '.', '~']);
        if path.exists() || like_path {
            return if path.is_file() { Ok(Self::File(path.to_owned())) } else { Err(unknown(text)) };
        }
        let reference = Reference::from_str(text).map_err(|_| unknown(text))?;
        let plain_http = plain_http || is_loopback(reference.resolve_registry());
        Ok(Self::Registry { reference, plain_http })
    }

    /// A name for the image that is made of it.
    pub fn name(&self) -> Option<ImageName> {
        match self {
            Self::Registry { reference, .. } => {
                let tag = reference.tag().unwrap_or("latest");
                ImageName::made_from(&format!("{}:{tag}", reference.repository()))
            }
            Self::Layout(path) | Self::File(path) => {
                let name = path.file_name()?.to_str()?;
                let plain = [".tar.gz", ".tgz", ".tar.zst", ".tar", ".ext4", ".img", ".raw"]
                    .iter()
                    .find_map(|ending| name.strip_suffix(ending));
                ImageName::made_from(&plain.unwrap_or(name).replace(':', "-"))
            }
        }
    }
}

impl fmt::Display for From {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry { reference, .. } => write!(f, "{}", reference.whole()),
            Self::Layout(path) => write!(f, "oci:{}", path.display()),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

fn unknown(text: &str) -> OciError {
    OciError::Reference(text.chars().take(200).collect())
}

/// Registries on this machine speak plain HTTP.
fn is_loopback(registry: &str) -> bool {
    let host = match registry.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => registry,
    };
    host == "localhost"
        || host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_layouts_and_files_are_told_apart() {
        let temporary = tempfile::tempdir().unwrap();
        let file = temporary.path().join("web.tar.gz");
        std::fs::write(&file, "").unwrap();
        let parsed = From::parse(file.to_str().unwrap(), false).unwrap();
        assert_eq!(parsed.name().unwrap().to_string(), "web");
        assert!(matches!(parsed, From::File(_)));
        assert!(matches!(From::parse("oci:/x", false).unwrap(), From::Layout(_)));
        assert!(matches!(From::parse(temporary.path().to_str().unwrap(), false).unwrap(), From::Layout(_)));
        let debian = From::parse("debian:12", false).unwrap();
        assert_eq!(debian.to_string(), "docker.io/library/debian:12");
        assert_eq!(debian.name().unwrap().to_string(), "debian:12");
        assert_eq!(From::parse("docker://debian:12", false).unwrap(), debian);
        let marked = From::parse(&format!("docker-archive:{}", file.display()), false).unwrap();
        assert_eq!(marked, parsed);
        for bad in ["docker-archive:/no/such/file", "/no/such/file", "./x.tar", "UPPER CASE", "", "a:b:c:d"] {
            assert!(matches!(From::parse(bad, false), Err(OciError::Reference(_))), "{bad}");
        }
    }

    #[test]
    fn loopback_registries_speak_plain_http() {
        for (text, plain) in [
            ("localhost:5000/a", true),
            ("127.0.0.1:5000/a", true),
            ("registry.example/a", false),
            ("debian", false),
        ] {
            let From::Registry { plain_http, .. } = From::parse(text, false).unwrap() else {
                panic!("{text}")
            };
            assert_eq!(plain_http, plain, "{text}");
        }
    }
}
