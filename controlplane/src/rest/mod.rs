//! The REST API over HTTP/1.1 (warp).
//!
//! On TCP every request but `/healthz` and the OpenAPI document carries `Authorization: Bearer TOKEN`; a Unix socket is guarded by its
//! file mode instead. It speaks plain HTTP and is meant for loopback or a Unix socket; whoever wants it on a network puts TLS in front. A request becomes typed values first; whatever
//! is wrong with it is answered with a [`Problem`] before the core hears of it.

mod agent;
mod auth;
mod events;
mod hosts;
mod images;
mod logs;
mod machines;
mod migrations;
mod query;
mod respond;

pub use auth::{Access, BadToken, Token};

use std::path::Path;
use std::sync::Arc;

use tokio::sync::Semaphore;
use warp::filters::BoxedFilter;
use warp::reply::Response;
use warp::{Filter, Reply};

use crate::api::{Problem, ProblemCode, openapi};
use crate::core::Handle;
use respond::respond;

/// Requests served at once. A waiting one costs a few KiB.
const REQUESTS_MAX: usize = 512;
/// Event and migration streams open at once.
const STREAMS_MAX: usize = 256;

/// What handlers work with.
#[derive(Clone)]
struct Context {
    core: Handle,
    streams: Arc<Semaphore>,
    /// The store of images.
    images: Arc<Path>,
}

/// The whole API.
pub fn routes(core: Handle, access: Access, images: Arc<Path>) -> BoxedFilter<(impl Reply,)> {
    let context = Context { core, streams: Arc::new(Semaphore::new(STREAMS_MAX)), images };
    let open = healthz(context.clone()).or(openapi_document()).unify();
    let v1 = machines::routes(context.clone())
        .or(logs::routes(context.clone()))
        .unify()
        .or(agent::routes(context.clone()))
        .unify()
        .or(hosts::routes(context.clone()))
        .unify()
        .or(images::routes(context.clone()))
        .unify()
        .or(migrations::routes(context.clone()))
        .unify()
        .or(events::routes(context.clone()))
        .unify()
        .or(metrics(context))
        .unify();
    let requests = Arc::new(Semaphore::new(REQUESTS_MAX));
    let admitted = warp::any()
        .and_then(move || std::future::ready(admit(&requests)))
        .and(auth::required(access))
        .and(v1)
        // The permit lives until the answer's head is ready; streams have a bound of their own.
        .map(|_permit, response| response);
    open.or(admitted).unify().recover(respond::rejection).unify().boxed()
}

fn admit(requests: &Arc<Semaphore>) -> Result<tokio::sync::OwnedSemaphorePermit, warp::Rejection> {
    requests.clone().try_acquire_owned().map_err(|_| {
        respond::reject(Problem::new(
            ProblemCode::Busy,
            format!("{REQUESTS_MAX} requests are under way"),
            "try again in a second",
        ))
    })
}

/// Alive means: the core answers, so its store does.
fn healthz(context: Context) -> BoxedFilter<(Response,)> {
    warp::path!("healthz")
        .and(warp::get())
        .then(move || {
            let core = context.core.clone();
            respond(async move {
                core.call(|_| Ok(())).await?;
                respond::json(200, &serde_json::json!({"ok": true}))
            })
        })
        .boxed()
}

fn openapi_document() -> BoxedFilter<(Response,)> {
    warp::path!("v1" / "openapi.json")
        .and(warp::get())
        .then(|| respond(async { respond::json(200, &openapi::document()) }))
        .boxed()
}

fn metrics(context: Context) -> BoxedFilter<(Response,)> {
    warp::path!("metrics")
        .and(warp::get())
        .then(move || {
            let core = context.core.clone();
            respond(async move {
                let text = core.call(|core| Ok(core.metrics())).await?;
                respond::bytes(200, "text/plain; version=0.0.4; charset=utf-8", text.into())
            })
        })
        .boxed()
}
