//! `/v1/machines`.

use std::time::Duration;

use bytes::Bytes;
use warp::Filter;
use warp::filters::BoxedFilter;
use warp::reply::Response;

use super::query::{Query, bind_key, body, idempotency_key, parse, part, query};
use super::respond::{answered, json, respond};
use super::{Context, images};
use crate::api::{
    LaunchRequest, Machine, MachineState, MigrateRequest, Problem, ProblemCode, StopRequest, WAIT_MS_MAX,
};
use crate::core::{Answered, MachineFilter, MachineRef};

/// How long `wait` waits when the request does not say, in seconds.
const WAIT_S: u64 = 60;

pub(super) fn routes(context: Context) -> BoxedFilter<(Response,)> {
    let with = {
        let context = context.clone();
        warp::any().map(move || context.clone())
    };
    let base = warp::path("v1").and(warp::path("machines"));
    let launch = base
        .and(warp::path::end())
        .and(warp::post())
        .and(with.clone())
        .and(idempotency_key())
        .and(body())
        .then(|context, key: Option<String>, body| respond(launch(context, key, body)));
    let list = base
        .and(warp::path::end())
        .and(warp::get())
        .and(with.clone())
        .and(query())
        .then(|context, query| respond(list(context, query)));
    let one = base.and(warp::path::param::<String>());
    let get = one
        .and(warp::path::end())
        .and(warp::get())
        .and(with.clone())
        .then(|machine, context| respond(get(context, machine)));
    let delete = one
        .and(warp::path::end())
        .and(warp::delete())
        .and(with.clone())
        .and(query())
        .then(|machine, context, query| respond(delete(context, machine, query)));
    let action = one
        .and(warp::path::param::<String>())
        .and(warp::path::end())
        .and(warp::post())
        .and(with.clone())
        .and(idempotency_key())
        .and(body())
        .then(|machine, action, context, key, body| respond(act(context, machine, action, key, body)));
    let wait = one
        .and(warp::path("wait"))
        .and(warp::path::end())
        .and(warp::get())
        .and(with)
        .and(query())
        .then(|machine, context, query| respond(wait(context, machine, query)));
    let collection = launch.or(list).unify();
    let single = get.or(delete).unify().or(action).unify().or(wait).unify();
    collection.or(single).unify().boxed()
}

async fn launch(context: Context, key: Option<String>, body: Bytes) -> Result<Response, Problem> {
    let request: LaunchRequest = parse(&body)?;
    let image = match &request.image {
        Some(name) => Some(images::find(context.clone(), part(name)?).await?),
        None => None,
    };
    let key = bind_key(key.as_deref(), "POST", "/v1/machines", &body)?;
    let change = move |core: &mut crate::core::Core| {
        core.once(key, |core| {
            let machine = core.launch(&request, image.as_ref())?;
            Answered::new(201, Some(format!("/v1/machines/{}", machine.id)), &machine)
        })
    };
    answered(&context.core.call(change).await?)
}

async fn list(context: Context, query: Vec<(String, String)>) -> Result<Response, Problem> {
    let mut query = Query::new(query)?;
    let filter = MachineFilter {
        state: query.take("state")?,
        host: query.take("host")?,
        name: query.take("name")?,
        after: query.take("cursor")?,
        limit: query.limit()?,
    };
    query.finish()?;
    json(200, &context.core.call(move |core| Ok(core.machines(&filter))).await?)
}

async fn get(context: Context, machine: String) -> Result<Response, Problem> {
    let machine: MachineRef = part(&machine)?;
    json(200, &context.core.call(move |core| core.machine(&machine)).await?)
}

async fn delete(
    context: Context,
    machine: String,
    query: Vec<(String, String)>,
) -> Result<Response, Problem> {
    let machine: MachineRef = part(&machine)?;
    let mut query = Query::new(query)?;
    let force = query.take("force")?.unwrap_or(false);
    query.finish()?;
    match context.core.call(move |core| core.remove(&machine, force)).await? {
        Some(machine) => json(202, &machine),
        None => json(200, &destroyed()),
    }
}

/// What remains to be said of a machine that is gone.
fn destroyed() -> serde_json::Value {
    serde_json::json!({"state": MachineState::Destroyed})
}

async fn act(
    context: Context,
    machine: String,
    action: String,
    key: Option<String>,
    body: Bytes,
) -> Result<Response, Problem> {
    let reference: MachineRef = part(&machine)?;
    let path = format!("/v1/machines/{machine}/{action}");
    let key = bind_key(key.as_deref(), "POST", &path, &body)?;
    let result = match action.as_str() {
        "migrate" => {
            let request: MigrateRequest = parse(&body)?;
            let change = move |core: &mut crate::core::Core| {
                core.once(key, |core| {
                    let migration = core.migrate(&reference, &request)?;
                    let location = format!("/v1/migrations/{}", migration.id);
                    Answered::new(202, Some(location), &migration)
                })
            };
            context.core.call(change).await?
        }
        "start" | "stop" => {
            let start = action == "start";
            let request = if start {
                parse::<Nothing>(&body)?;
                StopRequest::default()
            } else {
                parse(&body)?
            };
            let change = move |core: &mut crate::core::Core| {
                core.once(key, |core| {
                    let machine =
                        if start { core.start(&reference)? } else { core.stop(&reference, &request)? };
                    Answered::new(202, Some(format!("/v1/machines/{}", machine.id)), &machine)
                })
            };
            context.core.call(change).await?
        }
        _ => {
            return Err(Problem::new(
                ProblemCode::NoSuchPath,
                format!("a machine has no action `{}`", action.escape_debug()),
                "use start, stop or migrate",
            ));
        }
    };
    answered(&result)
}

/// Body of requests that take nothing.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

async fn wait(context: Context, machine: String, query: Vec<(String, String)>) -> Result<Response, Problem> {
    let reference: MachineRef = part(&machine)?;
    let mut query = Query::new(query)?;
    let wanted: MachineState = query.take("state")?.unwrap_or(MachineState::Started);
    let limit = Duration::from_secs(query.take("timeout")?.unwrap_or(WAIT_S));
    query.finish()?;
    let limit = limit.min(Duration::from_millis(WAIT_MS_MAX));
    match tokio::time::timeout(limit, reach(&context, reference, wanted)).await {
        Ok(result) => match result? {
            Some(machine) => json(200, &machine),
            None => json(200, &destroyed()),
        },
        Err(_) => Err(Problem::new(
            ProblemCode::WaitTimeout,
            format!("machine {machine} was not {wanted} within {} s", limit.as_secs()),
            "ask again to wait longer, or look at it with `mashines get`",
        )),
    }
}

/// Waits until the machine is in the state, or cannot get there by itself any more.
async fn reach(
    context: &Context,
    machine: MachineRef,
    wanted: MachineState,
) -> Result<Option<Machine>, Problem> {
    let mut revision = context.core.revision();
    loop {
        revision.mark_unchanged();
        let reference = machine.clone();
        let now = match context.core.call(move |core| core.machine(&reference)).await {
            Ok(machine) => machine,
            Err(problem)
                if problem.code == ProblemCode::NoSuchMachine && wanted == MachineState::Destroyed =>
            {
                return Ok(None);
            }
            Err(problem) => return Err(problem),
        };
        if now.state == wanted {
            return Ok(Some(now));
        }
        let ended = matches!(now.state, MachineState::Failed | MachineState::Stopped);
        let to_run =
            matches!(wanted, MachineState::Started | MachineState::Starting | MachineState::Creating);
        if ended && (to_run || wanted == MachineState::Stopped) {
            return Err(fell_short(&now));
        }
        if revision.changed().await.is_err() {
            return Err(Problem::new(ProblemCode::Internal, "the control plane is stopping", "try again"));
        }
    }
}

/// A machine that ended instead of reaching the state that was waited for.
fn fell_short(machine: &Machine) -> Problem {
    let why = machine.reason.as_ref().map_or_else(String::new, |reason| format!(": {}", reason.detail));
    let detail = format!("machine {} is {}{why}", machine.name, machine.state);
    // Reasons of hosts that refused are named as their codes; the others tell how a guest ended.
    match machine.reason.as_ref().map(|reason| reason.code.as_str()) {
        Some("bad_boot") => Problem::new(
            ProblemCode::HostRefused,
            detail,
            format!(
                "give a kernel that can be booted (PVH ELF or bzImage), after `mashines rm {}`",
                machine.name
            ),
        ),
        Some("no_ram" | "cpu_feature" | "tsc" | "host_error" | "no_blob" | "no_disk") => Problem::new(
            ProblemCode::HostRefused,
            detail,
            format!("mend what the host says, or start it elsewhere with `mashines start {}`", machine.name),
        ),
        _ => Problem::new(ProblemCode::WrongState, detail, "look at `mashines logs` and start it again"),
    }
}
