//! `cargo xtask bench`: the benchmarks, built optimised, with the limits they need.

use std::collections::BTreeSet;

use anyhow::{Result, bail};

use crate::{command, repository, setup, sources};

/// Names of the benchmarks: one program each.
pub fn names() -> BTreeSet<String> {
    let Ok(files) = std::fs::read_dir(sources::absolute("benches/src/bin")) else { return BTreeSet::new() };
    files.flatten().filter_map(|file| Some(file.path().file_stem()?.to_str()?.to_owned())).collect()
}

/// Runs one benchmark and passes `arguments` on; without a name, lists what there is.
///
/// # Errors
/// When there is no such benchmark, or it fails.
pub fn run(name: Option<&str>, arguments: &[String]) -> Result<()> {
    let names = names();
    let Some(name) = name else {
        names.iter().for_each(|name| println!("{name}"));
        return Ok(());
    };
    if !names.contains(name) {
        bail!("no benchmark `{name}`; there are: {}", names.into_iter().collect::<Vec<_>>().join(", "));
    }
    setup::limits()?;
    let mut cargo = repository::cargo();
    cargo.args(["run", "--quiet", "--release", "--package", "benches", "--bin", name, "--"]);
    command::watch(cargo.args(arguments))
}
