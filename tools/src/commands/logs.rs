//! `logs`: console output by absolute offset, so that following goes on across migrations without loss or doubling.

use std::time::Duration;

use controlplane::api::{LIVE_HEADER, NEXT_OFFSET_HEADER, OFFSET_HEADER};
use reqwest::Response;

use crate::args::Logs;
use crate::client::Client;
use crate::exit::Failure;
use crate::output;

/// Between attempts to reach a control plane that is restarting.
const RETRY: Duration = Duration::from_secs(1);

pub(super) async fn run(client: &Client, logs: &Logs) -> Result<(), Failure> {
    tokio::select! {
        shown = show(client, logs) => shown,
        () = output::unread(), if logs.follow => Ok(()),
    }
}

async fn show(client: &Client, logs: &Logs) -> Result<(), Failure> {
    let mut offset = logs.offset;
    let mut begun = false;
    loop {
        let path = format!("/v1/machines/{}/logs?offset={offset}&follow={}", logs.machine, logs.follow);
        let answer = match read(client, &path).await {
            Ok(answer) => answer,
            Err(Failure::Unreachable { .. }) if logs.follow && begun => {
                tokio::time::sleep(RETRY).await;
                continue;
            }
            Err(failure) => return Err(failure),
        };
        // At the very beginning everything that is left is wanted; later a gap is worth a word.
        if answer.offset > offset && (begun || offset > 0) {
            eprintln!("[{} bytes of older output are gone]", answer.offset - offset);
        }
        begun = true;
        offset = answer.next;
        output::write(&answer.bytes)?;
        if !answer.live || (!logs.follow && answer.bytes.is_empty()) {
            return Ok(());
        }
    }
}

struct Answer {
    offset: u64,
    next: u64,
    live: bool,
    bytes: Vec<u8>,
}

async fn read(client: &Client, path: &str) -> Result<Answer, Failure> {
    let response = client.open(path, None).await?;
    let number = |name: &str| {
        header(&response, name)
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| Failure::Answer(format!("no header {name}")))
    };
    let (offset, next) = (number(OFFSET_HEADER)?, number(NEXT_OFFSET_HEADER)?);
    let live = header(&response, LIVE_HEADER) == Some("true");
    let bytes = client.whole(response).await?;
    Ok(Answer { offset, next, live, bytes })
}

fn header<'a>(response: &'a Response, name: &str) -> Option<&'a str> {
    response.headers().get(name).and_then(|value| value.to_str().ok())
}
