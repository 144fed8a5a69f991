//! Query strings, path parts and bodies as typed values, with a problem that names what is wrong.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use warp::Filter;
use warp::filters::BoxedFilter;

use super::respond::bad_request;
use crate::api::{BODY_BYTES_MAX, PAGE_ITEMS, PAGE_ITEMS_MAX, Problem};
use crate::core::IdempotencyKey;

/// The parameters of a query string. Each is taken once; what is left over is refused.
pub(super) struct Query(BTreeMap<String, String>);

/// Parses the query string.
pub(super) fn query() -> BoxedFilter<(Vec<(String, String)>,)> {
    warp::query::<Vec<(String, String)>>().boxed()
}

impl Query {
    pub(super) fn new(pairs: Vec<(String, String)>) -> Result<Self, Problem> {
        let mut parameters = BTreeMap::new();
        for (name, value) in pairs {
            if parameters.insert(name.clone(), value).is_some() {
                return Err(bad_request(format!("query parameter `{name}` is given twice"), "give it once"));
            }
        }
        Ok(Self(parameters))
    }

    /// Takes a parameter, if it is there.
    pub(super) fn take<T>(&mut self, name: &str) -> Result<Option<T>, Problem>
    where
        T: FromStr<Err: Display>,
    {
        let Some(text) = self.0.remove(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|error| {
            let detail = format!("query parameter {name}={}: {error}", text.escape_debug());
            bad_request(detail, "look at /v1/openapi.json for what it takes")
        })
    }

    /// Takes `limit`, held to what a page may have.
    pub(super) fn limit(&mut self) -> Result<usize, Problem> {
        Ok(self.take("limit")?.unwrap_or(PAGE_ITEMS).clamp(1, PAGE_ITEMS_MAX))
    }

    /// Refuses what was not taken.
    pub(super) fn finish(self) -> Result<(), Problem> {
        match self.0.into_keys().next() {
            None => Ok(()),
            Some(name) => Err(bad_request(
                format!("unknown query parameter `{}`", name.escape_debug()),
                "look at /v1/openapi.json for those that this path takes",
            )),
        }
    }
}

/// Parses a part of the path.
pub(super) fn part<T: FromStr<Err: Display>>(text: &str) -> Result<T, Problem> {
    text.parse().map_err(|error: T::Err| bad_request(error.to_string(), "use an id or a name as listed"))
}

/// Reads a body up to its bound.
pub(super) fn body() -> BoxedFilter<(Bytes,)> {
    warp::body::content_length_limit(BODY_BYTES_MAX).and(warp::body::bytes()).boxed()
}

/// Parses a body of JSON; an empty one counts as `{}`.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    let body = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body).map_err(|error| {
        bad_request(format!("the body: {error}"), "send JSON as described in /v1/openapi.json")
    })
}

/// The `Idempotency-Key` header.
pub(super) fn idempotency_key() -> BoxedFilter<(Option<String>,)> {
    warp::header::optional::<String>("idempotency-key").boxed()
}

/// Binds a key to the request it came with.
pub(super) fn bind_key(
    key: Option<&str>,
    method: &str,
    path: &str,
    body: &[u8],
) -> Result<Option<IdempotencyKey>, Problem> {
    key.map(|key| IdempotencyKey::new(key, method, path, body)).transpose()
}
