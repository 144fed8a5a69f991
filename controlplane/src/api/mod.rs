//! Types of the REST API, shared by the server and its clients.
//!
//! Everything is JSON. Field names carry their units (`_bytes`, `_ms`, `_us`); points in time are milliseconds since
//! the Unix epoch and end in `_unix_ms`. Ids and names are text with one exact form, parsed into a type on both sides,
//! so that an id that cannot exist is refused at the door. Requests refuse unknown fields; responses may gain fields,
//! and clients ignore those they do not know.

pub mod event;
pub mod host;
pub mod machine;
pub mod migration;
pub mod openapi;
pub mod problem;

pub use event::{Event, EventKind};
pub use host::{Host, HostList, HostState};
pub use machine::{ImageList, LaunchRequest, Machine, MachineList, MachineState, MigrationRef, StopRequest};
pub use migration::{MigrateRequest, Migration, MigrationList, Phase, Progress, Stage, Timings};
pub use problem::{Problem, ProblemCode};

/// Longest request body that is read, in bytes. The largest real one is a launch with user data and keys.
pub const BODY_BYTES_MAX: u64 = 384 << 10;
/// Most items of one page of a list.
pub const PAGE_ITEMS_MAX: usize = 1000;
/// Items of a page when the request does not say.
pub const PAGE_ITEMS: usize = 100;
/// Longest wait of one request (`wait`, log long-poll), in milliseconds; ask again for more.
pub const WAIT_MS_MAX: u64 = 600_000;
/// Most log bytes of one answer.
pub const LOG_BYTES_MAX: u32 = 1 << 20;
/// What `/v1/machines/{id}/agent` upgrades to: the bytes of a vsock connection.
pub const AGENT_UPGRADE: &str = "mashines-vsock";
/// The vsock port of the guest's agent.
pub const AGENT_PORT: u32 = 1024;
/// Header of a log answer: offset to ask for next.
pub const NEXT_OFFSET_HEADER: &str = "x-next-offset";
/// Header of a log answer: offset of its first byte; above the one asked for when older output is gone.
pub const OFFSET_HEADER: &str = "x-offset";
/// Header of a log answer: `true` while more output may come, `false` once the machine is stopped.
pub const LIVE_HEADER: &str = "x-live";

/// Serde of a type as its `Display` and `FromStr` text.
pub mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes the text.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    /// Parses the text.
    ///
    /// # Errors
    /// The deserializer's, and the parser's message.
    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Serde of an optional type as text or null.
pub mod text_option {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes the text or null.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<T: Display, S: Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.collect_str(value),
            None => serializer.serialize_none(),
        }
    }

    /// Parses the text, if it is there.
    ///
    /// # Errors
    /// The deserializer's, and the parser's message.
    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        let text = Option::<std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(serde::de::Error::custom)).transpose()
    }
}
