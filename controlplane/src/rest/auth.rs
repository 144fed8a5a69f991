//! Who may use the API: holders of the fleet's token.

use std::path::{Path, PathBuf};

use subtle::ConstantTimeEq;
use warp::filters::BoxedFilter;
use warp::{Filter, Rejection};

use super::respond::reject;
use crate::api::{Problem, ProblemCode};

/// Shortest token that is taken: what `fleet init` makes has 64 characters.
const TOKEN_BYTES_MIN: usize = 32;
/// A token file longer than this is the wrong file.
const TOKEN_BYTES_MAX: usize = 1024;

/// The secret that clients show. `Debug` does not print it.
#[derive(Clone)]
pub struct Token(String);

/// A token that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BadToken {
    /// The file cannot be read.
    #[error("reading the token file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The content is not a token.
    #[error(
        "a token has {TOKEN_BYTES_MIN} to {TOKEN_BYTES_MAX} printable characters; make one with `mashines fleet init`"
    )]
    Shape,
}

impl Token {
    /// Takes `text`, without surrounding white space, as the token.
    ///
    /// # Errors
    /// [`BadToken::Shape`].
    pub fn new(text: &str) -> Result<Self, BadToken> {
        let text = text.trim();
        let length = (TOKEN_BYTES_MIN..=TOKEN_BYTES_MAX).contains(&text.len());
        if length && text.bytes().all(|byte| byte.is_ascii_graphic()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(BadToken::Shape)
        }
    }

    /// Reads the token from a file.
    ///
    /// # Errors
    /// [`BadToken`].
    pub fn read(path: &Path) -> Result<Self, BadToken> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| BadToken::Read { path: path.to_owned(), source })?;
        Self::new(&text)
    }

    /// Compares in a time that does not depend on where the difference is.
    fn is(&self, given: &str) -> bool {
        self.0.as_bytes().ct_eq(given.as_bytes()).into()
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

/// What a request must show.
#[derive(Debug, Clone)]
pub enum Access {
    /// The fleet's token.
    Token(Token),
    /// Nothing: the listening socket's file mode decides who may connect.
    SocketMode,
}

/// Lets requests pass that show what they must.
pub(super) fn required(access: Access) -> BoxedFilter<()> {
    warp::header::optional::<String>("authorization")
        .and_then(move |header: Option<String>| {
            let given = header.as_deref().and_then(|header| header.strip_prefix("Bearer ")).unwrap_or("");
            let allowed = match &access {
                Access::Token(token) => token.is(given),
                Access::SocketMode => true,
            };
            std::future::ready(if allowed { Ok(()) } else { Err(unauthorized(header.is_some())) })
        })
        .untuple_one()
        .boxed()
}

fn unauthorized(given: bool) -> Rejection {
    let detail = if given { "the token is not this fleet's" } else { "no token was given" };
    reject(Problem::new(
        ProblemCode::Unauthorized,
        detail,
        "send `Authorization: Bearer TOKEN` with the content of the fleet directory's `token` file (the CLI takes it from MASHINES_TOKEN or `mashines login`)",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_compare_whole() {
        let text = "t".repeat(64);
        let token = Token::new(&format!("{text}\n")).unwrap();
        assert!(token.is(&text));
        for other in ["", "t", &"t".repeat(63), &"u".repeat(64)] {
            assert!(!token.is(other));
        }
        assert_eq!(format!("{token:?}"), "Token(..)");
        for bad in ["", "short", &"t".repeat(2000), &format!("{text} {text}")] {
            assert!(Token::new(bad).is_err());
        }
    }
}
