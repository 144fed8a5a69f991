//! `/v1/events`: a stream that can be resumed without loss, or a page of what is kept.

use tokio::sync::broadcast::error::RecvError;
use warp::Filter;
use warp::filters::BoxedFilter;
use warp::reply::Response;
use warp::sse;

use super::Context;
use super::migrations::too_many_streams;
use super::query::{Query, query};
use super::respond::{EventSender, json, respond, stream};
use crate::api::{Event, EventKind, Problem};
use crate::core::Handle;

/// Events read from the store at a time.
const PAGE: usize = 256;

pub(super) fn routes(context: Context) -> BoxedFilter<(Response,)> {
    let with = warp::any().map(move || context.clone());
    warp::path!("v1" / "events")
        .and(warp::get())
        .and(with)
        .and(warp::header::optional::<u64>("last-event-id"))
        .and(query())
        .then(|context, last, query| respond(events(context, last, query)))
        .boxed()
}

async fn events(
    context: Context,
    last_event_id: Option<u64>,
    query: Vec<(String, String)>,
) -> Result<Response, Problem> {
    let mut query = Query::new(query)?;
    let after: Option<u64> = query.take("after")?;
    let follow = query.take("follow")?.unwrap_or(true);
    let limit = query.limit()?;
    query.finish()?;
    let newest = context.core.call(|core| Ok(core.newest_event())).await?;
    // A browser that reconnects repeats its first URL and adds the header, so the header counts.
    let after = last_event_id.or(after).unwrap_or(newest).min(newest);
    if !follow {
        let events = context.core.call(move |core| core.events_after(after, limit)).await?;
        return json(200, &serde_json::json!({"events": events}));
    }
    let permit = context.streams.clone().try_acquire_owned().map_err(|_| too_many_streams())?;
    let core = context.core.clone();
    Ok(stream(permit, move |sender| follow_events(core, after, sender)))
}

/// Sends what is kept, then what happens. A client that falls behind the live events is sent to the store again.
async fn follow_events(core: Handle, mut after: u64, sender: EventSender) {
    let mut live = core.subscribe();
    loop {
        let from = after;
        let Ok(kept) = core.call(move |core| core.events_after(from, PAGE)).await else { return };
        let more = kept.len() == PAGE;
        for event in kept {
            if event.id > after + 1 && !sender.send(gap(after, event.id)).await {
                return;
            }
            after = event.id;
            if !send(&sender, &event).await {
                return;
            }
        }
        if more {
            continue;
        }
        loop {
            match live.recv().await {
                Ok(event) if event.id <= after => {}
                Ok(event) if event.id == after + 1 => {
                    after = event.id;
                    if !send(&sender, &event).await {
                        return;
                    }
                }
                // Something was missed: the store has it.
                Ok(_) | Err(RecvError::Lagged(_)) => break,
                Err(RecvError::Closed) => return,
            }
        }
    }
}

async fn send(sender: &EventSender, event: &Event) -> bool {
    let made = sse::Event::default().id(event.id.to_string()).event(event.kind.as_str()).json_data(event);
    match made {
        Ok(made) => sender.send(made).await,
        Err(_) => false,
    }
}

/// Tells the client that events between are gone.
fn gap(after: u64, next: u64) -> sse::Event {
    let kind = EventKind::Gap.as_str();
    let data = serde_json::json!({"kind": kind, "after": after, "next": next});
    sse::Event::default().event(kind).data(data.to_string())
}
