//! `/v1/machines/{id}/agent`: bytes to and from a vsock port of the guest, by default its agent's.
//!
//! The request is an HTTP/1.1 upgrade (RFC 9110, section 7.8) to [`UPGRADE`]; after the answer 101 the connection carries the bytes of the
//! guest's, and nothing else. It ends when the machine moves; whoever uses it asks again and goes on: what was
//! received is for the two ends to number.

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use warp::Filter;
use warp::filters::BoxedFilter;
use warp::http::StatusCode;
use warp::http::header::{CONNECTION, HeaderValue, UPGRADE as UPGRADE_HEADER};
use warp::reply::Response;
use wire::fleet::RefusalCode;

use super::Context;
use super::query::{Query, part, query};
use super::respond::{bad_request, respond};
use crate::api::{AGENT_PORT, AGENT_UPGRADE as UPGRADE, Problem, ProblemCode};
use crate::core::MachineRef;
use crate::hosts::{GuestError, connect_guest};

pub(super) fn routes(context: Context) -> BoxedFilter<(Response,)> {
    let with = warp::any().map(move || context.clone());
    warp::path!("v1" / "machines" / String / "agent")
        .and(warp::get())
        .and(with)
        .and(query())
        .and(warp::header::optional::<String>("upgrade"))
        .and(warp::ext::optional::<OnUpgrade>())
        .then(|machine, context, query, upgrade: Option<String>, on| {
            respond(connect(context, machine, query, upgrade, on))
        })
        .boxed()
}

async fn connect(
    context: Context,
    machine: String,
    query: Vec<(String, String)>,
    upgrade: Option<String>,
    on: Option<OnUpgrade>,
) -> Result<Response, Problem> {
    let machine: MachineRef = part(&machine)?;
    let mut query = Query::new(query)?;
    let port: u32 = query.take("port")?.unwrap_or(AGENT_PORT);
    query.finish()?;
    let (Some(on), true) = (on, upgrade.as_deref() == Some(UPGRADE)) else {
        return Err(bad_request(
            "not a request to upgrade",
            format!("send `Connection: upgrade` and `Upgrade: {UPGRADE}` over HTTP/1.1"),
        ));
    };
    let permit = context.streams.clone().try_acquire_owned().map_err(|_| {
        Problem::new(ProblemCode::Busy, "too many streams are open", "close some, or try again later")
    })?;
    let (id, host) = context.core.call(move |core| core.guest_host(&machine)).await?;
    let (send, receive) = connect_guest(&host, id, port).await.map_err(problem)?;
    tokio::spawn(async move {
        if let Ok(client) = on.await {
            let mut guest = tokio::io::join(receive, send);
            // Either end may go at any time.
            let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut guest).await;
        }
        drop(permit);
    });
    let mut response = Response::new(bytes::Bytes::new().into());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(UPGRADE_HEADER, HeaderValue::from_static(UPGRADE));
    Ok(response)
}

fn problem(error: GuestError) -> Problem {
    match error {
        GuestError::Refused { code: RefusalCode::WrongState, detail } => Problem::new(
            ProblemCode::GuestUnreachable,
            detail,
            "see how far it has booted with `mashines logs`; only images of `mashines image` have an agent",
        ),
        GuestError::Refused { detail, .. } => Problem::new(
            ProblemCode::HostRefused,
            detail,
            "look at the machine with `mashines get` and `mashines logs`",
        ),
        GuestError::Host(_) | GuestError::Silent => Problem::new(
            ProblemCode::HostUnreachable,
            error.to_string(),
            "try again when `mashines host ls` shows it online",
        ),
    }
}
