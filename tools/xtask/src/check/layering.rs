//! Dependencies point down and siblings do not know each other, by `cargo metadata`; `wire` and `pki` know neither network nor clock.

use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::sources::{self, Source};
use crate::{command, repository};

/// Layer of each crate. A crate may depend on lower layers only.
const LAYERS: [(&str, u8); 12] = [
    ("wire", 0),
    ("pki", 1),
    ("agent", 1),
    ("vmm", 2),
    ("dataplane", 2),
    ("image", 1),
    ("controlplane", 3),
    ("tools", 4),
    ("xtask", 4),
    ("sim", 4),
    ("tests", 5),
    ("benches", 5),
];

/// What must not appear in `wire`: it has no I/O, no clock and no async.
const NOT_IN_WIRE: [&str; 9] = [
    "std::net",
    "std::time",
    "std::fs",
    "std::thread",
    "std::process",
    "SystemTime",
    "async fn",
    "tokio",
    "glommio",
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// Set for dependencies by path, which is what the crates of a workspace are to each other.
    path: Option<String>,
}

/// What points the wrong way.
pub fn violations() -> Result<Vec<String>> {
    let mut cargo: Command = repository::cargo();
    let text = command::read(cargo.args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Metadata = serde_json::from_str(&text).context("reading cargo's metadata")?;
    let mut found = upward(&metadata.packages);
    found.extend(impure(&sources::ending_with(&[".rs"])?));
    Ok(found)
}

fn layer(name: &str) -> Option<u8> {
    LAYERS.iter().find(|(known, _)| *known == name).map(|&(_, layer)| layer)
}

fn upward(packages: &[Package]) -> Vec<String> {
    let mut found = Vec::new();
    for package in packages {
        let Some(own) = layer(&package.name) else {
            found.push(format!(
                "crate {} has no layer: add it to tools/xtask/src/check/layering.rs",
                package.name
            ));
            continue;
        };
        let by_path = package.dependencies.iter().filter(|dependency| dependency.path.is_some());
        // A crate may ask for itself with other features, for its tests.
        for dependency in by_path.filter(|dependency| dependency.name != package.name) {
            if layer(&dependency.name).is_none_or(|other| other >= own) {
                found.push(format!(
                    "{} must not depend on {}: it is not below it",
                    package.name, dependency.name
                ));
            }
        }
    }
    found
}

fn impure(files: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files.iter().filter(|file| file.path.starts_with("wire/src/")) {
        for (number, line) in (1..).zip(file.text.lines()) {
            let code = line.split("//").next().unwrap_or_default();
            for word in NOT_IN_WIRE.iter().filter(|word| code.contains(**word)) {
                found.push(format!(
                    "{}:{number}: `{word}`: wire has no I/O, no clock and no async",
                    file.path
                ));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, on: &str) -> Package {
        let dependency = Dependency { name: on.to_owned(), path: Some("x".to_owned()) };
        Package { name: name.to_owned(), dependencies: vec![dependency] }
    }

    #[test]
    fn siblings_upward_and_unknown_crates_are_found() {
        assert!(upward(&[package("dataplane", "wire"), package("tests", "dataplane")]).is_empty());
        for (name, on) in [("dataplane", "vmm"), ("wire", "pki"), ("controlplane", "tools"), ("new", "wire")]
        {
            assert_eq!(upward(&[package(name, on)]).len(), 1, "{name} -> {on}");
        }
    }

    #[test]
    fn clocks_in_wire_are_found_and_words_in_comments_are_not() {
        let file = |path: &str, text: &str| Source { path: path.to_owned(), text: text.to_owned() };
        assert_eq!(impure(&[file("wire/src/a.rs", "use std::time::Instant;")]).len(), 1);
        assert!(impure(&[file("wire/src/a.rs", "// no std::time here")]).is_empty());
        assert!(impure(&[file("wire/pki/src/a.rs", "use std::time::SystemTime;")]).is_empty());
    }
}
