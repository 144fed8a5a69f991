//! Values of the tables: JSON in an envelope `{"v": 1, "value": ...}`.
//!
//! A record gains a field by giving it a serde default; it changes meaning only with a new envelope version, whose reader converts
//! the older ones. A version that is not known is refused rather than guessed at.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Version of the values.
/// * 1: first.
const VALUE_VERSION: u32 = 1;

/// A value that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// Not JSON, or not of the record's shape.
    #[error("not a value of the expected shape")]
    Json(#[from] serde_json::Error),
    /// A newer envelope.
    #[error("value of version {0}; this release knows up to {VALUE_VERSION}")]
    Version(u32),
}

#[derive(Serialize)]
struct Out<'a, T> {
    v: u32,
    value: &'a T,
}

#[derive(Deserialize)]
struct In<'a> {
    v: u32,
    #[serde(borrow)]
    value: &'a serde_json::value::RawValue,
}

pub(super) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    Ok(serde_json::to_vec(&Out { v: VALUE_VERSION, value })?)
}

pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let envelope: In<'_> = serde_json::from_slice(bytes)?;
    if envelope.v != VALUE_VERSION {
        return Err(CodecError::Version(envelope.v));
    }
    Ok(serde_json::from_str(envelope.value.get())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_round_trip_and_newer_ones_are_refused() {
        let bytes = encode(&vec![1_u32, 2]).unwrap();
        assert_eq!(bytes, br#"{"v":1,"value":[1,2]}"#);
        assert_eq!(decode::<Vec<u32>>(&bytes).unwrap(), vec![1, 2]);
        assert!(matches!(decode::<Vec<u32>>(br#"{"v":2,"value":[1]}"#), Err(CodecError::Version(2))));
        assert!(matches!(decode::<Vec<u32>>(b"{"), Err(CodecError::Json(_))));
    }
}
