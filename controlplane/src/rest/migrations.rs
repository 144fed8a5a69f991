//! `/v1/migrations`.

use bytes::Bytes;
use warp::Filter;
use warp::filters::BoxedFilter;
use warp::reply::Response;
use warp::sse;
use wire::ids::MigrationId;

use super::Context;
use super::machines::Nothing;
use super::query::{Query, bind_key, body, idempotency_key, parse, part, query};
use super::respond::{EventSender, answered, json, respond, stream};
use crate::api::{Phase, Problem, ProblemCode};
use crate::core::{Answered, Handle, MigrationFilter};

/// Shortest time between two states of a watched migration: what an eye can follow.
const WATCH_INTERVAL: std::time::Duration = std::time::Duration::from_millis(50);

pub(super) fn routes(context: Context) -> BoxedFilter<(Response,)> {
    let with = warp::any().map(move || context.clone());
    let list = warp::path!("v1" / "migrations")
        .and(warp::get())
        .and(with.clone())
        .and(query())
        .then(|context, query| respond(list(context, query)));
    let get = warp::path!("v1" / "migrations" / String)
        .and(warp::get())
        .and(with.clone())
        .then(|id, context| respond(get(context, id)));
    let cancel = warp::path!("v1" / "migrations" / String / "cancel")
        .and(warp::post())
        .and(with.clone())
        .and(idempotency_key())
        .and(body())
        .then(|id, context, key, body| respond(cancel(context, id, key, body)));
    let watch = warp::path!("v1" / "migrations" / String / "watch")
        .and(warp::get())
        .and(with)
        .then(|id, context| respond(watch(context, id)));
    list.or(get).unify().or(cancel).unify().or(watch).unify().boxed()
}

async fn list(context: Context, query: Vec<(String, String)>) -> Result<Response, Problem> {
    let mut query = Query::new(query)?;
    let filter = MigrationFilter {
        machine: query.take("machine")?,
        phase: query.take::<Phase>("phase")?,
        before: query.take("cursor")?,
        limit: query.limit()?,
    };
    query.finish()?;
    json(200, &context.core.call(move |core| core.migrations(&filter)).await?)
}

async fn get(context: Context, id: String) -> Result<Response, Problem> {
    let id: MigrationId = part(&id)?;
    json(200, &context.core.call(move |core| core.migration(id)).await?)
}

async fn cancel(context: Context, id: String, key: Option<String>, body: Bytes) -> Result<Response, Problem> {
    parse::<Nothing>(&body)?;
    let path = format!("/v1/migrations/{id}/cancel");
    let id: MigrationId = part(&id)?;
    let key = bind_key(key.as_deref(), "POST", &path, &body)?;
    let change = move |core: &mut crate::core::Core| {
        core.once(key, |core| {
            let migration = core.cancel_migration(id)?;
            Answered::new(202, Some(format!("/v1/migrations/{id}")), &migration)
        })
    };
    answered(&context.core.call(change).await?)
}

/// Streams the migration as it changes, until it has ended: server-sent events `migration`, each with the whole object.
async fn watch(context: Context, id: String) -> Result<Response, Problem> {
    let id: MigrationId = part(&id)?;
    context.core.call(move |core| core.migration(id)).await?;
    let permit = context.streams.clone().try_acquire_owned().map_err(|_| too_many_streams())?;
    let core = context.core.clone();
    Ok(stream(permit, |sender| send_states(core, id, sender)))
}

pub(super) fn too_many_streams() -> Problem {
    Problem::new(ProblemCode::Busy, "too many streams are open", "close some, or poll instead")
}

async fn send_states(core: Handle, id: MigrationId, sender: EventSender) {
    let mut revision = core.revision();
    let mut last = None;
    loop {
        revision.mark_unchanged();
        // It ends when the migration is no longer kept or the core has stopped.
        let Ok(migration) = core.call(move |core| core.migration(id)).await else { return };
        let ended = migration.phase.is_terminal();
        let Ok(value) = serde_json::to_value(&migration) else { return };
        if last.as_ref() != Some(&value) {
            let Ok(event) = sse::Event::default().event("migration").json_data(&value) else { return };
            if !sender.send(event).await {
                return;
            }
            last = Some(value);
        }
        if ended || revision.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}
