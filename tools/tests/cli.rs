//! The `mashines` program against a real control plane with fake hosts: what it prints, where, and how it ends.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use controlplane::core::{Config, Handle};
use controlplane::hosts::Server;
use controlplane::rest::{self, Access, Token};
use controlplane::store::{RedbStore, StoreOptions};
use controlplane::testing::{FakeHost, Fault, World};
use pki::{FleetCa, Kind, Trust};
use serde_json::Value;
use tempfile::TempDir;
use wire::ids::{HostName, MachineId};

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

fn host(text: &str) -> HostName {
    text.parse().unwrap()
}

/// A control plane with hosts `a` and `b`, on a Unix socket and on TCP.
struct Fleet {
    world: World,
    url: String,
    socket: String,
    directory: TempDir,
    _hosts: Vec<FakeHost>,
    _server: Server,
    // Last, so that everything above can still use it while it goes.
    _runtime: tokio::runtime::Runtime,
}

impl Fleet {
    fn new() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let ca = FleetCa::create().unwrap();
        let hosts = [host("a"), host("b")];
        let world = World::new(&hosts, 4 << 30);
        let socket = directory.path().join("api.sock");
        let (server, fakes, url) = runtime.block_on(async {
            let store =
                RedbStore::open(&directory.path().join("control.redb"), StoreOptions::default()).unwrap();
            let config = Config {
                default_kernel: Some("/boot/guest".to_owned()),
                heartbeat_ms: 100,
                forward_ms: 100,
                ..Config::default()
            };
            let (core, _) = Handle::start(Box::new(store), config).unwrap();
            let trust = Trust::new(ca.cert_pem(), &ca.issue("control", Kind::Control).unwrap()).unwrap();
            let images: Arc<Path> = directory.path().join("images").into();
            let server =
                Server::start("127.0.0.1:0".parse().unwrap(), &trust, core.clone(), &images).unwrap();
            let join = |name: &HostName| {
                FakeHost::start(&world, name, name.as_str(), &ca, server.address()).unwrap()
            };
            let fakes: Vec<_> = hosts.iter().map(join).collect();
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let token = Access::Token(Token::new(TOKEN).unwrap());
            tokio::spawn(
                warp::serve(rest::routes(core.clone(), token, images.clone())).incoming(listener).run(),
            );
            let unix = tokio::net::UnixListener::bind(&socket).unwrap();
            tokio::spawn(warp::serve(rest::routes(core, Access::SocketMode, images)).incoming(unix).run());
            (server, fakes, url)
        });
        let socket = format!("unix:{}", socket.display());
        let fleet = Self { world, url, socket, directory, _hosts: fakes, _server: server, _runtime: runtime };
        fleet.until("both hosts are online", || {
            fleet
                .ok(&["host", "ls", "--json"])
                .matches("\"state\":\"online\",\"release\":\"fake\",\"ram_bytes\":4")
                .count()
                == 2
        });
        fleet
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = program(self.directory.path());
        command.env("MASHINES_URL", &self.socket).args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs a command that must succeed, and gives what it printed.
    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        text(&output.stdout)
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let printed = self.ok(arguments);
        assert_eq!(printed.lines().count(), 1, "one line of JSON, not {printed}");
        serde_json::from_str(&printed).unwrap()
    }

    /// Runs a command that must fail with this code, and gives its message.
    fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        assert!(message.contains("error: "), "{message}");
        message
    }

    fn launch(&self, name: &str) -> MachineId {
        let machine = self.json(&["launch", "--name", name, "--memory", "64M", "--host", "a", "--json"]);
        assert_eq!(machine["state"], "started");
        machine["id"].as_str().unwrap().parse().unwrap()
    }

    fn until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !is_so() {
            assert!(Instant::now() < deadline, "never came to pass: {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The program, without anything of the environment that could point it elsewhere.
fn program(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mashines"));
    for name in ["MASHINES_URL", "MASHINES_TOKEN", "MASHINES_CONFIG", "XDG_CONFIG_HOME"] {
        command.env_remove(name);
    }
    command.env("HOME", home).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A running program; killed if the test fails before it ends.
struct Background(Child);

impl Background {
    fn start(command: &mut Command) -> Self {
        Self(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    fn interrupt(&self) {
        let sent = Command::new("kill").args(["-INT", &self.0.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Reads standard output until it ends with `end`.
    fn read_until(&mut self, end: &str) -> String {
        let out = self.0.stdout.as_mut().unwrap();
        let mut read = Vec::new();
        let mut byte = [0];
        while !read.ends_with(end.as_bytes()) {
            assert_eq!(out.read(&mut byte).unwrap(), 1, "ended after {:?}", text(&read));
            read.push(byte[0]);
        }
        text(&read)
    }

    fn end(mut self) -> (Option<i32>, String, String) {
        let (mut out, mut err) = (String::new(), String::new());
        self.0.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        self.0.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        (self.0.wait().unwrap().code(), out, err)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_machine_from_launch_to_removal() {
    let fleet = Fleet::new();
    fleet.launch("web");
    let list = fleet.ok(&["ls"]);
    let lines: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["NAME", "ID", "STATE", "HOST", "VCPU", "MEMORY", "IP4", "IP6", "UPTIME"]);
    assert_eq!(lines[1][0], "web");
    assert_eq!(lines[1][2..8], ["started", "a", "1", "64", "MiB", "198.19.0.2"]);
    assert!(fleet.ok(&["get", "web"]).contains("2001:db8:6d61::2"));

    let output = fleet.run(&["migrate", "web", "--to", "b", "--downtime-budget", "5ms"]);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{err}");
    assert_eq!(out, "moved web from a to b: pause 3.40 ms, 12ms in all, 0 B in 2 rounds\n");
    assert!(err.lines().all(|line| line.starts_with("web: a -> b: ")), "plain lines, no bar: {err:?}");
    assert!(err.ends_with("web: a -> b: succeeded\n"), "{err}");

    let moved = fleet.json(&["migrate", "web", "--to", "a", "--json"]);
    assert_eq!((&moved["phase"], &moved["target"]), (&"succeeded".into(), &"a".into()));
    let all = fleet.json(&["migrations", "--json"]);
    assert_eq!(all["migrations"].as_array().unwrap().len(), 2);
    let id = moved["id"].as_str().unwrap();
    assert!(fleet.ok(&["migrations", "get", id]).contains("final copy"));
    assert!(fleet.ok(&["migrations"]).contains(id));

    assert!(fleet.ok(&["stop", "web"]).contains("is stopped"));
    assert!(fleet.ok(&["start", "web"]).contains("is started"));
    fleet.fails(4, &["rm", "web"]);
    assert_eq!(fleet.json(&["rm", "web", "--force", "--json"])["state"], "destroyed");
    fleet.fails(3, &["get", "web"]);
    let events = fleet.ok(&["events", "--json"]);
    let kinds: Vec<String> = events
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["kind"].as_str().unwrap().to_owned())
        .collect();
    for kind in ["machine.created", "migration.succeeded", "machine.stopped", "machine.destroyed"] {
        assert!(kinds.iter().any(|seen| seen == kind), "no {kind} in {kinds:?}");
    }
}

#[test]
fn failures_have_their_codes_and_remedies() {
    let fleet = Fleet::new();
    fleet.launch("web");
    assert!(fleet.fails(2, &["launch", "--memory", "0"]).contains("give a multiple of 2M"));
    assert!(fleet.fails(2, &["launch", "--memory", "lots"]).contains("512M or 1G"));
    assert!(fleet.fails(2, &["launch", "--memory", "64M", "--kernel", "relative"]).contains("absolute"));
    assert!(fleet.fails(5, &["launch", "--memory", "1T"]).contains("MiB free of 4096 MiB"));
    assert!(fleet.fails(3, &["launch", "--memory", "64M", "--host", "zz"]).contains("a, b"));
    assert!(fleet.fails(4, &["launch", "--memory", "64M", "--name", "web"]).contains("choose another name"));
    assert!(fleet.fails(4, &["migrate", "web", "--to", "a"]).contains("already"));
    fleet.fails(3, &["migrate", "web", "--to", "zz"]);
    fleet.fails(3, &["migrate", "nope"]);
    fleet.fails(3, &["logs", "nope"]);
    fleet.fails(3, &["migrations", "get", "mig-0000000000000001"]);
    fleet.fails(2, &["migrations", "get", "mig-1"]);
    fleet.fails(4, &["start", "web"]);

    fleet.world.fault(Fault::HoldInPrecopy, true);
    let id =
        fleet.json(&["migrate", "web", "--to", "b", "--detach", "--json"])["id"].as_str().unwrap().to_owned();
    assert!(fleet.fails(4, &["migrate", "web", "--to", "b"]).contains(&id));
    assert!(fleet.fails(4, &["stop", "web"]).contains("migrations cancel"));
    assert_eq!(fleet.ok(&["migrations", "cancel", &id]), format!("{id} cancelled\n"));

    let nowhere =
        program(fleet.directory.path()).env("MASHINES_URL", "http://127.0.0.1:1").arg("ls").output().unwrap();
    assert_eq!(nowhere.status.code(), Some(7), "{nowhere:?}");
    let stranger =
        program(fleet.directory.path()).env("MASHINES_URL", &fleet.url).arg("ls").output().unwrap();
    assert_eq!(stranger.status.code(), Some(5), "{stranger:?}");
    assert!(text(&stranger.stderr).contains("login"));
}

#[test]
fn login_is_remembered_and_kept_private() {
    use std::os::unix::fs::MetadataExt as _;
    let fleet = Fleet::new();
    let home = fleet.directory.path();
    let token = home.join("token");
    std::fs::write(&token, format!("{TOKEN}\n")).unwrap();
    let login =
        |file: &Path| program(home).args(["login", &fleet.url, "--token-file"]).arg(file).output().unwrap();
    let wrong = home.join("wrong");
    std::fs::write(&wrong, "x".repeat(40)).unwrap();
    assert_eq!(login(&wrong).status.code(), Some(5));
    assert!(login(&token).status.success());
    let file = home.join(".config/mashines/config.json");
    assert_eq!(std::fs::metadata(file).unwrap().mode() & 0o777, 0o600);
    let list = program(home).args(["ls", "--json"]).output().unwrap();
    assert_eq!(text(&list.stdout), "{\"machines\":[]}\n");
}

#[test]
fn interrupting_migrate_leaves_the_migration_to_itself() {
    let fleet = Fleet::new();
    fleet.launch("web");
    fleet.world.fault(Fault::HoldInPrecopy, true);
    let migrate = Background::start(&mut fleet.command(&["migrate", "web", "--to", "b", "--json"]));
    fleet.until("it copies", || {
        fleet.json(&["migrations", "--json"])["migrations"][0]["progress"]["stage"] == "precopy"
    });
    migrate.interrupt();
    let (code, out, err) = migrate.end();
    assert_eq!((code, out.as_str()), (Some(130), ""));
    let id = fleet.json(&["migrations", "--json"])["migrations"][0]["id"].as_str().unwrap().to_owned();
    assert!(err.contains(&format!("mashines migrations cancel {id}")), "{err}");
    assert_eq!(fleet.json(&["migrations", "get", &id, "--json"])["phase"], "running");
    fleet.world.fault(Fault::HoldInPrecopy, false);
    assert_eq!(fleet.json(&["migrations", "get", &id, "--watch", "--json"])["phase"], "succeeded");
}

#[test]
fn logs_follow_a_machine_across_a_move() {
    let fleet = Fleet::new();
    let id = fleet.launch("web");
    let mut logs = Background::start(&mut fleet.command(&["logs", "web", "-f"]));
    assert_eq!(logs.read_until("boot under e1\n"), "boot under e1\n");
    fleet.world.write_console(id, "before\n");
    assert_eq!(logs.read_until("before\n"), "before\n");
    fleet.ok(&["migrate", "web", "--to", "b"]);
    fleet.world.write_console(id, "after\n");
    assert_eq!(logs.read_until("after\n"), "after\n");
    fleet.world.write_console(id, "last\n");
    fleet.ok(&["stop", "web"]);
    let (code, rest, err) = logs.end();
    assert_eq!((code, rest.as_str(), err.as_str()), (Some(0), "last\n", ""));
    assert_eq!(fleet.ok(&["logs", "web"]), "boot under e1\nbefore\nafter\nlast\n");
    assert_eq!(fleet.ok(&["logs", "web", "--offset", "14"]), "before\nafter\nlast\n");
}

#[test]
fn events_are_followed_as_they_happen() {
    let fleet = Fleet::new();
    let mut events = Background::start(&mut fleet.command(&["events", "-f", "--after", "0"]));
    fleet.launch("web");
    let seen = events.read_until("it runs on a");
    assert!(seen.contains("host.online") && seen.contains("machine.created"), "{seen}");
}

#[test]
fn what_follows_ends_with_its_reader() {
    let fleet = Fleet::new();
    fleet.launch("web");
    for arguments in [&["logs", "web", "-f"][..], &["events", "-f", "--after", "0"]] {
        let mut command = Background::start(&mut fleet.command(arguments));
        command.read_until("\n");
        // Nothing that it could write comes any more.
        drop(command.0.stdout.take());
        fleet.until("the command ends", || command.0.try_wait().unwrap().is_some());
        assert_eq!(command.0.wait().unwrap().code(), Some(0), "{arguments:?}");
    }
}

#[test]
fn a_fleet_is_made_once_and_grows_by_hosts() {
    use std::os::unix::fs::MetadataExt as _;
    let home = tempfile::tempdir().unwrap();
    let dir: PathBuf = home.path().join("fleet");
    let run = |arguments: &[&str]| {
        program(home.path()).args(arguments).args(["--dir", dir.to_str().unwrap()]).output().unwrap()
    };
    assert_eq!(run(&["fleet", "host-cert", "host-a"]).status.code(), Some(1));
    assert!(run(&["fleet", "init", "--host", "host-a"]).status.success());
    assert_eq!(run(&["fleet", "init"]).status.code(), Some(2));
    assert!(run(&["fleet", "host-cert", "host-b"]).status.success());
    for secret in ["ca-key.pem", "token", "control/key.pem", "hosts/host-a/key.pem", "hosts/host-b/key.pem"] {
        assert_eq!(std::fs::metadata(dir.join(secret)).unwrap().mode() & 0o777, 0o600, "{secret}");
    }
    for (place, name) in [("control", "control.control.mashines"), ("hosts/host-b", "host-b.host.mashines")] {
        let trust = Trust::load(&dir.join(place)).unwrap();
        assert_eq!(trust.own_identity().unwrap().dns_name(), name);
    }
    Token::read(&dir.join("token")).unwrap();
}
