//! The store: what is published is whole, what is removed is gone, and many can do both at once.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Barrier;

use image::digest::digest_of;
use image::manifest::{Blob, Config, KernelBlob, Manifest, SCHEMA, Source};
use image::store::{Store, StoreError};

fn publish(store: &Store, name: &str, disk: &[u8], kernel: &[u8]) -> Result<Manifest, StoreError> {
    let scratch = store.scratch()?;
    let admit = |file: &str, bytes: &[u8]| {
        let path = scratch.path().join(file);
        fs::write(&path, bytes).unwrap();
        store.admit(&path)
    };
    let (disk, kernel, initrd) =
        (admit("disk", disk)?, admit("kernel", kernel)?, admit("initrd", name.as_bytes())?);
    let manifest = Manifest {
        schema: SCHEMA,
        name: name.parse().unwrap(),
        created_unix_ms: 1,
        disk: disk.blob,
        kernel: KernelBlob {
            digest: kernel.blob.digest,
            bytes: kernel.blob.bytes,
            release: "6.1".to_owned(),
        },
        initrd: initrd.blob,
        cmdline: String::new(),
        source: Source { kind: "recipe".to_owned(), reference: "x".to_owned(), digest: None },
        config: Config::default(),
        flavour: None,
    };
    store.publish(&manifest, vec![disk, kernel, initrd])?;
    Ok(manifest)
}

fn count(path: &Path) -> usize {
    fs::read_dir(path).unwrap().count()
}

#[test]
fn blobs_are_shared_and_collected() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let first = publish(&store, "first", b"disk 1", b"kernel").unwrap();
    publish(&store, "second:v1", b"disk 2", b"kernel").unwrap();
    let blobs = directory.path().join("blobs/sha256");
    assert_eq!(count(&blobs), 5);
    assert_eq!(store.list().unwrap().len(), 2);
    assert_eq!(store.image(&"first".parse().unwrap()).unwrap(), first);
    let freed = store.remove(&"first".parse().unwrap()).unwrap();
    assert_eq!((freed.blobs, freed.bytes), (2, 11));
    assert_eq!(fs::read(store.blob(digest_of(b"kernel"))).unwrap(), b"kernel");
    assert!(matches!(store.remove(&"first".parse().unwrap()), Err(StoreError::NoSuchImage(_))));
    store.remove(&"second:v1".parse().unwrap()).unwrap();
    assert_eq!(
        (count(&blobs), count(&directory.path().join("images")), count(&directory.path().join("scratch"))),
        (0, 0, 0)
    );
}

#[test]
fn many_builders_and_removers_leave_whole_images() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let barrier = Barrier::new(8);
    std::thread::scope(|scope| {
        for builder in 0..8 {
            let (store, barrier) = (&store, &barrier);
            scope.spawn(move || {
                barrier.wait();
                for round in 0..20 {
                    // Few names and few contents, so that all get into each other's way.
                    let name = format!("image-{}", (builder + round) % 3);
                    let disk = format!("disk {}", round % 2);
                    // It is published whole, or the name was removed in between: nothing else.
                    publish(store, &name, disk.as_bytes(), b"kernel").unwrap();
                    match store.remove(&name.parse().unwrap()) {
                        Ok(_) | Err(StoreError::NoSuchImage(_)) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                    store.list().unwrap();
                }
            });
        }
    });
    for manifest in store.list().unwrap() {
        store.whole(&manifest).unwrap();
        store.remove(&manifest.name).unwrap();
    }
    assert_eq!(count(&directory.path().join("blobs/sha256")), 0);
}

#[test]
fn manifests_of_others_are_refused_and_stop_collection() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let manifest = publish(&store, "good", b"disk", b"kernel").unwrap();
    let images = directory.path().join("images");
    let newer =
        serde_json::to_string(&Manifest { schema: 2, name: "newer".parse().unwrap(), ..manifest.clone() })
            .unwrap();
    for (name, text) in
        [("newer", &*newer), ("noise", "{"), ("other", &serde_json::to_string(&manifest).unwrap())]
    {
        let file = images.join(format!("{name}.json"));
        fs::write(&file, text).unwrap();
        let error = store.image(&name.parse().unwrap()).unwrap_err();
        assert!(
            matches!(error, StoreError::Unsuitable { .. } | StoreError::Manifest { .. }),
            "{name}: {error:?}"
        );
        // Nobody knows what it names, so nothing may go.
        publish(&store, "removed", b"another disk", b"kernel").unwrap();
        store.remove(&"removed".parse().unwrap()).unwrap_err();
        assert!(store.blob(digest_of(b"another disk")).exists(), "{name}");
        fs::remove_file(file).unwrap();
    }
    fs::write(images.join("long.json"), vec![b' '; 2 << 20]).unwrap();
    assert!(matches!(store.image(&"long".parse().unwrap()), Err(StoreError::Unsuitable { .. })));
}

#[test]
fn an_image_without_its_blobs_is_not_published() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let mut manifest = publish(&store, "good", b"disk", b"kernel").unwrap();
    manifest.name = "lacking".parse().unwrap();
    manifest.disk = Blob { digest: digest_of(b"never was"), bytes: 9 };
    let error = store.publish(&manifest, Vec::new()).unwrap_err();
    assert!(matches!(error, StoreError::Incomplete { what: "root disk", .. }));
    assert!(matches!(store.image(&manifest.name), Err(StoreError::NoSuchImage(_))));
}

#[test]
fn scratch_of_the_dead_goes_and_of_the_living_stays() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let living = store.scratch().unwrap();
    let dead = directory.path().join("scratch/make-dead");
    fs::create_dir_all(dead.join("root/etc")).unwrap();
    let _next = store.scratch().unwrap();
    assert!(living.path().exists() && !dead.exists());
}

#[test]
fn a_store_that_is_not_there_has_no_images() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::reading(&directory.path().join("none"));
    assert_eq!(store.list().unwrap(), []);
    assert!(matches!(store.remove(&"x".parse().unwrap()), Err(StoreError::NoSuchImage(_))));
    assert!(!directory.path().join("none").exists());
}

/// A tree becomes the same disk twice, with its owners, modes and attributes.
#[test]
fn disks_are_made_of_trees() {
    if Command::new("mke2fs").arg("-V").output().is_err() && !Path::new("/usr/sbin/mke2fs").exists() {
        println!("SKIPPED: mke2fs is not installed (Debian package e2fsprogs)");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::write(tree.join("a/b/file"), vec![7; 10_000]).unwrap();
    std::os::unix::fs::symlink("b/file", tree.join("a/link")).unwrap();
    let (first, second) = (directory.path().join("1"), directory.path().join("2"));
    image::disk::make(&tree, &first, None, "name").unwrap();
    image::disk::make(&tree, &second, None, "name").unwrap();
    let bytes = fs::read(&first).unwrap();
    assert!(bytes == fs::read(&second).unwrap(), "the same tree gave two disks");
    assert_eq!(bytes.len(), 64 << 20);
    let metadata = fs::metadata(&first).unwrap();
    assert!(std::os::unix::fs::MetadataExt::blocks(&metadata) * 512 < 8 << 20, "the disk is not sparse");
    let checked = Command::new("/usr/sbin/e2fsck").args(["-fn"]).arg(&first).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    let read = Command::new("/usr/sbin/debugfs").args(["-R", "cat /a/link"]).arg(&first).output().unwrap();
    assert!(read.status.success());
    let error = image::disk::make(&tree, &first, Some((64 << 20) + 1), "name").unwrap_err();
    assert!(matches!(error, image::disk::DiskError::Size { .. }));
}
