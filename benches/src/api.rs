//! The control plane's REST API over its Unix socket, by hand: one connection a request, no runtime.
//!
//! HTTP/1.0, so that an answer ends where the connection does, a stream of server-sent events too. A benchmark that
//! used the command line would measure the start of a process with each request.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::de::DeserializeOwned;
use serde_json::Value;
use xtask::fleet::layout::FleetName;
use xtask::signals;

/// Longest wait for a piece of an answer.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// Longest answer, in bytes.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// A control plane.
#[derive(Debug, Clone)]
pub struct Api {
    socket: PathBuf,
}

impl Api {
    /// Of this fleet.
    pub fn of(fleet: &FleetName) -> Self {
        Self { socket: fleet.api_socket() }
    }

    /// One request and its parsed answer.
    ///
    /// # Errors
    /// When the control plane is not there or says no; what it said is in the error.
    pub fn ask<T: DeserializeOwned>(&self, method: &str, path: &str, body: Option<&Value>) -> Result<T> {
        let mut answer = String::new();
        self.send(method, path, body)?
            .read_to_string(&mut answer)
            .with_context(|| format!("{method} {path}"))?;
        serde_json::from_str(&answer).with_context(|| format!("{method} {path} answered {answer}"))
    }

    /// Follows server-sent events until `each` has seen enough. Returns what it returned.
    ///
    /// # Errors
    /// When the stream ends before, or `each` fails.
    pub fn follow<T>(&self, path: &str, mut each: impl FnMut(&Value) -> Result<Option<T>>) -> Result<T> {
        for line in self.send("GET", path, None)?.lines() {
            signals::check()?;
            let line = line.with_context(|| format!("following {path}"))?;
            if let Some(data) = line.strip_prefix("data:") {
                let value = serde_json::from_str(data).with_context(|| format!("{path} sent {data}"))?;
                if let Some(result) = each(&value)? {
                    return Ok(result);
                }
            }
        }
        bail!("the stream {path} ended early")
    }

    fn send(&self, method: &str, path: &str, body: Option<&Value>) -> Result<impl BufRead> {
        let shown = self.socket.display();
        let mut stream =
            UnixStream::connect(&self.socket).with_context(|| format!("connecting to {shown}"))?;
        stream.set_read_timeout(Some(SILENCE_MAX)).context("setting a timeout")?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.0\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).with_context(|| format!("writing to {shown}"))?;
        let mut answer = BufReader::new(stream.take(ANSWER_BYTES_MAX));
        let status = head(&mut answer).with_context(|| format!("{method} {path}"))?;
        if !(200..300).contains(&status) {
            let mut said = String::new();
            answer.read_to_string(&mut said).context("reading an error")?;
            bail!("{method} {path}: status {status}: {said}");
        }
        Ok(answer)
    }
}

/// Reads up to the body and returns the status.
fn head(answer: &mut impl BufRead) -> Result<u16> {
    let mut line = String::new();
    answer.read_line(&mut line)?;
    let status = line.split_whitespace().nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(|| anyhow!("no HTTP status in `{}`", line.trim()))?;
    while line.trim() != "" {
        line.clear();
        answer.read_line(&mut line)?;
    }
    Ok(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_up_to_the_body() {
        let mut answer = "HTTP/1.0 202 Accepted\r\na: b\r\n\r\nbody".as_bytes();
        assert_eq!(head(&mut answer).unwrap(), 202);
        assert_eq!(answer, b"body");
        assert!(head(&mut "".as_bytes()).is_err() && head(&mut "nonsense\r\n\r\n".as_bytes()).is_err());
    }
}
