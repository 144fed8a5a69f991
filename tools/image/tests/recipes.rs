//! A recipe followed from start to end, on a base that is made here.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;
use std::path::Path;

use common::{Entry, Ground, gzip_layer, image, is_root, layout};
use image::Error;
use image::assemble::Parts;
use image::build::{Build, build};
use image::debian::Flavour;
use image::kernel::Choice;
use image::oci::OciError;
use image::progress::Silent;
use image::recipe::Recipe;
use image::store::StoreError;

const BUSYBOX: &str = "/bin/busybox";

/// A kernel that is none, but begins like one, and a program that could be an init.
fn parts(ground: &Ground) -> Parts {
    let (kernel, agent) = (ground.path("vmlinuz"), ground.path("agent"));
    let mut bytes = vec![0; 0x400];
    bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
    bytes[0x300..0x304].copy_from_slice(b"6.1\0");
    fs::write(&kernel, bytes).unwrap();
    fs::copy(BUSYBOX, &agent).unwrap();
    Parts {
        name: "made".parse().unwrap(),
        kernel: Choice::File { kernel, modules: None },
        agent,
        size_bytes: None,
        cmdline: None,
    }
}

fn follow(ground: &Ground, step: &str) -> Result<image::manifest::Manifest, Error> {
    let base = ground.path("base");
    let entries = [
        Entry::directory("bin/"),
        Entry { mode: 0o755, ..Entry::file("bin/busybox", fs::read(BUSYBOX).unwrap()) },
        Entry::symlink("bin/sh", "busybox"),
        // Where a link would lead the step's mounts.
        Entry::symlink("dev", "/bin"),
    ];
    layout(&base, &image(&[gzip_layer(&entries)]));
    let text = format!(
        "base = \"oci:{}\"\nentrypoint = [\"/sbin/init\"]\ninstall = \"/bin/busybox echo\"\npackages = [\"a\"]\nafter = [{step:?}]\n[flavour.minimal]\n",
        base.display()
    );
    let recipe = Recipe::parse("test", &text, Flavour::Minimal).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(build(&ground.store, &Build::Recipe(recipe), &parts(ground), &Silent))
}

fn can_run(test: &str) -> bool {
    if !Path::new(BUSYBOX).exists() {
        println!("SKIPPED: {test} needs busybox (Debian package busybox-static)");
        return false;
    }
    is_root(test)
}

#[test]
fn steps_run_in_the_image_and_leave_nothing_else() {
    if !can_run("steps_run_in_the_image_and_leave_nothing_else") {
        return;
    }
    let ground = Ground::new();
    let own = ground.path("store").display().to_string();
    let mounts = || fs::read_to_string("/proc/self/mounts").unwrap().matches(&own).count();
    let step = "b=/bin/busybox; $b echo $$ > /pid; $b echo made > /made; $b test -c /dev/null; $b test -e /proc/self";
    let manifest = follow(&ground, step).unwrap();
    let disk = ground.store.blob(manifest.disk.digest);
    let read = |path: &str| {
        let output = std::process::Command::new("/usr/sbin/debugfs")
            .args(["-R", &format!("cat {path}")])
            .arg(&disk)
            .output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    assert_eq!(read("/made"), "made\n");
    // Processes of its own.
    assert_eq!(read("/pid"), "1\n");
    assert_eq!((mounts(), ground.left_behind()), (0, 0));
    assert_eq!(manifest.config.entrypoint, ["/sbin/init"]);
    assert!(manifest.source.reference.starts_with("test on oci:"));
}

#[test]
fn a_step_that_fails_is_quoted_and_makes_no_image() {
    if !can_run("a_step_that_fails_is_quoted_and_makes_no_image") {
        return;
    }
    let ground = Ground::new();
    let error = follow(&ground, "/bin/busybox echo the reason >&2; exit 7").unwrap_err();
    let Error::Oci(OciError::Step { source, .. }) = &error else { panic!("{error:?}") };
    assert!(source.to_string().contains("the reason"), "{source}");
    assert_eq!(ground.left_behind(), 0);
    let none = ground.store.image(&"made".parse().unwrap());
    assert!(matches!(none, Err(StoreError::NoSuchImage(_))));
}

#[test]
fn the_same_sources_make_the_same_image() {
    if !can_run("the_same_sources_make_the_same_image") {
        return;
    }
    let ground = Ground::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let make = || runtime.block_on(build(&ground.store, &Build::Busybox, &parts(&ground), &Silent)).unwrap();
    let first = make();
    // Into another second, so that a time that is kept shows.
    let began = std::time::SystemTime::now();
    while began.elapsed().unwrap_or_default().as_millis() < 1100 {
        std::thread::yield_now();
    }
    let second = make();
    assert_eq!(first.initrd, second.initrd);
    assert_eq!(first.kernel, second.kernel);
    assert_eq!(first.disk, second.disk);
}

#[test]
fn kernels_agents_and_disks_that_are_none_are_refused_at_once() {
    if !can_run("kernels_agents_and_disks_that_are_none_are_refused_at_once") {
        return;
    }
    let ground = Ground::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let make =
        |parts: &Parts| runtime.block_on(build(&ground.store, &Build::Busybox, parts, &Silent)).unwrap_err();
    let noise = ground.path("noise");
    fs::write(&noise, "noise").unwrap();
    let good = parts(&ground);
    let error =
        make(&Parts { kernel: Choice::File { kernel: noise.clone(), modules: None }, ..good.clone() });
    assert!(matches!(error, Error::Kernel(_)), "{error:?}");
    for agent in [noise.clone(), ground.path("missing")] {
        let error = make(&Parts { agent, ..good.clone() });
        assert!(matches!(error, Error::Initrd(_)), "{error:?}");
    }
    let error = make(&Parts { cmdline: Some("a\nb".to_owned()), ..good.clone() });
    assert!(matches!(error, Error::Cmdline));
    // A disk: none, one with partitions, and one that is good.
    let import = |path: &Path| {
        let from = image::oci::From::parse(path.to_str().unwrap(), false).unwrap();
        runtime.block_on(image::build::import(&ground.store, &from, &good, true, &Silent))
    };
    let mut partitions = vec![0; 4 << 20];
    partitions[510..512].copy_from_slice(&[0x55, 0xaa]);
    fs::write(&noise, partitions).unwrap();
    assert!(matches!(import(&noise), Err(Error::Disk(_))));
    let (tree, disk) = (ground.path("tree"), ground.path("good.img"));
    fs::create_dir(&tree).unwrap();
    image::disk::make(&tree, &disk, None, "x").unwrap();
    let manifest = import(&disk).unwrap();
    assert_eq!(manifest.disk.bytes, 64 << 20);
    assert_eq!(ground.left_behind(), 0);
}
