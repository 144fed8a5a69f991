//! Identifiers. Each one is a type of its own, so that a migration cannot be looked up by a machine's id.
//!
//! Numeric ids are random 64-bit numbers made by the control plane; they print as a prefix and 16 hex digits and parse
//! back from exactly that form. Host names are DNS labels because they appear in certificates.

use std::fmt;
use std::str::FromStr;

use rkyv::rancor::{Fallible, Source, fail};
use rkyv::{Archive, Deserialize, Serialize};

/// Why a text is not the id it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    /// The text is not the prefix followed by 16 lower-case hex digits.
    #[error("`{text}` is not an id of the form {prefix}0123456789abcdef")]
    Malformed {
        /// The prefix this kind of id starts with.
        prefix: &'static str,
        /// What was given.
        text: String,
    },
    /// The text is not a DNS label.
    #[error(
        "`{0}` is not a name: use 1 to 63 of a-z, 0-9 and '-', starting and ending with a letter or digit"
    )]
    NotALabel(String),
    /// The text is no digest.
    #[error("`{0}` is no digest: write sha256: and 64 lower-case hex digits")]
    NotADigest(String),
}

macro_rules! numeric_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize)]
        #[rkyv(derive(Debug))]
        pub struct $name(u64);

        impl $name {
            /// Makes the id from its number.
            pub const fn from_u64(raw: u64) -> Self {
                Self(raw)
            }

            /// The number within.
            pub const fn as_u64(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{:016x}"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.strip_prefix($prefix)
                    .filter(|hex| hex.len() == 16 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
                    .and_then(|hex| u64::from_str_radix(hex, 16).ok())
                    .map(Self)
                    .ok_or_else(|| ParseIdError::Malformed { prefix: $prefix, text: text.to_owned() })
            }
        }
    };
}

numeric_id!(
    /// A machine, for its whole life, on whichever host it runs.
    MachineId,
    "m-"
);
numeric_id!(
    /// One attempt to move one machine.
    MigrationId,
    "mig-"
);
numeric_id!(
    /// What a host remembers of its machines: its state directory. Another id means that all was forgotten that went before.
    StateId,
    "state-"
);

/// Ownership counter of a machine. Whoever holds the highest epoch owns the machine; each migration and each
/// reclaim raises it by at least one. Epoch 1 is the first boot.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Archive, Serialize, Deserialize,
)]
#[rkyv(derive(Debug))]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of a machine's first boot.
    pub const FIRST: Self = Self(1);

    /// The next epoch; saturates, which at one migration a microsecond takes half a million years.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "e{}", self.0)
    }
}

/// A DNS label: the name of a host or of a machine. Checked also when it comes out of an archive.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize)]
#[rkyv(derive(Debug))]
pub struct Label(String);

impl Label {
    /// Longest label, in bytes (RFC 1035, section 2.3.4).
    pub const MAX_BYTES: usize = 63;

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Label {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let edge = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = text.as_bytes();
        let ok = (1..=Self::MAX_BYTES).contains(&bytes.len())
            && bytes.iter().all(|&b| edge(b) || b == b'-')
            && bytes.first().copied().is_some_and(edge)
            && bytes.last().copied().is_some_and(edge);
        if ok { Ok(Self(text.to_owned())) } else { Err(ParseIdError::NotALabel(text.to_owned())) }
    }
}

impl<D> Deserialize<Label, D> for ArchivedLabel
where
    D: Fallible + ?Sized,
    D::Error: Source,
{
    fn deserialize(&self, _: &mut D) -> Result<Label, D::Error> {
        match self.0.as_str().parse() {
            Ok(label) => Ok(label),
            Err(error) => fail!(error),
        }
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// SHA-256 of a file's content: the name of a blob (an image, a kernel, an initial RAM disk).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The 64 hex digits, without the algorithm.
    pub fn hex(&self) -> String {
        use fmt::Write as _;
        self.0.iter().fold(String::with_capacity(64), |mut text, byte| {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    /// Reads the 64 lower-case hex digits that [`Self::hex`] writes.
    ///
    /// # Errors
    /// [`ParseIdError::NotADigest`].
    pub fn from_hex(hex: &str) -> Result<Self, ParseIdError> {
        // The text can be anyone's, and of any length.
        let bad = || ParseIdError::NotADigest(hex.chars().take(80).collect());
        let nibbles: Option<Vec<u8>> = hex
            .bytes()
            .map(|b| match b {
                b'0'..=b'9' => Some(b - b'0'),
                b'a'..=b'f' => Some(b - b'a' + 10),
                _ => None,
            })
            .collect();
        let nibbles: [u8; 64] = nibbles.and_then(|n| n.try_into().ok()).ok_or_else(bad)?;
        let mut digest = [0; 32];
        for (byte, pair) in digest.iter_mut().zip(nibbles.chunks_exact(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(Self(digest))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl FromStr for Digest {
    type Err = ParseIdError;

    /// Reads `sha256:` and 64 lower-case hex digits.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("sha256:") {
            Some(hex) => Self::from_hex(hex),
            None => Err(ParseIdError::NotADigest(text.chars().take(80).collect())),
        }
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text: std::borrow::Cow<'de, str> = serde::Deserialize::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Name of a host, unique in its fleet.
pub type HostName = Label;
/// Name of a machine, unique in its fleet.
pub type MachineName = Label;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_print_and_parse_back() {
        let id = MachineId::from_u64(0xdead_beef);
        assert_eq!(id.to_string(), "m-00000000deadbeef");
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in [
            "",
            "m-",
            "m-1",
            "M-00000000deadbeef",
            "m-00000000DEADBEEF",
            "mig-00000000deadbeef",
            "m-+0000000deadbeef",
        ] {
            assert!(bad.parse::<MachineId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_peer_cannot_smuggle_in_a_name() {
        let bad = Label("../../etc/passwd".to_owned());
        let bytes = rkyv::to_bytes::<rkyv::rancor::Error>(&bad).unwrap();
        assert!(rkyv::from_bytes::<Label, rkyv::rancor::Error>(&bytes).is_err());
        let good: Label = "host-a".parse().unwrap();
        let bytes = rkyv::to_bytes::<rkyv::rancor::Error>(&good).unwrap();
        assert_eq!(rkyv::from_bytes::<Label, rkyv::rancor::Error>(&bytes).unwrap(), good);
    }

    #[test]
    fn digests_print_and_parse_back() {
        let digest = Digest(std::array::from_fn(|at| u8::try_from(at * 8 + 1).unwrap()));
        assert_eq!(digest.to_string().parse(), Ok(digest));
        let text = digest.to_string();
        for bad in ["", "sha256:", &text[7..], &text[..70], &text.to_uppercase(), &format!("{text}0")] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_are_dns_labels() {
        for good in ["a", "host-a", "0x", &"a".repeat(63)] {
            assert!(good.parse::<Label>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "ä", &"a".repeat(64)] {
            assert!(bad.parse::<Label>().is_err(), "{bad}");
        }
    }
}
