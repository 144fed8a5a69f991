//! What this machine's own KVM can do, as the VMM finds out by trying.

use std::fmt;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::command;

/// What `mashine-vmm --probe` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ability {
    /// Unmodified operating systems run.
    Complete,
    /// Only guests that do their work in ring 3, as the test guest; with the reason.
    Ring3Only(String),
    /// Nothing runs; with the reason.
    None(String),
}

impl Ability {
    /// Asks the VMM.
    ///
    /// # Errors
    /// When it cannot be started, or says something else.
    pub fn of(mashine_vmm: &Path) -> Result<Self> {
        let text = command::read(Command::new(mashine_vmm).arg("--probe"))?;
        Self::parse(text.trim())
    }

    fn parse(text: &str) -> Result<Self> {
        Ok(match text.split_once(": ") {
            None if text == "complete" => Self::Complete,
            Some(("ring-3-only", why)) => Self::Ring3Only(why.to_owned()),
            Some(("none", why)) => Self::None(why.to_owned()),
            _ => bail!("`mashine-vmm --probe` said {text:?}"),
        })
    }
}

impl fmt::Display for Ability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Complete => write!(f, "this machine's KVM is complete"),
            Self::Ring3Only(why) => write!(f, "this machine's KVM runs ring 3 only ({why})"),
            Self::None(why) => write!(f, "this machine has no usable KVM ({why})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_vmm_says_is_read() {
        assert_eq!(Ability::parse("complete").unwrap(), Ability::Complete);
        let half = Ability::parse("ring-3-only: KVM cannot run popcnt in ring 0").unwrap();
        assert_eq!(half, Ability::Ring3Only("KVM cannot run popcnt in ring 0".into()));
        assert!(matches!(Ability::parse("none: /dev/kvm: gone"), Ok(Ability::None(_))));
        for bad in ["", "complete: no", "x: y"] {
            assert!(Ability::parse(bad).is_err(), "{bad}");
        }
    }
}
