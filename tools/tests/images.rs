//! `mashines image`: what it prints, and how it ends. It needs no control plane.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn mashines(store: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mashines"));
    command.arg("image").args(args).env("MASHINES_IMAGES", store).env_remove("MASHINES_AGENT");
    command.output().unwrap()
}

fn refused(store: &Path, args: &[&str], code: i32, word: &str) {
    let output = mashines(store, args);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    assert!(said.contains(word), "{args:?}: {said}");
    assert!(code == 2 || said.contains("try: "), "{args:?} gives no remedy: {said}");
}

#[test]
fn an_empty_store_is_listed_and_refusals_have_remedies() {
    let directory = tempfile::tempdir().unwrap();
    let store = directory.path().join("store");
    let listed = mashines(&store, &["ls", "--json"]);
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(listed, serde_json::json!({ "images": [] }));
    refused(&store, &["rm", "none"], 3, "no image `none`");
    refused(&store, &["rm", "../x"], 2, "not an image's name");
    refused(&store, &["build", "windows"], 5, "no recipe");
    refused(&store, &["build", "busybox", "--package", "x"], 5, "takes no --package");
    refused(&store, &["build", "debian-12", "--flavour", "snap"], 2, "no flavour");
    refused(&store, &["import", "/no/such/file"], 5, "no such file");
    refused(&store, &["build", "busybox", "--agent", "/no/such/agent"], 5, "no agent at");
    let noise = directory.path().join("noise");
    fs::write(&noise, "noise").unwrap();
    let noise = noise.to_str().unwrap();
    refused(&store, &["build", "busybox", "--agent", noise], 5, "no program");
    assert_eq!(fs::read_dir(store.join("scratch")).unwrap().count(), 0);
}
