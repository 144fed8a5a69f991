//! `events`.

use std::time::Duration;

use controlplane::api::Event;
use serde::Deserialize;
use serde_json::Value;

use crate::args;
use crate::client::Client;
use crate::exit::Failure;
use crate::output;
use crate::sse::Events;

/// Between attempts to take a broken stream up again.
const RETRY: Duration = Duration::from_secs(1);

#[derive(Deserialize)]
struct Page {
    events: Vec<Event>,
}

pub(super) async fn run(client: &Client, command: &args::Events, json: bool) -> Result<(), Failure> {
    if command.follow {
        return tokio::select! {
            followed = follow(client, command.after, json) => followed,
            () = output::unread() => Ok(()),
        };
    }
    let mut after = command.after.unwrap_or(0);
    loop {
        let page: Page = client.get(&format!("/v1/events?follow=false&limit=1000&after={after}")).await?;
        let Some(last) = page.events.last() else { return Ok(()) };
        after = last.id;
        for event in &page.events {
            show(event, json)?;
        }
    }
}

/// Goes on for ever. Once it has begun, a broken stream is taken up again after the last event seen, without loss.
async fn follow(client: &Client, after: Option<u64>, json: bool) -> Result<(), Failure> {
    let mut path = "/v1/events".to_owned();
    if let Some(after) = after {
        path.push_str(&format!("?after={after}"));
    }
    let mut last = None;
    let mut begun = false;
    loop {
        let opened = client.open(&path, last).await;
        let mut events = match opened {
            Ok(response) => Events::new(response),
            Err(Failure::Unreachable { .. }) if begun => {
                tokio::time::sleep(RETRY).await;
                continue;
            }
            Err(failure) => return Err(failure),
        };
        begun = true;
        loop {
            match events.next(client).await {
                Ok(Some(event)) => {
                    last = event.id.or(last);
                    show_data(&event.data, json)?;
                }
                Ok(None) | Err(Failure::Unreachable { .. }) => break,
                Err(failure) => return Err(failure),
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Shows an event of the stream; one of a kind that this release does not know as it is.
fn show_data(data: &str, json: bool) -> Result<(), Failure> {
    if json {
        return output::line(data);
    }
    if let Ok(event) = serde_json::from_str::<Event>(data) {
        return show(&event, false);
    }
    let value: Value = serde_json::from_str(data).map_err(|error| Failure::Answer(error.to_string()))?;
    output::line(&value.to_string())
}

fn show(event: &Event, json: bool) -> Result<(), Failure> {
    if json {
        return output::json(event);
    }
    let about = [
        event.machine.map(|id| id.to_string()),
        event.host.as_ref().map(ToString::to_string),
        event.migration.map(|id| id.to_string()),
    ];
    let about: Vec<String> = about.into_iter().flatten().collect();
    output::line(&format!(
        "{} {} {:20} {} ({})",
        event.id,
        clock(event.at_unix_ms),
        event.kind.as_str(),
        event.message,
        about.join(" ")
    ))
}

/// Date and time in UTC, by the civil-from-days rule: years begin in March, so that the leap day comes last.
fn clock(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        unix_ms % 1000
    )
}

#[cfg(test)]
mod tests {
    use super::clock;

    #[test]
    fn dates() {
        assert_eq!(clock(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(clock(951_782_399_999), "2000-02-28T23:59:59.999Z");
        assert_eq!(clock(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(clock(1_767_225_600_123), "2026-01-01T00:00:00.123Z");
    }
}
