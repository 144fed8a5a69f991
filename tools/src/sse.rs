//! Reading server-sent events.

use reqwest::Response;

use crate::client::Client;
use crate::exit::Failure;

/// Longest event that is read; the largest real one is a migration with its figures, about 2 KiB.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// One event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Event {
    /// Its kind.
    pub kind: String,
    /// Its id, if it has one.
    pub id: Option<u64>,
    /// Its data.
    pub data: String,
}

/// Events of an answer.
#[derive(Debug)]
pub struct Events {
    response: Response,
    parser: Parser,
}

impl Events {
    /// Reads events from `response`.
    pub fn new(response: Response) -> Self {
        Self { response, parser: Parser::default() }
    }

    /// The next event; `None` when the stream has ended.
    ///
    /// # Errors
    /// When the connection breaks or an event is too long.
    pub async fn next(&mut self, client: &Client) -> Result<Option<Event>, Failure> {
        loop {
            if let Some(event) = self.parser.next() {
                return Ok(Some(event));
            }
            match self.response.chunk().await.map_err(|error| client.unreachable(&error))? {
                Some(chunk) => self.parser.feed(&chunk)?,
                None => return Ok(None),
            }
        }
    }
}

/// Puts lines together to events.
#[derive(Debug, Default)]
struct Parser {
    bytes: Vec<u8>,
    event: Event,
}

impl Parser {
    fn feed(&mut self, chunk: &[u8]) -> Result<(), Failure> {
        if self.bytes.len() + self.event.data.len() + chunk.len() > EVENT_BYTES_MAX {
            return Err(Failure::Answer(format!("an event above {EVENT_BYTES_MAX} bytes")));
        }
        self.bytes.extend_from_slice(chunk);
        Ok(())
    }

    fn next(&mut self) -> Option<Event> {
        loop {
            let end = self.bytes.iter().position(|&byte| byte == b'\n')?;
            let line: Vec<u8> = self.bytes.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line[..end]).into_owned();
            let line = line.trim_end_matches('\r');
            if line.is_empty() {
                let event = std::mem::take(&mut self.event);
                // Comments that keep the connection alive end with an empty line as well.
                if !event.data.is_empty() {
                    return Some(event);
                }
                continue;
            }
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "event" => value.clone_into(&mut self.event.kind),
                "id" => self.event.id = value.parse().ok(),
                "data" => {
                    if !self.event.data.is_empty() {
                        self.event.data.push('\n');
                    }
                    self.event.data.push_str(value);
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_out_whole_however_they_arrive() {
        let text = b":\n\nevent:a\ndata:{\"x\":1}\nid:7\n\ndata: one\ndata: two\r\n\r\n";
        for size in 1..text.len() {
            let mut parser = Parser::default();
            let mut events = Vec::new();
            for chunk in text.chunks(size) {
                parser.feed(chunk).unwrap();
                events.extend(std::iter::from_fn(|| parser.next()));
            }
            assert_eq!(
                events,
                [
                    Event { kind: "a".into(), id: Some(7), data: "{\"x\":1}".into() },
                    Event { kind: String::new(), id: None, data: "one\ntwo".into() },
                ]
            );
        }
        assert!(Parser::default().feed(&vec![b'x'; EVENT_BYTES_MAX + 1]).is_err());
    }
}
