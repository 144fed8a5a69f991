//! `image build`, `image import`, `image ls`, `image rm`: images in a directory of this machine.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use image::assemble::Parts;
use image::build::{self, Build};
use image::kernel::{Archive, Choice};
use image::manifest::Manifest;
use image::name::ImageName;
use image::progress::Progress;
use image::store::{Freed, Store, StoreError};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::args::{self, ImagePart};
use crate::exit::Failure;
use crate::output;
use crate::units::show_bytes;

/// `image rm --json`.
#[derive(Serialize)]
struct Removed<'a> {
    removed: &'a [ImageName],
    blobs: usize,
    bytes: u64,
}

/// `image ls --json`.
#[derive(Serialize)]
struct List {
    images: Vec<Manifest>,
}

pub(super) async fn run(command: args::Image, json: bool) -> Result<(), Failure> {
    match command {
        args::Image::Build(build) => make(build, json).await,
        args::Image::Import(import) => bring(import, json).await,
        args::Image::Ls { store } => list(&Store::reading(&store.directory), json),
        args::Image::Rm { names, store } => remove(&Store::reading(&store.directory), &names, json),
    }
}

fn failure(error: &image::Error) -> Failure {
    use std::error::Error as _;
    let mut detail = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        detail.push_str(": ");
        detail.push_str(&inner.to_string());
        cause = inner.source();
    }
    let remedy = error.remedy().to_owned();
    match error {
        image::Error::Store(StoreError::NoSuchImage(_)) => Failure::Absent { detail, remedy },
        _ => Failure::Failed { detail, remedy },
    }
}

async fn make(args: args::BuildImage, json: bool) -> Result<(), Failure> {
    let base = args.base.as_deref().map(|base| image::oci::From::parse(base, false)).transpose();
    let what = base
        .map_err(image::Error::from)
        .and_then(|base| Ok(Build::new(&args.recipe, args.flavour, args.packages, base)?))
        .map_err(|error| failure(&error))?;
    let name = match &args.part.name {
        Some(name) => name.clone(),
        None => args.recipe.parse().map_err(|_| nameless(&args.recipe))?,
    };
    let store = open(&args.part)?;
    let parts = parts(args.part, name)?;
    let shown = Shown::new();
    let made = build::build(&store, &what, &parts, &shown).await;
    shown.end();
    report(&made.map_err(|error| failure(&error))?, json)
}

async fn bring(args: args::ImportImage, json: bool) -> Result<(), Failure> {
    let from =
        image::oci::From::parse(&args.from, args.plain_http).map_err(|error| failure(&error.into()))?;
    let name = match &args.part.name {
        Some(name) => name.clone(),
        None => from.name().ok_or_else(|| nameless(&args.from))?,
    };
    let store = open(&args.part)?;
    let parts = parts(args.part, name)?;
    let shown = Shown::new();
    let made = build::import(&store, &from, &parts, !args.without_modules, &shown).await;
    shown.end();
    report(&made.map_err(|error| failure(&error))?, json)
}

fn nameless(from: &str) -> Failure {
    Failure::usage(format!("`{from}` gives no name for the image"), "give one with --name")
}

fn open(part: &ImagePart) -> Result<Store, Failure> {
    Store::open(&part.store.directory).map_err(|error| failure(&error.into()))
}

fn parts(part: ImagePart, name: ImageName) -> Result<Parts, Failure> {
    let kernel = match part.kernel {
        Some(kernel) => Choice::File { kernel, modules: part.modules },
        None => Choice::Package {
            package: part.kernel_package,
            archive: part.kernel_suite.map(|suite| Archive { suite, mirror: part.debian_mirror }),
        },
    };
    let agent = match part.agent {
        Some(agent) => agent,
        None => beside_us()?,
    };
    Ok(Parts { name, kernel, agent, size_bytes: part.size, cmdline: part.cmdline })
}

fn beside_us() -> Result<PathBuf, Failure> {
    let own = std::env::current_exe().map_err(|error| {
        Failure::local("looking for the agent beside this program", error, "give --agent FILE")
    })?;
    Ok(own.with_file_name("mashine-agent"))
}

fn report(manifest: &Manifest, json: bool) -> Result<(), Failure> {
    if json {
        return output::json(manifest);
    }
    output::pairs(&[
        ("name", manifest.name.to_string()),
        ("disk", format!("{} {}", manifest.disk.digest, show_bytes(manifest.disk.bytes))),
        ("kernel", format!("{} {}", manifest.kernel.digest, manifest.kernel.release)),
        ("initrd", format!("{} {}", manifest.initrd.digest, show_bytes(manifest.initrd.bytes))),
        ("cmdline", manifest.cmdline.clone()),
    ])
}

fn list(store: &Store, json: bool) -> Result<(), Failure> {
    let images = store.list().map_err(|error| failure(&error.into()))?;
    if json {
        return output::json(&List { images });
    }
    let row = |image: &Manifest| {
        vec![
            image.name.to_string(),
            image.flavour.clone().unwrap_or_else(|| "-".to_owned()),
            image.kernel.release.clone(),
            show_bytes(image.disk.bytes),
            image.source.reference.clone(),
        ]
    };
    let rows: Vec<_> = images.iter().map(row).collect();
    output::table(&["NAME", "FLAVOUR", "KERNEL", "DISK", "SOURCE"], &rows)
}

fn remove(store: &Store, names: &[ImageName], json: bool) -> Result<(), Failure> {
    let mut freed = Freed::default();
    for name in names {
        let more = store.remove(name).map_err(|error| failure(&error.into()))?;
        freed.blobs += more.blobs;
        freed.bytes += more.bytes;
    }
    if json {
        return output::json(&Removed { removed: names, blobs: freed.blobs, bytes: freed.bytes });
    }
    output::line(&format!("removed {} files, {}", freed.blobs, show_bytes(freed.bytes)))
}

/// Progress on standard error: a line that changes on a terminal, a line for each step elsewhere.
struct Shown {
    bar: ProgressBar,
    step: Mutex<String>,
}

impl Shown {
    fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar, step: Mutex::new(String::new()) }
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}

impl Progress for Shown {
    fn step(&self, text: &str) {
        if self.bar.is_hidden() {
            eprintln!("{text}");
        } else {
            self.bar.set_message(text.to_owned());
        }
        if let Ok(mut step) = self.step.lock() {
            text.clone_into(&mut step);
        }
    }

    fn bytes(&self, done: u64, total: Option<u64>) {
        let step = self.step.lock().map(|step| step.clone()).unwrap_or_default();
        let of = total.map_or_else(String::new, |total| format!(" of {}", show_bytes(total)));
        self.bar.set_message(format!("{step}: {}{of}", show_bytes(done)));
    }

    fn note(&self, text: &str) {
        self.bar.suspend(|| eprintln!("note: {text}"));
    }
}
