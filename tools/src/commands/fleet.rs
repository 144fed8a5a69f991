//! `fleet init`, `fleet host-cert`, `login`.
//!
//! ```text
//! DIR/ca.pem        the authority's certificate
//! DIR/ca-key.pem    its key: whoever holds it can make members of the fleet; no running process needs it
//! DIR/token         what clients of the REST API show
//! DIR/control/      identity of the control plane: ca.pem cert.pem key.pem
//! DIR/hosts/NAME/   identity of a host, likewise: to be copied to that host
//! ```

use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use pki::{CA_CERT_FILE, FleetCa, Kind};
use wire::ids::HostName;

use crate::args::{Fleet, Login};
use crate::client::{Client, random_hex};
use crate::config::Config;
use crate::exit::Failure;
use crate::output;

/// Name of the token file in the fleet directory.
const TOKEN_FILE: &str = "token";

pub(super) fn run(command: &Fleet, json: bool) -> Result<(), Failure> {
    match command {
        Fleet::Init { dir, hosts } => init(dir, hosts, json),
        Fleet::HostCert { name, dir } => {
            let ca = FleetCa::load(dir).map_err(|error| {
                let remedy = "give the directory that `mashines fleet init` made with --dir";
                failed(format!("reading the fleet's authority in {}", dir.display()), error, remedy)
            })?;
            let made = host(&ca, dir, name)?;
            if json {
                return output::json(&serde_json::json!({"host": name.as_str(), "directory": made}));
            }
            output::line(&made.display().to_string())
        }
    }
}

fn init(dir: &Path, hosts: &[HostName], json: bool) -> Result<(), Failure> {
    if dir.join(CA_CERT_FILE).exists() {
        return Err(Failure::usage(
            format!("there is a fleet in {} already", dir.display()),
            "use another --dir; add hosts to this fleet with `mashines fleet host-cert NAME`",
        ));
    }
    let ca = FleetCa::create()
        .map_err(|error| failed("making the fleet's authority".to_owned(), error, "look at /dev/urandom"))?;
    directory(dir)?;
    identity(&ca, &dir.join("control"), "control", Kind::Control)?;
    for name in hosts {
        host(&ca, dir, name)?;
    }
    private_file(&dir.join(TOKEN_FILE), &random_hex::<32>()?)?;
    // Last, so that a fleet whose making was cut short does not look like one.
    ca.save(dir).map_err(|error| failed(format!("writing {}", dir.display()), error, WRITE_REMEDY))?;
    if json {
        let names: Vec<_> = hosts.iter().map(HostName::as_str).collect();
        return output::json(&serde_json::json!({"directory": dir, "hosts": names}));
    }
    eprintln!("made a fleet in {}; keep ca-key.pem and token to yourself", dir.display());
    eprintln!("  control plane: mashines-control --fleet {} --state DIR", dir.display());
    eprintln!("  each host:     mashined --fleet (a copy of {}/hosts/NAME) ...", dir.display());
    eprintln!("  this client:   mashines login http://127.0.0.1:7070 --token-file {}/token", dir.display());
    output::line(&dir.display().to_string())
}

const WRITE_REMEDY: &str = "choose a directory that can be written, with room";

fn host(ca: &FleetCa, dir: &Path, name: &HostName) -> Result<PathBuf, Failure> {
    let hosts = dir.join("hosts");
    directory(&hosts)?;
    let own = hosts.join(name.as_str());
    identity(ca, &own, name.as_str(), Kind::Host)?;
    Ok(own)
}

fn identity(ca: &FleetCa, dir: &Path, name: &str, kind: Kind) -> Result<(), Failure> {
    directory(dir)?;
    let failed =
        |error| failed(format!("making the identity of {name} in {}", dir.display()), error, WRITE_REMEDY);
    ca.issue(name, kind).map_err(failed)?.save(dir).map_err(failed)?;
    let copy = dir.join(CA_CERT_FILE);
    std::fs::write(&copy, ca.cert_pem())
        .map_err(|error| Failure::local(format!("writing {}", copy.display()), error, WRITE_REMEDY))
}

fn directory(dir: &Path) -> Result<(), Failure> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|error| Failure::local(format!("making {}", dir.display()), error, WRITE_REMEDY))
}

fn private_file(path: &Path, text: &str) -> Result<(), Failure> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
        .map_err(|error| Failure::local(format!("writing {}", path.display()), error, WRITE_REMEDY))
}

fn failed(what: String, error: pki::PkiError, remedy: &str) -> Failure {
    let mut what = what;
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        what = format!("{what} ({inner})");
        cause = inner.source();
    }
    Failure::local(what, error, remedy)
}

/// Checks that the control plane takes the token, then remembers both.
pub(super) async fn login(login: &Login, json: bool) -> Result<(), Failure> {
    let token = match &login.token_file {
        None => std::env::var("MASHINES_TOKEN").ok(),
        Some(path) if path.as_os_str() == "-" => {
            let mut text = String::new();
            std::io::stdin().take(4096).read_to_string(&mut text).map_err(|error| {
                Failure::local("reading the token from standard input", error, "pipe the token file in")
            })?;
            Some(text.trim().to_owned())
        }
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|error| {
                let remedy = "give the `token` file of the fleet directory";
                Failure::local(format!("reading {}", path.display()), error, remedy)
            })?;
            Some(text.trim().to_owned())
        }
    };
    let config = Config { url: login.url.clone(), token };
    let client = Client::new(&config)?;
    client.get::<controlplane::api::HostList>("/v1/hosts").await?;
    let path = config.save()?;
    if json {
        return output::json(&serde_json::json!({"url": config.url, "config": path}));
    }
    eprintln!("logged in to {}; remembered in {}", config.url, path.display());
    Ok(())
}
