//! A fleet to measure on.

use anyhow::Result;
use xtask::fleet::layout::FleetName;
use xtask::fleet::{Fleet, Plan};
use xtask::{repository, setup, signals};

/// Builds what a fleet runs, goes on as root, raises limits. The first thing a benchmark does.
///
/// # Errors
/// When it cannot be built or this machine cannot run machines, with the remedy.
pub fn prepare() -> Result<repository::Binaries> {
    signals::install()?;
    setup::packages()?;
    let binaries = repository::build()?;
    setup::become_root()?;
    setup::require_kvm()?;
    setup::limits()?;
    Ok(binaries)
}

/// Brings up two hosts that have RAM for `machines` machines of `ram_bytes` each. Goes down when dropped.
///
/// # Errors
/// When a fleet of this name is up, or it does not come up.
pub fn fleet(
    name: &FleetName,
    binaries: repository::Binaries,
    ram_bytes: u64,
    machines: u64,
) -> Result<Fleet> {
    let ram_limit = ram_bytes.saturating_mul(machines).to_string();
    Fleet::up(Plan { name: name.clone(), hosts: 2, ram_limit, binaries })
}

/// A size as people write it: bytes, or with K, M or G behind it.
///
/// # Errors
/// What is wrong with it, for a person.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| !letter.is_ascii_digit());
    let shift = match text.get(digits.len()..) {
        Some("") => Some(0),
        Some("K") => Some(10),
        Some("M") => Some(20),
        Some("G") => Some(30),
        _ => None,
    };
    let bytes = shift.and_then(|shift| digits.parse::<u64>().ok()?.checked_mul(1 << shift));
    bytes.ok_or_else(|| format!("`{text}` is not a size: use a number, or one with K, M or G behind it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("1G"), Ok(1 << 30));
        assert_eq!(parse_size("4096"), Ok(4096));
        for bad in ["", "G", "1T", "-1", "99999999999G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
