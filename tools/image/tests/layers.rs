//! Layers over each other, and images in all forms.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use common::{Entry, Ground, Packed, gzip_layer, image, is_root, layout, plain_layer, tar, zstd_layer};
use image::oci::OciError;
use image::oci::limits::Limits;
use tar::EntryType;

fn names(path: &std::path::Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn two_layers() -> [Packed; 2] {
    let lower = gzip_layer(&[
        Entry::directory("etc/"),
        Entry::file("etc/keep", "1"),
        Entry::file("etc/gone", "1"),
        Entry::directory("opaque/"),
        Entry::directory("opaque/deep/"),
        Entry::file("opaque/deep/old", "1"),
        Entry::file("opaque/old", "1"),
        Entry::directory("tree/"),
        Entry::file("tree/in", "1"),
        Entry::file("becomes-directory", "1"),
        Entry::symlink("bin", "usr/bin"),
        Entry::directory("usr/bin"),
        Entry::symlink("run", "/var/run"),
        Entry::directory("var/run"),
    ]);
    let upper = zstd_layer(&[
        Entry::file("etc/.wh.gone", ""),
        Entry::file("etc/.wh.never-was", ""),
        // What this layer brings stays, whichever way round it comes.
        Entry::file("opaque/deep/new", "2"),
        Entry::file("opaque/.wh..wh..opq", ""),
        Entry::file("opaque/new", "2"),
        Entry::file("tree", "2"),
        Entry::directory("becomes-directory/"),
        Entry::file("becomes-directory/in", "2"),
        Entry::file("bin/tool", "2"),
        Entry::file("run/pid", "2"),
        Entry::file(".wh..wh.plnk", ""),
    ]);
    [lower, upper]
}

#[test]
fn upper_layers_hide_and_replace() {
    if !is_root("upper_layers_hide_and_replace") {
        return;
    }
    let ground = Ground::new();
    let (_scratch, root) = ground.layers(&two_layers(), &Limits::default()).unwrap();
    let at = |path: &str| root.path().join(path);
    assert_eq!(names(&at("etc")), ["keep"]);
    assert_eq!(names(&at("opaque")), ["deep", "new"]);
    assert_eq!(names(&at("opaque/deep")), ["new"]);
    assert_eq!(fs::read(at("tree")).unwrap(), b"2");
    assert_eq!(names(&at("becomes-directory")), ["in"]);
    assert!(at("bin").is_symlink());
    assert_eq!(fs::read(at("usr/bin/tool")).unwrap(), b"2");
    assert_eq!(fs::read(at("var/run/pid")).unwrap(), b"2");
    assert!(!at(".wh..wh.plnk").exists());
}

#[test]
fn owners_modes_links_and_attributes_are_kept() {
    if !is_root("owners_modes_links_and_attributes_are_kept") {
        return;
    }
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let entries = [
        Entry { mode: 0o4755, uid: 7, ..Entry::file("suid", "x") }
            .pax("SCHILY.xattr.security.capability", capability),
        Entry::hard_link("same", "suid"),
        Entry { mode: 0o1777, ..Entry::directory("tmp/") },
        Entry { uid: 100_000, ..Entry::symlink("link", "../../../etc/passwd") },
        Entry::new("pipe", EntryType::Fifo),
        Entry::new("sda", EntryType::Block),
        Entry::new("null", EntryType::Char),
        Entry::file("far", "x").pax("SCHILY.xattr.trusted.overlay.opaque", "y"),
        Entry::file(format!("{}/file", "d".repeat(150)), "long"),
        Entry::file("short", "x").pax("path", format!("{}/pax", "p".repeat(200))),
    ];
    let ground = Ground::new();
    let (_scratch, root) = ground.layers(&[plain_layer(&entries)], &Limits::default()).unwrap();
    let at = |path: &str| root.path().join(path);
    let suid = fs::metadata(at("suid")).unwrap();
    assert_eq!(
        (suid.permissions().mode() & 0o7777, suid.uid(), suid.gid(), suid.mtime()),
        (0o4755, 7, 7, 1_600_000_000)
    );
    assert_eq!(fs::metadata(at("same")).unwrap().ino(), suid.ino());
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(at("suid"), "security.capability", &mut value).unwrap();
    assert_eq!(&value[..length], capability);
    let tmp = fs::metadata(at("tmp")).unwrap();
    assert_eq!((tmp.permissions().mode() & 0o7777, tmp.mtime()), (0o1777, 1_600_000_000));
    let link = fs::symlink_metadata(at("link")).unwrap();
    assert_eq!(
        (link.uid(), fs::read_link(at("link")).unwrap().to_str().unwrap()),
        (100_000, "../../../etc/passwd")
    );
    assert!(!at("sda").exists() && !at("null").exists());
    assert!(rustix::fs::getxattr(at("far"), "trusted.overlay.opaque", &mut value).is_err());
    assert_eq!(fs::read(at(&"d".repeat(150)).join("file")).unwrap(), b"long");
    assert!(at(&"p".repeat(200)).join("pax").exists() && !at("short").exists());
}

#[test]
fn archives_of_both_kinds_and_compressed_ones_are_read() {
    if !is_root("archives_of_both_kinds_and_compressed_ones_are_read") {
        return;
    }
    let ground = Ground::new();
    let layer = plain_layer(&[Entry::file("hello", "world")]);
    let made = image(&[layer]);
    let path = |blob: &[u8]| format!("blobs/sha256/{}", image::digest::digest_of(blob).hex());
    let index = {
        let directory = ground.path("layout");
        layout(&directory, &made);
        fs::read(directory.join("index.json")).unwrap()
    };
    let mut oci: Vec<Entry> = made.blobs.iter().map(|blob| Entry::file(path(blob), blob)).collect();
    oci.push(Entry::file("index.json", index));
    let docker_manifest =
        serde_json::json!([{ "Config": "config.json", "RepoTags": ["x:1"], "Layers": ["abc/layer.tar"] }]);
    let docker = [
        Entry::file("config.json", &made.config),
        Entry::directory("abc/"),
        Entry::file("def/layer.tar", &made.blobs[0]),
        Entry::symlink("abc/layer.tar", "../def/layer.tar"),
        Entry::file("manifest.json", serde_json::to_vec(&docker_manifest).unwrap()),
    ];
    for (name, bytes) in
        [("oci.tar", tar(&oci)), ("docker.tar", tar(&docker)), ("docker.tar.gz", common::gzip(&tar(&docker)))]
    {
        fs::write(ground.path(name), bytes).unwrap();
        let (_scratch, root) = ground.tree(ground.path(name).to_str().unwrap(), &Limits::default()).unwrap();
        assert_eq!(fs::read(root.path().join("hello")).unwrap(), b"world", "{name}");
    }
    let stolen = [
        Entry::file("config.json", &made.config),
        Entry::symlink("layer.tar", "/etc/passwd"),
        Entry::file("manifest.json", r#"[{"Config":"config.json","Layers":["layer.tar"]}]"#),
    ];
    fs::write(ground.path("stolen.tar"), tar(&stolen)).unwrap();
    let error = ground.tree(ground.path("stolen.tar").to_str().unwrap(), &Limits::default()).unwrap_err();
    assert!(matches!(error, OciError::Lacks { .. }), "{error:?}");
    fs::write(ground.path("noise"), "this is no archive").unwrap();
    assert!(ground.tree(ground.path("noise").to_str().unwrap(), &Limits::default()).is_err());
}

#[test]
fn layouts_that_lie_are_refused() {
    if !is_root("layouts_that_lie_are_refused") {
        return;
    }
    let ground = Ground::new();
    let made = image(&[gzip_layer(&[Entry::file("a", "x")])]);
    // Each blob in turn: the layer, the configuration, the manifest.
    for (number, blob) in made.blobs.iter().enumerate() {
        let directory = ground.path(&format!("lying-{number}"));
        layout(&directory, &made);
        let file = directory.join("blobs/sha256").join(image::digest::digest_of(blob).hex());
        let mut wrong = blob.clone();
        *wrong.last_mut().unwrap() ^= 0x20;
        fs::write(&file, &wrong).unwrap();
        let from = format!("oci:{}", directory.display());
        let error = ground.tree(&from, &Limits::default()).unwrap_err();
        assert!(matches!(error, OciError::Digest { .. } | OciError::Archive(_)), "{number}: {error:?}");
        fs::write(&file, [blob, &b"more"[..]].concat()).unwrap();
        let error = ground.tree(&from, &Limits::default()).unwrap_err();
        assert!(matches!(error, OciError::Digest { .. } | OciError::Length { .. }), "{number}: {error:?}");
        fs::remove_file(&file).unwrap();
        assert!(matches!(ground.tree(&from, &Limits::default()), Err(OciError::Lacks { .. })));
    }
    let other =
        Packed { unpacked: image::digest::digest_of(b"other"), ..gzip_layer(&[Entry::file("a", "x")]) };
    let error = ground.layers(&[other], &Limits::default()).unwrap_err();
    assert!(matches!(error, OciError::Digest { .. }), "{error:?}");
    assert_eq!(ground.left_behind(), 0);
}
