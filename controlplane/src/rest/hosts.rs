//! `/v1/hosts`.

use warp::Filter;
use warp::filters::BoxedFilter;
use warp::reply::Response;
use wire::ids::HostName;

use super::Context;
use super::query::part;
use super::respond::{json, respond};

pub(super) fn routes(context: Context) -> BoxedFilter<(Response,)> {
    let with = warp::any().map(move || context.clone());
    let list = warp::path!("v1" / "hosts").and(warp::get()).and(with.clone()).then(|context: Context| {
        respond(async move { json(200, &context.core.call(|core| Ok(core.host_list())).await?) })
    });
    let get = warp::path!("v1" / "hosts" / String).and(warp::get()).and(with).then(
        |host: String, context: Context| {
            respond(async move {
                let host: HostName = part(&host)?;
                json(200, &context.core.call(move |core| core.host(&host)).await?)
            })
        },
    );
    list.or(get).unify().boxed()
}
