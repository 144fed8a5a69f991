//! Images of registries: a real one (Debian's docker-registry), and one that lies.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::str::FromStr as _;

use common::{Entry, Ground, Image, gzip_layer, image, is_root, zstd_layer};
use image::digest::digest_of;
use image::oci::OciError;
use image::oci::limits::Limits;
use oci_client::Reference;
use oci_client::client::{Client, ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// docker-registry on a port of its own; it ends with this.
struct Registry {
    child: Child,
    address: String,
}

impl Registry {
    /// `None`, and a line that says so, where it is not installed.
    fn start(directory: &std::path::Path) -> Option<Self> {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let config = directory.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{ level: info }}\nstorage: {{ filesystem: {{ rootdirectory: {} }} }}\nhttp: {{ addr: {free} }}\n",
            directory.join("registry").display()
        );
        fs::write(&config, text).unwrap();
        let started = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        let Ok(mut child) = started else {
            println!("SKIPPED: docker-registry is not installed (Debian package docker-registry)");
            return None;
        };
        let mut messages = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("listening on") {
            line.clear();
            assert!(messages.read_line(&mut line).unwrap() > 0, "docker-registry ended");
        }
        // What it goes on to say must not fill the pipe.
        std::thread::spawn(move || std::io::copy(&mut messages, &mut std::io::sink()));
        Some(Self { child, address: free.to_string() })
    }

    fn push(&self, name: &str, image: &Image) {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let config = ClientConfig { protocol: ClientProtocol::Http, ..ClientConfig::default() };
        let client = Client::new(config);
        let reference = Reference::from_str(&format!("{}/{name}", self.address)).unwrap();
        runtime.block_on(async {
            client.store_auth_if_needed(&self.address, &RegistryAuth::Anonymous).await;
            for blob in &image.blobs[..image.blobs.len() - 1] {
                let digest = digest_of(blob).to_string();
                client.push_blob(&reference, blob.clone(), &digest).await.unwrap();
            }
            let kind = MANIFEST.parse().unwrap();
            client.push_manifest_raw(&reference, image.manifest.clone(), kind).await.unwrap();
        });
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_image_comes_back_as_it_was_pushed() {
    if !is_root("an_image_comes_back_as_it_was_pushed") {
        return;
    }
    let ground = Ground::new();
    let Some(registry) = Registry::start(ground.directory.path()) else { return };
    let made = image(&[gzip_layer(&[Entry::file("a", "1")]), zstd_layer(&[Entry::file("b", "2")])]);
    registry.push("team/app:v1", &made);
    let by_digest = format!("team/app@{}", digest_of(&made.manifest));
    for name in ["team/app:v1", &by_digest] {
        let (_scratch, root) =
            ground.tree(&format!("{}/{name}", registry.address), &Limits::default()).unwrap();
        assert_eq!(fs::read(root.path().join("a")).unwrap(), b"1");
        assert_eq!(fs::read(root.path().join("b")).unwrap(), b"2");
    }
    for missing in ["team/app:v2", "nothing/here:v1"] {
        let error = ground.tree(&format!("{}/{missing}", registry.address), &Limits::default()).unwrap_err();
        assert!(matches!(error, OciError::Registry { .. }), "{error:?}");
    }
    assert_eq!(ground.left_behind(), 0);
}

/// A registry that serves given bytes for given paths, whatever they should be.
fn lying(answers: BTreeMap<String, Vec<u8>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    // It ends with the test's process.
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answers = answers.clone();
            std::thread::spawn(move || answer(stream, &answers));
        }
    });
    address
}

fn answer(mut stream: TcpStream, answers: &BTreeMap<String, Vec<u8>>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut first = String::new();
    reader.by_ref().take(8192).read_line(&mut first).ok()?;
    loop {
        let mut line = String::new();
        if reader.by_ref().take(8192).read_line(&mut line).ok()? == 0 || line == "\r\n" {
            break;
        }
    }
    let path = first.split(' ').nth(1)?;
    let (status, body) = match answers.get(path) {
        Some(body) => ("200 OK", &**body),
        None if path == "/v2/" => ("200 OK", &b"{}"[..]),
        None => ("404 Not Found", &b"{\"errors\":[]}"[..]),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {MANIFEST}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(body).ok()
}

/// What an honest registry would answer.
fn honest(image: &Image) -> BTreeMap<String, Vec<u8>> {
    let blobs = image.blobs.iter().map(|blob| (format!("/v2/app/blobs/{}", digest_of(blob)), blob.clone()));
    let manifests = ["v1".to_owned(), digest_of(&image.manifest).to_string()];
    let manifests = manifests.map(|name| (format!("/v2/app/manifests/{name}"), image.manifest.clone()));
    blobs.chain(manifests).collect()
}

#[test]
fn a_registry_that_lies_is_found_out() {
    if !is_root("a_registry_that_lies_is_found_out") {
        return;
    }
    let ground = Ground::new();
    let made = image(&[gzip_layer(&[Entry::file("a", "1")])]);
    let other = image(&[gzip_layer(&[Entry::file("a", "2")])]);
    let pull = |answers, name: &str| {
        ground.tree(&format!("{}/{name}", lying(answers)), &Limits::default()).map(drop)
    };
    pull(honest(&made), "app:v1").unwrap();

    for (number, blob) in made.blobs[..2].iter().enumerate() {
        let path = format!("/v2/app/blobs/{}", digest_of(blob));
        let mut flipped = blob.clone();
        *flipped.last_mut().unwrap() ^= 1;
        let longer = [blob, &b"more"[..]].concat();
        let shorter = blob[..blob.len() - 1].to_vec();
        for (what, wrong) in
            [("flipped", flipped), ("longer", longer), ("shorter", shorter), ("empty", Vec::new())]
        {
            let mut answers = honest(&made);
            answers.insert(path.clone(), wrong);
            let error = pull(answers, "app:v1").unwrap_err();
            // The client library checks as well, and may be first.
            let found = matches!(
                &error,
                OciError::Digest { .. } | OciError::Length { .. } | OciError::Registry { .. }
            );
            assert!(found, "{number}, {what}: {error:?}");
        }
    }
    // Another, whole image under the digest that was asked for.
    let digest = digest_of(&made.manifest);
    let mut answers = honest(&made);
    answers.extend(honest(&other));
    answers.insert(format!("/v2/app/manifests/{digest}"), other.manifest.clone());
    let error = pull(answers, &format!("app@{digest}")).unwrap_err();
    assert!(matches!(error, OciError::Digest { .. } | OciError::Registry { .. }), "{error:?}");

    for (what, text) in [
        ("no JSON", "<html>".to_owned()),
        ("schema 1", r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned()),
        (
            "a huge layer",
            String::from_utf8(made.manifest.clone()).unwrap().replace("\"size\":", "\"size\":99999999999999"),
        ),
        (
            "a digest that is none",
            String::from_utf8(made.manifest.clone()).unwrap().replace("sha256:", "sha256:../"),
        ),
    ] {
        let mut answers = honest(&made);
        answers.insert("/v2/app/manifests/v1".to_owned(), text.into_bytes());
        assert!(pull(answers, "app:v1").is_err(), "{what}");
    }
    assert_eq!(ground.left_behind(), 0);
}
