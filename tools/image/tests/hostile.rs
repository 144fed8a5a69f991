//! Archives that mean harm: each is refused by name, nothing outside is touched, nothing is left behind.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;

use common::{Entry, Ground, gzip_layer, is_root, plain_layer};
use image::oci::OciError;
use image::oci::limits::Limits;
use tar::EntryType;

/// What an error must be.
type Expected = fn(&OciError) -> bool;

fn climbs(error: &OciError) -> bool {
    matches!(error, OciError::Climbs(_))
}

fn hard_link(error: &OciError) -> bool {
    matches!(error, OciError::HardLink { .. })
}

fn kind(error: &OciError) -> bool {
    matches!(error, OciError::Kind { .. })
}

fn too_large(error: &OciError) -> bool {
    matches!(error, OciError::TooLarge { .. })
}

fn entry(error: &OciError) -> bool {
    matches!(error, OciError::Entry { .. })
}

fn small() -> Limits {
    Limits { bytes: 1 << 20, files: 1000, ratio: 20, ratio_from_bytes: 256 << 10 }
}

fn table() -> Vec<(&'static str, Vec<Entry>, Expected)> {
    let long_name = "n".repeat(256);
    let long_path = "d/".repeat(2100) + "f";
    let zeros = vec![0; 600 << 10];
    let many = (0..1001).map(|number| Entry::file(format!("f{number}"), "")).collect();
    let chain = (0..50).map(|number| Entry::symlink(format!("l{number}"), format!("l{}", number + 1)));
    let chain = chain.chain([Entry::file("l0/x", "x")]).collect();
    vec![
        ("parent in a path", vec![Entry::file("../escaped", "x")], climbs),
        ("parent in the middle", vec![Entry::file("a/../../escaped", "x")], climbs),
        ("absolute path", vec![Entry::file("/etc/escaped", "x")], climbs),
        ("parent in a PAX path", vec![Entry::file("a", "x").pax("path", "../escaped")], climbs),
        ("absolute PAX path", vec![Entry::file("a", "x").pax("path", "/escaped")], climbs),
        ("directory above", vec![Entry::directory("..")], climbs),
        (
            "file through a climbing link",
            vec![Entry::symlink("up", "../../../.."), Entry::file("up/escaped", "x")],
            climbs,
        ),
        (
            "file through two links",
            vec![
                Entry::symlink("a", "b/.."),
                Entry::directory("b"),
                Entry::symlink("c", "a/../.."),
                Entry::file("c/escaped", "x"),
            ],
            climbs,
        ),
        (
            "directory through a climbing link",
            vec![Entry::symlink("up", "../outside"), Entry::directory("up/escaped")],
            climbs,
        ),
        (
            "whiteout through a climbing link",
            vec![Entry::symlink("up", "../outside"), Entry::file("up/.wh.secret", "")],
            climbs,
        ),
        (
            "opaque whiteout through a climbing link",
            vec![Entry::symlink("up", "../outside"), Entry::file("up/.wh..wh..opq", "")],
            climbs,
        ),
        (
            "symbolic link through a climbing link",
            vec![Entry::symlink("up", "../outside"), Entry::symlink("up/escaped", "x")],
            climbs,
        ),
        ("hard link above", vec![Entry::hard_link("a", "../outside/secret")], climbs),
        ("absolute hard link", vec![Entry::hard_link("a", "/etc/passwd")], climbs),
        (
            "hard link through a climbing link",
            vec![Entry::symlink("up", "../outside"), Entry::hard_link("a", "up/secret")],
            climbs,
        ),
        ("hard link to nothing", vec![Entry::hard_link("a", "b")], hard_link),
        ("hard link to itself", vec![Entry::file("a", ""), Entry::hard_link("a", "a")], hard_link),
        ("hard link to a directory", vec![Entry::directory("d"), Entry::hard_link("a", "d")], hard_link),
        ("hard link to the root", vec![Entry::hard_link("a", ".")], hard_link),
        (
            "links in a circle",
            vec![Entry::symlink("a", "b"), Entry::symlink("b", "a"), Entry::file("a/x", "")],
            entry,
        ),
        ("a long chain of links", chain, entry),
        ("file below a file", vec![Entry::file("a", "x"), Entry::file("a/b", "x")], entry),
        ("root that is no directory", vec![Entry::symlink(".", "/etc")], kind),
        ("GNU sparse file", vec![Entry::new("a", EntryType::GNUSparse)], kind),
        ("PAX sparse file", vec![Entry::file("a", "x").pax("GNU.sparse.realsize", "99999999999999")], kind),
        ("PAX size other than the header's", vec![Entry::file("a", "x").pax("size", "99999999999999")], kind),
        ("unknown kind", vec![Entry::new("a", EntryType::new(b'Z'))], kind),
        ("symbolic link without a target", vec![Entry::symlink("a", "")], kind),
        ("long name", vec![Entry::file(&long_name, "")], too_large),
        ("long path", vec![Entry::file(&long_path, "")], too_large),
        ("bytes in one file", vec![Entry::file("a", vec![1; (1 << 20) + 1])], too_large),
        ("bytes in two files", vec![Entry::file("a", &zeros), Entry::file("b", &zeros)], too_large),
        ("more files than are taken", many, too_large),
        ("huge header", vec![Entry::file("a", "").pax("comment", vec![b'x'; 2 << 20])], too_large),
        ("owner out of range", vec![Entry::file("a", "").pax("uid", "4294967296")], |error| {
            matches!(error, OciError::Malformed(_))
        }),
        ("header of no numbers", vec![Entry::file("a", "").pax("gid", "many")], |error| {
            matches!(error, OciError::Malformed(_))
        }),
        (
            "archive that is cut short",
            vec![Entry { size: Some(900 << 10), ..Entry::file("a", "x") }],
            |error| matches!(error, OciError::Archive(_) | OciError::Entry { .. }),
        ),
    ]
}

#[test]
fn each_hostile_archive_is_refused_by_name() {
    if !is_root("each_hostile_archive_is_refused_by_name") {
        return;
    }
    for (name, entries, expected) in table() {
        let ground = Ground::new();
        let outside = ground.path("store/scratch/outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "secret").unwrap();
        let error = ground.layers(&[plain_layer(&entries)], &small()).unwrap_err();
        assert!(expected(&error), "{name}: {error:?}");
        assert!(!error.remedy().is_empty());
        // The next one to make something removes a directory that nobody holds: this is `outside` itself.
        let left: Vec<_> = fs::read_dir(ground.path("store/scratch")).unwrap().flatten().collect();
        assert!(left.len() <= 1, "{name} left something behind");
        for directory in ["", "store", "store/scratch", "store/scratch/outside"] {
            assert!(!ground.path(directory).join("escaped").exists(), "{name} escaped");
        }
    }
}

#[test]
fn nothing_outside_is_written_or_removed_through_absolute_links() {
    if !is_root("nothing_outside_is_written_or_removed_through_absolute_links") {
        return;
    }
    let ground = Ground::new();
    let outside = ground.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    let to = outside.to_str().unwrap();
    // In the machine, an absolute link means the machine's own root; so it does here.
    let entries = [
        Entry::directory(to.trim_start_matches('/')),
        Entry::symlink("out", to),
        Entry::file("out/.wh.secret", ""),
        Entry::file("out/.wh..wh..opq", ""),
        Entry::file("out/file", "x"),
    ];
    let (_scratch, root) = ground.layers(&[plain_layer(&entries)], &small()).unwrap();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    assert_eq!(fs::read(outside.join("secret")).unwrap(), b"secret");
    assert!(root.path().join(to.trim_start_matches('/')).join("file").exists());
}

#[test]
fn bombs_end_early() {
    if !is_root("bombs_end_early") {
        return;
    }
    let limits = Limits { bytes: 1 << 30, files: 1000, ratio: 20, ratio_from_bytes: 1 << 20 };
    let ground = Ground::new();
    let bomb = gzip_layer(&[Entry::file("zeros", vec![0; 32 << 20])]);
    let error = ground.layers(&[bomb], &limits).unwrap_err();
    assert!(matches!(error, OciError::TooLarge { what: "growth of a layer in unpacking", .. }), "{error:?}");
    // After the archive's end, where no entry counts.
    let mut tail = common::tar(&[Entry::file("a", "x")]);
    tail.resize(64 << 20, 0);
    let bomb = common::Packed {
        media_type: "application/vnd.oci.image.layer.v1.tar+zstd",
        unpacked: image::digest::digest_of(&tail),
        blob: common::zstd(&tail),
    };
    let error = ground.layers(&[bomb], &limits).unwrap_err();
    assert!(matches!(error, OciError::TooLarge { .. }), "{error:?}");
    assert_eq!(ground.left_behind(), 0);
}

#[test]
fn broken_streams_are_errors() {
    if !is_root("broken_streams_are_errors") {
        return;
    }
    let ground = Ground::new();
    let whole = gzip_layer(&[Entry::file("a", vec![7; 100_000])]);
    for cut in [1, 5, 20, whole.blob.len() - 3] {
        let layer = common::Packed { blob: whole.blob[..cut].to_vec(), ..gzip_layer(&[]) };
        assert!(ground.layers(&[layer], &small()).is_err(), "{cut}");
    }
    for noise in [&b"\x1f\x8bnoise noise noise"[..], b"\x28\xb5\x2f\xfdnoise noise noise", &[0xff; 2000]] {
        let layer = common::Packed { blob: noise.to_vec(), ..gzip_layer(&[]) };
        let error = ground.layers(&[layer], &small()).unwrap_err();
        assert!(matches!(error, OciError::Archive(_)), "{error:?}");
    }
    assert_eq!(ground.left_behind(), 0);
}
