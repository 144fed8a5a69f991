//! `/v1/machines/{id}/logs`: console output by absolute offset.
//!
//! The answer is bytes; its headers say where they begin, where to go on, and whether more may come. A client that repeats with
//! the offset it was given reads everything once, across migrations and restarts of the machine.

use std::time::{Duration, Instant};

use bytes::Bytes;
use warp::Filter;
use warp::filters::BoxedFilter;
use warp::http::header::HeaderValue;
use warp::reply::Response;
use wire::fleet::Answer;

use super::Context;
use super::query::{Query, part, query};
use super::respond::{bad_request, bytes, respond};
use crate::api::{LIVE_HEADER, LOG_BYTES_MAX, NEXT_OFFSET_HEADER, OFFSET_HEADER, Problem, ProblemCode};
use crate::core::{LogAnswer, LogRead, MachineRef};

/// How long a following request waits for output.
const FOLLOW: Duration = Duration::from_secs(20);
/// How often the host is asked meanwhile. Hosts do not announce output, because nearly nobody listens; asking is what remains.
const ASK_INTERVAL: Duration = Duration::from_millis(150);
/// How long a host has for its answer.
const HOST_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) fn routes(context: Context) -> BoxedFilter<(Response,)> {
    let with = warp::any().map(move || context.clone());
    warp::path!("v1" / "machines" / String / "logs")
        .and(warp::get())
        .and(with)
        .and(query())
        .then(|machine, context, query| respond(logs(context, machine, query)))
        .boxed()
}

async fn logs(context: Context, machine: String, query: Vec<(String, String)>) -> Result<Response, Problem> {
    let machine: MachineRef = part(&machine)?;
    let mut query = Query::new(query)?;
    let offset: u64 = query.take("offset")?.unwrap_or(0);
    let follow: bool = query.take("follow")?.unwrap_or(false);
    let limit: u32 = query.take("limit_bytes")?.unwrap_or(LOG_BYTES_MAX);
    query.finish()?;
    if limit == 0 || limit > LOG_BYTES_MAX {
        return Err(bad_request(format!("limit_bytes={limit}"), format!("use 1 to {LOG_BYTES_MAX}")));
    }
    let until = Instant::now() + FOLLOW;
    loop {
        match read(&context, &machine, offset, limit).await {
            Ok(answer) if !answer.bytes.is_empty() || !answer.live || !follow => return show(answer),
            // While a machine moves or its host reconnects, a follower waits rather than fails.
            Err(problem) if !(follow && passing(problem.code)) => return Err(problem),
            Ok(_) | Err(_) if Instant::now() >= until => {
                return show(LogAnswer { offset, bytes: Vec::new(), live: true });
            }
            Ok(_) | Err(_) => tokio::time::sleep(ASK_INTERVAL).await,
        }
    }
}

const fn passing(code: ProblemCode) -> bool {
    matches!(code, ProblemCode::HostUnreachable | ProblemCode::Busy)
}

async fn read(
    context: &Context,
    machine: &MachineRef,
    offset: u64,
    limit: u32,
) -> Result<LogAnswer, Problem> {
    let reference = machine.clone();
    let asked = context.core.call(move |core| core.read_log(&reference, offset, limit)).await?;
    let (base, answer) = match asked {
        LogRead::Now(answer) => return Ok(answer),
        LogRead::Asked { base, answer } => (base, answer),
    };
    match tokio::time::timeout(HOST_TIMEOUT, answer).await {
        // A host that has just given the machine away says that nothing more comes from there. Whether the machine
        // goes on is for the records to say, and they said so.
        Ok(Ok(Answer::Console { offset: from, bytes, live: _ })) => {
            Ok(LogAnswer { offset: base.saturating_add(from).max(offset), bytes, live: true })
        }
        // It has just left that host, or is about to be there.
        Ok(Ok(Answer::Unknown)) => Ok(LogAnswer { offset, bytes: Vec::new(), live: true }),
        Ok(Ok(Answer::Refused { detail, .. })) => {
            Err(Problem::new(ProblemCode::HostRefused, detail, "try again"))
        }
        Ok(Ok(other)) => Err(Problem::new(
            ProblemCode::HostRefused,
            format!("an answer that does not fit: {other:?}"),
            "report this as a defect",
        )),
        Ok(Err(_)) | Err(_) => Err(Problem::new(
            ProblemCode::HostUnreachable,
            "the host did not answer",
            "try again when `mashines host ls` shows it online",
        )),
    }
}

fn show(answer: LogAnswer) -> Result<Response, Problem> {
    let length = u64::try_from(answer.bytes.len()).unwrap_or(u64::MAX);
    let next = answer.offset.saturating_add(length);
    let mut response = bytes(200, "application/octet-stream", Bytes::from(answer.bytes))?;
    let headers = response.headers_mut();
    headers.insert(OFFSET_HEADER, HeaderValue::from(answer.offset));
    headers.insert(NEXT_OFFSET_HEADER, HeaderValue::from(next));
    headers.insert(LIVE_HEADER, HeaderValue::from_static(if answer.live { "true" } else { "false" }));
    Ok(response)
}
