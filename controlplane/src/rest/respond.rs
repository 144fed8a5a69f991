//! Answers: JSON, bytes, streams, and problems.

use std::convert::Infallible;
use std::future::Future;

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use warp::Reply as _;
use warp::http::StatusCode;
use warp::http::header::{CONTENT_TYPE, HeaderValue, LOCATION, WWW_AUTHENTICATE};
use warp::reject::{self, Reject, Rejection};
use warp::reply::Response;

use crate::api::{BODY_BYTES_MAX, Problem, ProblemCode};
use crate::core::Answered;

/// Server-sent events that wait for a slow client before its stream is left to wait as well.
const STREAM_QUEUE: usize = 16;
/// How often a silent stream says that it is alive, so that a dead client is noticed.
const KEEP_ALIVE: std::time::Duration = std::time::Duration::from_secs(10);

/// Turns what a handler returns into an answer.
pub(super) async fn respond(handler: impl Future<Output = Result<Response, Problem>>) -> Response {
    handler.await.unwrap_or_else(|problem| problem_response(&problem))
}

/// An answer of JSON.
pub(super) fn json(status: u16, value: &impl Serialize) -> Result<Response, Problem> {
    bytes(status, "application/json", serialize(value)?.into())
}

/// The answer that was made under an idempotency key, or would have been.
pub(super) fn answered(answered: &Answered) -> Result<Response, Problem> {
    let mut response = json(answered.status, &answered.body)?;
    if let Some(location) = &answered.location {
        let value = HeaderValue::from_str(location).map_err(|error| internal(&error))?;
        response.headers_mut().insert(LOCATION, value);
    }
    Ok(response)
}

/// An answer of bytes.
pub(super) fn bytes(status: u16, content_type: &'static str, body: Bytes) -> Result<Response, Problem> {
    let mut response = Response::new(body.into());
    *response.status_mut() = StatusCode::from_u16(status).map_err(|error| internal(&error))?;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    Ok(response)
}

/// Sends server-sent events into a stream. `make` runs as a task of its own until it returns or the client is gone.
pub(super) fn stream<F, T>(permit: OwnedSemaphorePermit, make: F) -> Response
where
    F: FnOnce(EventSender) -> T,
    T: Future<Output = ()> + Send + 'static,
{
    let (sender, mut receiver) = mpsc::channel::<warp::sse::Event>(STREAM_QUEUE);
    let client_gone = sender.clone();
    let producer = make(EventSender(sender));
    tokio::spawn(async move {
        tokio::select! {
            () = producer => {}
            () = client_gone.closed() => {}
        }
        drop(permit);
    });
    let events = futures_util::stream::poll_fn(move |context| {
        receiver.poll_recv(context).map(|event| event.map(Ok::<_, Infallible>))
    });
    warp::sse::reply(warp::sse::keep_alive().interval(KEEP_ALIVE).stream(events)).into_response()
}

/// Where a stream's events go.
pub(super) struct EventSender(mpsc::Sender<warp::sse::Event>);

impl EventSender {
    /// Waits until the client has room. `false` when it is gone.
    pub(super) async fn send(&self, event: warp::sse::Event) -> bool {
        self.0.send(event).await.is_ok()
    }
}

/// A problem on its way through warp's rejections.
#[derive(Debug)]
struct Refused(Problem);

impl Reject for Refused {}

/// Ends a request with `problem`.
pub(super) fn reject(problem: Problem) -> Rejection {
    reject::custom(Refused(problem))
}

/// What warp itself refuses, as a problem.
pub(super) async fn rejection(rejection: Rejection) -> Result<Response, Infallible> {
    let problem = if let Some(Refused(problem)) = rejection.find() {
        problem.clone()
    } else if rejection.find::<reject::PayloadTooLarge>().is_some() {
        Problem::new(ProblemCode::BodyTooLong, format!("a body above {BODY_BYTES_MAX} bytes"), "send less")
    } else if rejection.find::<reject::LengthRequired>().is_some() {
        bad_request("a body without a length", "send a Content-Length header")
    } else if rejection.find::<reject::InvalidQuery>().is_some() {
        bad_request("the query string cannot be parsed", "use name=value pairs, joined by &")
    } else if rejection.find::<reject::InvalidHeader>().is_some() {
        bad_request("a header is not text", "send printable ASCII in headers")
    } else if rejection.find::<reject::MethodNotAllowed>().is_some() {
        Problem::new(
            ProblemCode::MethodNotAllowed,
            "this path does not take this method",
            "look at /v1/openapi.json",
        )
    } else {
        Problem::new(ProblemCode::NoSuchPath, "there is nothing here", "look at /v1/openapi.json")
    };
    Ok(problem_response(&problem))
}

pub(super) fn bad_request(detail: impl Into<String>, remedy: impl Into<String>) -> Problem {
    Problem::new(ProblemCode::BadRequest, detail, remedy)
}

fn internal(error: &dyn std::error::Error) -> Problem {
    Problem::new(ProblemCode::Internal, error.to_string(), "report this as a defect")
}

fn serialize(value: &impl Serialize) -> Result<Vec<u8>, Problem> {
    serde_json::to_vec(value).map_err(|error| internal(&error))
}

fn problem_response(problem: &Problem) -> Response {
    // Text and numbers always serialise; if they did not, the status would still say what matters.
    let body = serde_json::to_vec(problem).unwrap_or_default();
    let mut response = Response::new(Bytes::from(body).into());
    *response.status_mut() =
        StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    if problem.code == ProblemCode::Unauthorized {
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}
