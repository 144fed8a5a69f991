//! Each dependency may be used under a licence that deny.toml allows, by what its author declared.
//!
//! cargo-deny does this too, and reads licence files besides; this runs where it is not installed.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::{command, repository, sources};

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
}

/// Dependencies without an allowed licence.
pub fn violations() -> Result<Vec<String>> {
    let rules = std::fs::read_to_string(sources::absolute("deny.toml")).context("reading deny.toml")?;
    let allowed = allowed(&rules).context("deny.toml has no list `allow` in [licenses]")?;
    let mut found = Vec::new();
    for manifest in ["Cargo.toml", "tests/guest/Cargo.toml"] {
        let mut cargo = repository::cargo();
        cargo.args(["metadata", "--format-version", "1", "--filter-platform", "x86_64-unknown-linux-gnu"]);
        let text = command::read(cargo.args(["--manifest-path", manifest]))?;
        let metadata: Metadata = serde_json::from_str(&text).context("reading cargo's metadata")?;
        for Package { name, version, license } in metadata.packages {
            let declared = license.unwrap_or_default();
            if !permits(&declared, &allowed) {
                found.push(format!("{name} {version}: licence `{declared}` is not allowed by deny.toml"));
            }
        }
    }
    Ok(found)
}

/// The strings of the list `allow` in the section on licences.
fn allowed(rules: &str) -> Option<BTreeSet<String>> {
    let (_, section) = rules.split_once("[licenses]")?;
    let (_, list) = section.split_once("allow = [")?;
    let (list, _) = list.split_once(']')?;
    Some(list.split('"').skip(1).step_by(2).map(str::to_owned).collect())
}

/// Whether an SPDX expression can be satisfied with allowed licences.
fn permits(expression: &str, allowed: &BTreeSet<String>) -> bool {
    // Old crates write a slash for OR.
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut parser = Parser { words: &words, allowed };
    let verdict = parser.either();
    verdict == Some(true) && parser.words.is_empty()
}

struct Parser<'a> {
    words: &'a [&'a str],
    allowed: &'a BTreeSet<String>,
}

/// Each method eats what it understands and says whether it is permitted; `None` if it does not understand.
impl Parser<'_> {
    fn either(&mut self) -> Option<bool> {
        let mut verdict = self.both()?;
        while self.eat("OR") {
            verdict |= self.both()?;
        }
        Some(verdict)
    }

    fn both(&mut self) -> Option<bool> {
        let mut verdict = self.one()?;
        while self.eat("AND") {
            verdict &= self.one()?;
        }
        Some(verdict)
    }

    fn one(&mut self) -> Option<bool> {
        if self.eat("(") {
            let verdict = self.either()?;
            return self.eat(")").then_some(verdict);
        }
        let mut licence = self.next()?.to_owned();
        if self.eat("WITH") {
            licence = format!("{licence} WITH {}", self.next()?);
        }
        // "This version or a later one" is fulfilled by this version.
        Some(self.allowed.contains(licence.strip_suffix('+').unwrap_or(&licence)))
    }

    fn next(&mut self) -> Option<&str> {
        let (first, rest) = self.words.split_first()?;
        self.words = rest;
        Some(first)
    }

    fn eat(&mut self, word: &str) -> bool {
        let there = self.words.first() == Some(&word);
        if there {
            self.words = self.words.get(1..).unwrap_or_default();
        }
        there
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_weighed() {
        let rules = "[licenses]\n# why\nallow = [\n \"MIT\",\n \"Apache-2.0\",\n \"Apache-2.0 WITH LLVM-exception\"\n]\n[bans]\n";
        let allowed = allowed(rules).unwrap();
        for good in [
            "MIT",
            "GPL-3.0 OR MIT",
            "MIT/Apache-2.0",
            "(MIT OR X) AND Apache-2.0",
            "MIT+",
            "Apache-2.0 WITH LLVM-exception",
        ] {
            assert!(permits(good, &allowed), "{good}");
        }
        for bad in
            ["", "GPL-3.0", "MIT AND GPL-3.0", "MIT OR", "(MIT", "MIT MIT", "MIT WITH x", "X OR (Y AND MIT)"]
        {
            assert!(!permits(bad, &allowed), "{bad}");
        }
    }
}
