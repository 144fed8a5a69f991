//! Errors of the API: `application/problem+json`, each with a stable code and a remedy.

use serde::{Deserialize, Serialize};

/// What went wrong, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemCode {
    /// The request cannot be understood.
    BadRequest,
    /// No or a wrong token.
    Unauthorized,
    /// No such path.
    NoSuchPath,
    /// The path does not take this method.
    MethodNotAllowed,
    /// The body is too long.
    BodyTooLong,
    /// No such machine.
    NoSuchMachine,
    /// No such host.
    NoSuchHost,
    /// No such migration.
    NoSuchMigration,
    /// The name is taken.
    NameTaken,
    /// The machine is not in a state for it.
    WrongState,
    /// The machine is being migrated already.
    MigrationRunning,
    /// The machine is on that host already.
    SameHost,
    /// The migration has ended, or has committed and cannot be cancelled.
    TooLate,
    /// A value is out of range.
    BadValue,
    /// No host can take the machine.
    NoPlace,
    /// All addresses are in use.
    NoAddress,
    /// The idempotency key was used for another request.
    IdempotencyKeyReused,
    /// The wait ended before the state was reached.
    WaitTimeout,
    /// The machine's host is not in sight.
    HostUnreachable,
    /// The host refused.
    HostRefused,
    /// Nothing in the guest answers: it has no agent, it boots, or it is just being moved.
    GuestUnreachable,
    /// No such image.
    NoSuchImage,
    /// Too many requests are under way.
    Busy,
    /// The control plane failed.
    Internal,
}

impl ProblemCode {
    /// HTTP status.
    pub const fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthorized => 401,
            Self::NoSuchPath
            | Self::NoSuchMachine
            | Self::NoSuchHost
            | Self::NoSuchMigration
            | Self::NoSuchImage => 404,
            Self::MethodNotAllowed => 405,
            Self::WaitTimeout => 408,
            Self::NameTaken
            | Self::WrongState
            | Self::MigrationRunning
            | Self::SameHost
            | Self::TooLate
            | Self::NoPlace
            | Self::NoAddress => 409,
            Self::BodyTooLong => 413,
            Self::BadValue | Self::IdempotencyKeyReused => 422,
            Self::Busy => 429,
            Self::Internal => 500,
            Self::HostRefused => 502,
            Self::HostUnreachable | Self::GuestUnreachable => 503,
        }
    }

    /// Short title, the same for each problem of this code.
    pub const fn title(self) -> &'static str {
        match self {
            Self::BadRequest => "the request cannot be understood",
            Self::Unauthorized => "no valid token",
            Self::NoSuchPath => "no such path",
            Self::MethodNotAllowed => "method not allowed",
            Self::BodyTooLong => "request body too long",
            Self::NoSuchMachine => "no such machine",
            Self::NoSuchHost => "no such host",
            Self::NoSuchMigration => "no such migration",
            Self::NameTaken => "name taken",
            Self::WrongState => "the machine is not in a state for this",
            Self::MigrationRunning => "the machine is being migrated already",
            Self::SameHost => "the machine is on that host already",
            Self::TooLate => "too late",
            Self::BadValue => "value out of range",
            Self::NoPlace => "no host can take the machine",
            Self::NoAddress => "no address left",
            Self::IdempotencyKeyReused => "idempotency key used for another request",
            Self::WaitTimeout => "state not reached in time",
            Self::HostUnreachable => "host not in sight",
            Self::HostRefused => "the host refused",
            Self::GuestUnreachable => "the guest does not answer",
            Self::NoSuchImage => "no such image",
            Self::Busy => "too many requests under way",
            Self::Internal => "the control plane failed",
        }
    }
}

/// An error answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{title}: {detail}")]
pub struct Problem {
    /// For programs.
    pub code: ProblemCode,
    /// HTTP status, repeated.
    pub status: u16,
    /// The same for each problem of this code.
    pub title: String,
    /// This case.
    pub detail: String,
    /// What to do about it.
    pub remedy: String,
    /// The id that stands in the way, if one does: the running migration, the machine of that name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conflicting_id: Option<String>,
}

impl Problem {
    /// A problem of this code.
    pub fn new(code: ProblemCode, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            code,
            status: code.status(),
            title: code.title().to_owned(),
            detail: detail.into(),
            remedy: remedy.into(),
            conflicting_id: None,
        }
    }

    /// Names what stands in the way.
    #[must_use]
    pub fn conflicting(mut self, id: impl std::fmt::Display) -> Self {
        self.conflicting_id = Some(id.to_string());
        self
    }
}
