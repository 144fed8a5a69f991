//! `/v1/images`: what machines can be launched from. Images are made and removed by `mashines image` in the control plane's directory.

use image::manifest::Manifest;
use image::name::ImageName;
use image::store::{Store, StoreError};
use warp::Filter;
use warp::filters::BoxedFilter;
use warp::reply::Response;

use super::Context;
use super::query::part;
use super::respond::{json, respond};
use crate::api::{ImageList, Problem, ProblemCode};

pub(super) fn routes(context: Context) -> BoxedFilter<(Response,)> {
    let with = warp::any().map(move || context.clone());
    let list = warp::path!("v1" / "images").and(warp::get()).and(with.clone()).then(|context: Context| {
        respond(async move {
            let images = blocking(context, |store| store.list()).await?;
            json(200, &ImageList { images })
        })
    });
    let get = warp::path!("v1" / "images" / String).and(warp::get()).and(with).then(
        |name: String, context: Context| {
            respond(async move {
                let name: ImageName = part(&name)?;
                json(200, &find(context, name).await?)
            })
        },
    );
    list.or(get).unify().boxed()
}

/// The image of this name, with all its blobs there.
pub(super) async fn find(context: Context, name: ImageName) -> Result<Manifest, Problem> {
    blocking(context, move |store| {
        let manifest = store.image(&name)?;
        store.whole(&manifest)?;
        Ok(manifest)
    })
    .await
}

async fn blocking<R: Send + 'static>(
    context: Context,
    work: impl FnOnce(&Store) -> Result<R, StoreError> + Send + 'static,
) -> Result<R, Problem> {
    let read = tokio::task::spawn_blocking(move || work(&Store::reading(&context.images)));
    match read.await {
        Ok(result) => result.map_err(|error| match &error {
            StoreError::NoSuchImage(_) => Problem::new(
                ProblemCode::NoSuchImage,
                error.to_string(),
                "list the images with `mashines image ls`; make one with `mashines image build` or `import`",
            ),
            _ => Problem::new(ProblemCode::Internal, error.to_string(), "import the image again"),
        }),
        Err(error) => Err(Problem::new(ProblemCode::Internal, error.to_string(), "report this as a defect")),
    }
}
