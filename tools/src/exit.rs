//! How the program ends: exit codes, and errors with their remedy.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | something local failed (a file, the terminal) |
//! | 2 | the command line or a value is wrong |
//! | 3 | no such machine, host or migration |
//! | 4 | conflict: name taken, wrong state, a migration is running, too late |
//! | 5 | refused or failed: no host can take it, the host refused, the migration failed, no valid token |
//! | 6 | the wait ended first |
//! | 7 | the control plane cannot be reached |
//! | 130 | interrupted; what was begun goes on |

use std::process::ExitCode;

use controlplane::api::{Problem, ProblemCode};

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The control plane said no.
    #[error("{}", .0.detail)]
    Problem(Box<Problem>),
    /// The control plane cannot be reached.
    #[error("cannot reach the control plane at {url}: {detail}")]
    Unreachable {
        /// Where it was looked for.
        url: String,
        /// Why, with all causes.
        detail: String,
    },
    /// The control plane said something that cannot be understood.
    #[error("the control plane's answer cannot be understood: {0}")]
    Answer(String),
    /// A value on the command line is wrong.
    #[error("{detail}")]
    Usage {
        /// What.
        detail: String,
        /// What to give instead.
        remedy: String,
    },
    /// What was asked for was tried and failed.
    #[error("{detail}")]
    Failed {
        /// Why.
        detail: String,
        /// What to do.
        remedy: String,
    },
    /// A file, the terminal or the like.
    #[error("{what}: {source}")]
    Local {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
        /// What to do.
        remedy: String,
    },
    /// A command in a machine ended with this code, and has said why itself.
    #[error("the command ended with {0}")]
    Exited(u8),
    /// Ctrl-C while waiting; the message has been printed.
    #[error("interrupted")]
    Interrupted,
}

impl Failure {
    /// Something local failed.
    pub fn local(
        what: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::Local { what: what.into(), source: source.into(), remedy: remedy.into() }
    }

    /// A wrong value.
    pub fn usage(detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Usage { detail: detail.into(), remedy: remedy.into() }
    }

    /// The exit code.
    pub fn code(&self) -> u8 {
        match self {
            Self::Problem(problem) => problem_code(problem.code),
            Self::Unreachable { .. } => 7,
            Self::Usage { .. } => 2,
            Self::Failed { .. } | Self::Answer(_) => 5,
            Self::Local { .. } => 1,
            Self::Exited(code) => *code,
            Self::Interrupted => 130,
        }
    }

    fn remedy(&self) -> &str {
        match self {
            Self::Problem(problem) => &problem.remedy,
            Self::Unreachable { .. } => {
                "start mashines-control, or set MASHINES_URL (http://IP:PORT or unix:PATH) or run `mashines login`"
            }
            Self::Answer(_) => "use the same release of `mashines` and `mashines-control`",
            Self::Usage { remedy, .. } | Self::Failed { remedy, .. } | Self::Local { remedy, .. } => remedy,
            Self::Exited(_) | Self::Interrupted => "",
        }
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::Problem(Box::new(problem))
    }
}

const fn problem_code(code: ProblemCode) -> u8 {
    match code {
        ProblemCode::NoSuchMachine
        | ProblemCode::NoSuchHost
        | ProblemCode::NoSuchMigration
        | ProblemCode::NoSuchImage => 3,
        ProblemCode::NameTaken
        | ProblemCode::WrongState
        | ProblemCode::MigrationRunning
        | ProblemCode::SameHost
        | ProblemCode::TooLate
        | ProblemCode::IdempotencyKeyReused => 4,
        ProblemCode::BadRequest
        | ProblemCode::BadValue
        | ProblemCode::BodyTooLong
        | ProblemCode::MethodNotAllowed
        | ProblemCode::NoSuchPath => 2,
        ProblemCode::WaitTimeout => 6,
        ProblemCode::Unauthorized
        | ProblemCode::NoPlace
        | ProblemCode::NoAddress
        | ProblemCode::HostUnreachable
        | ProblemCode::GuestUnreachable
        | ProblemCode::HostRefused
        | ProblemCode::Busy
        | ProblemCode::Internal => 5,
    }
}

/// Prints the failure and gives its exit code.
pub fn report(failure: &Failure) -> ExitCode {
    if !matches!(failure, Failure::Exited(_) | Failure::Interrupted) {
        eprintln!("error: {failure}");
        let remedy = failure.remedy();
        if !remedy.is_empty() {
            eprintln!("  try: {remedy}");
        }
    }
    ExitCode::from(failure.code())
}
