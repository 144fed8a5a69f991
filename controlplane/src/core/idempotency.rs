//! Idempotency keys: a request that is repeated under the same key gets the same answer and changes nothing more.

use serde::Serialize;

use super::Core;
use crate::api::{Problem, ProblemCode};
use crate::store::records::IdempotencyRecord;

/// How long an answer is kept, in milliseconds: longer than any client goes on repeating.
const KEPT_MS: u64 = 24 * 3600 * 1000;
/// Answers that are kept; the oldest go first.
const KEYS_MAX: usize = 10_000;
/// Longest key.
const KEY_BYTES_MAX: usize = 255;

/// The key of a request, and what it is a key to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyKey {
    key: String,
    fingerprint: String,
}

impl IdempotencyKey {
    /// The key that a client gave to the request of this method, path and body.
    ///
    /// # Errors
    /// [`ProblemCode::BadRequest`] for a key that is empty, longer than 255 bytes or not printable ASCII.
    pub fn new(key: &str, method: &str, path: &str, body: &[u8]) -> Result<Self, Problem> {
        let printable = key.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
        if key.is_empty() || key.len() > KEY_BYTES_MAX || !printable {
            return Err(Problem::new(
                ProblemCode::BadRequest,
                "the Idempotency-Key header is empty, too long or not printable",
                "use up to 255 printable ASCII characters, for example a UUID",
            ));
        }
        let mut hash = Fnv::new();
        for part in [method.as_bytes(), path.as_bytes(), body] {
            hash.add(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_le_bytes());
            hash.add(part);
        }
        Ok(Self { key: key.to_owned(), fingerprint: format!("{:016x}", hash.0) })
    }
}

/// FNV-1a: the same on every release, which a hash that is kept must be. Not against forgery: a client only fools itself.
struct Fnv(u64);

impl Fnv {
    const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

/// An answer, ready to be sent and kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// HTTP status.
    pub status: u16,
    /// `Location` header.
    pub location: Option<String>,
    /// Body.
    pub body: serde_json::Value,
}

impl Answered {
    /// An answer with this body.
    ///
    /// # Errors
    /// [`ProblemCode::Internal`] when the body cannot be written as JSON.
    pub fn new(status: u16, location: Option<String>, body: &impl Serialize) -> Result<Self, Problem> {
        let body = serde_json::to_value(body).map_err(|error| {
            Problem::new(ProblemCode::Internal, error.to_string(), "report this as a defect")
        })?;
        Ok(Self { status, location, body })
    }
}

impl Core {
    /// Runs `request` unless its key has an answer already, and keeps the answer in the same batch as what it changed. Failures are not
    /// kept: they changed nothing, and a repetition may succeed.
    ///
    /// # Errors
    /// What `request` returns; [`ProblemCode::IdempotencyKeyReused`] when the key was used for another request.
    pub fn once(
        &mut self,
        key: Option<IdempotencyKey>,
        request: impl FnOnce(&mut Self) -> Result<Answered, Problem>,
    ) -> Result<Answered, Problem> {
        let Some(IdempotencyKey { key, fingerprint }) = key else { return request(self) };
        if let Some(known) = self.model.idempotency(&key) {
            if known.fingerprint != fingerprint {
                return Err(Problem::new(
                    ProblemCode::IdempotencyKeyReused,
                    "this Idempotency-Key was used for a request with another method, path or body",
                    "use a new key for a new request",
                ));
            }
            return Ok(Answered {
                status: known.status,
                location: known.location.clone(),
                body: known.body.clone(),
            });
        }
        let answered = request(self)?;
        let record = IdempotencyRecord {
            fingerprint,
            status: answered.status,
            location: answered.location.clone(),
            body: answered.body.clone(),
            at_unix_ms: self.now.unix_ms,
        };
        self.model.put_idempotency(key, Some(record));
        Ok(answered)
    }

    /// Drops answers that are too old or too many.
    pub(super) fn expire_idempotency_keys(&mut self) {
        let oldest = self.now.unix_ms.saturating_sub(KEPT_MS);
        let keys = self.model.idempotency_keys();
        let mut expired: Vec<String> = keys
            .iter()
            .filter(|(_, record)| record.at_unix_ms < oldest)
            .map(|(key, _)| key.clone())
            .collect();
        let excess = keys.len().saturating_sub(expired.len()).saturating_sub(KEYS_MAX);
        if excess > 0 {
            let mut by_age: Vec<_> = keys
                .iter()
                .filter(|(_, record)| record.at_unix_ms >= oldest)
                .map(|(key, record)| (record.at_unix_ms, key.clone()))
                .collect();
            by_age.sort();
            expired.extend(by_age.into_iter().take(excess).map(|(_, key)| key));
        }
        for key in expired {
            self.model.put_idempotency(key, None);
        }
    }
}

/// A random number for an id.
pub(super) fn random_u64() -> Result<u64, Problem> {
    let mut bytes = [0; 8];
    rustls::crypto::ring::default_provider().secure_random.fill(&mut bytes).map_err(|_| {
        Problem::new(
            ProblemCode::Internal,
            "the system gives no random numbers",
            "look at the machine's /dev/urandom",
        )
    })?;
    Ok(u64::from_le_bytes(bytes))
}
