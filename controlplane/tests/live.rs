//! The whole control plane: REST over TCP, hosts over QUIC, a store on disk.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use controlplane::core::{Config, Handle, Stopped};
use controlplane::hosts::Server;
use controlplane::rest::{self, Access, Token};
use controlplane::store::{RedbStore, StoreOptions};
use controlplane::testing::{FakeHost, Fault, World};
use pki::{FleetCa, Kind, Trust};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use wire::fleet::RefusalCode;
use wire::ids::{HostName, MachineId};

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

struct Running {
    url: String,
    hosts: SocketAddr,
    core: Handle,
    stopped: Stopped,
    server: Server,
    rest: tokio::task::JoinHandle<()>,
}

struct Fleet {
    ca: FleetCa,
    world: World,
    hosts: Vec<FakeHost>,
    directory: TempDir,
    running: Option<Running>,
    http: reqwest::Client,
}

fn name(text: &str) -> HostName {
    text.parse().unwrap()
}

fn config() -> Config {
    Config {
        default_kernel: Some("/boot/guest".to_owned()),
        heartbeat_ms: 100,
        forward_ms: 200,
        doubt_ms: 300,
        retry_ms: 50,
        ..Config::default()
    }
}

async fn start(ca: &FleetCa, directory: &Path, hosts: SocketAddr) -> Running {
    let store = RedbStore::open(&directory.join("control.redb"), StoreOptions::default()).unwrap();
    let (core, stopped) = Handle::start(Box::new(store), config()).unwrap();
    let trust = Trust::new(ca.cert_pem(), &ca.issue("control", Kind::Control).unwrap()).unwrap();
    let server = Server::start(hosts, &trust, core.clone(), Path::new("/nonexistent")).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let routes = rest::routes(
        core.clone(),
        Access::Token(Token::new(TOKEN).unwrap()),
        Path::new("/nonexistent").into(),
    );
    let rest = tokio::spawn(warp::serve(routes).incoming(listener).run());
    Running { url, hosts: server.address(), core, stopped, server, rest }
}

impl Fleet {
    async fn new(hosts: &[&str]) -> Self {
        let names: Vec<_> = hosts.iter().map(|text| name(text)).collect();
        let ca = FleetCa::create().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let running = start(&ca, directory.path(), "127.0.0.1:0".parse().unwrap()).await;
        let world = World::new(&names, 4 << 30);
        let join =
            |host: &HostName| FakeHost::start(&world, host, host.as_str(), &ca, running.hosts).unwrap();
        let hosts = names.iter().map(join).collect();
        // An idle connection would keep the control plane of before a restart alive.
        let _chosen = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build().unwrap();
        let fleet = Self { ca, world, hosts, directory, running: Some(running), http };
        fleet.hosts_are("online", names.len()).await;
        fleet
    }

    fn running(&self) -> &Running {
        self.running.as_ref().unwrap()
    }

    /// Stops the control plane in the middle of whatever it does, and starts it on the same state and address.
    async fn restart(&mut self) {
        let Running { hosts, core, stopped, server, rest, .. } = self.running.take().unwrap();
        rest.abort();
        let _ = rest.await;
        drop(server);
        drop(core);
        let _ = stopped.await;
        // The port is free once the closed endpoint has drained.
        let until = Instant::now() + Duration::from_secs(10);
        while std::net::UdpSocket::bind(hosts).is_err() {
            assert!(Instant::now() < until, "the hosts' port stays taken");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.running = Some(start(&self.ca, self.directory.path(), hosts).await);
    }

    async fn send(&self, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        let mut request =
            self.http.request(method, format!("{}{path}", self.running().url)).bearer_auth(TOKEN);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.unwrap();
        (response.status(), response.json().await.unwrap())
    }

    async fn get(&self, path: &str) -> Value {
        let (status, body) = self.send(Method::GET, path, None).await;
        assert!(status.is_success(), "{path}: {status} {body}");
        body
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        let (status, body) = self.send(Method::POST, path, Some(body)).await;
        assert!(status.is_success(), "{path}: {status} {body}");
        body
    }

    async fn refused(&self, method: Method, path: &str, body: Option<Value>) -> (u16, String, Value) {
        let (status, body) = self.send(method, path, body).await;
        assert!(!status.is_success(), "{path}: {body}");
        for field in ["title", "detail", "remedy"] {
            assert!(body[field].as_str().is_some_and(|text| !text.is_empty()), "{field} of {body}");
        }
        assert_eq!(body["status"], status.as_u16());
        (status.as_u16(), body["code"].as_str().unwrap().to_owned(), body)
    }

    async fn hosts_are(&self, state: &str, count: usize) {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let list = self.get("/v1/hosts").await;
            let hosts = list["hosts"].as_array().unwrap();
            let ready =
                |host: &&Value| host["state"] == state && (state != "online" || !host["ram_bytes"].is_null());
            if hosts.iter().filter(ready).count() == count {
                return;
            }
            assert!(Instant::now() < until, "hosts are {list}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn launch(&self, machine: &str, host: &str) -> MachineId {
        let body = json!({"name": machine, "vcpus": 1, "ram_bytes": 64 << 20, "host": host});
        let launched = self.post("/v1/machines", body).await;
        self.get(&format!("/v1/machines/{machine}/wait?state=started&timeout=10")).await;
        launched["id"].as_str().unwrap().parse().unwrap()
    }

    async fn migrate(&self, machine: &str, target: &str) -> String {
        let migration =
            self.post(&format!("/v1/machines/{machine}/migrate"), json!({"target": target})).await;
        migration["id"].as_str().unwrap().to_owned()
    }

    async fn ended(&self, migration: &str) -> Value {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let now = self.get(&format!("/v1/migrations/{migration}")).await;
            if ["succeeded", "failed", "cancelled"].contains(&now["phase"].as_str().unwrap()) {
                return now;
            }
            assert!(Instant::now() < until, "the migration is still {now}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_is_launched_moved_stopped_started_and_removed() {
    let fleet = Fleet::new(&["a", "b"]).await;
    let id = fleet.launch("web", "a").await;
    let before = fleet.get("/v1/machines/web").await;
    assert_eq!((&before["host"], &before["state"]), (&json!("a"), &json!("started")));
    assert_eq!((&before["ip4"], &before["ip6"]), (&json!("198.19.0.2"), &json!("2001:db8:6d61::2")));

    let migration = fleet.migrate("web", "b").await;
    let ended = fleet.ended(&migration).await;
    assert_eq!((&ended["phase"], &ended["timings"]["pause_us"]), (&json!("succeeded"), &json!(3400)));
    let after = fleet.get(&format!("/v1/machines/{id}")).await;
    assert_eq!((&after["host"], &after["epoch"]), (&json!("b"), &json!(2)));
    assert_eq!(after["started_unix_ms"], before["started_unix_ms"]);
    assert_eq!(fleet.world.running(id), [(name("b"), wire::ids::Epoch(2))]);

    fleet.post("/v1/machines/web/stop", json!({})).await;
    fleet.get("/v1/machines/web/wait?state=stopped&timeout=10").await;
    assert_eq!(fleet.world.running(id), []);
    let again = fleet.post("/v1/machines/web/start", json!({})).await;
    assert_eq!(again["ip6"], before["ip6"]);
    fleet.get("/v1/machines/web/wait?timeout=10").await;
    let (status, code, _) = fleet.refused(Method::DELETE, "/v1/machines/web", None).await;
    assert_eq!((status, code.as_str()), (409, "wrong_state"));
    let (status, _) = fleet.send(Method::DELETE, "/v1/machines/web?force=true", None).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    let gone = fleet.get(&format!("/v1/machines/{id}/wait?state=destroyed&timeout=10")).await;
    assert_eq!(gone["state"], "destroyed");
    // Gone for its owner; a host that it left earlier may have a moment to go.
    let until = Instant::now() + Duration::from_secs(10);
    while !fleet.world.traces(id).is_empty() {
        assert!(Instant::now() < until, "left on {:?}", fleet.world.traces(id));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(fleet.world.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_done_is_refused_with_its_reason() {
    let fleet = Fleet::new(&["a", "b"]).await;
    fleet.launch("web", "a").await;
    let body = |name: &str| Some(json!({"name": name, "vcpus": 1, "ram_bytes": 64 << 20}));
    let post = |path: &'static str, body| fleet.refused(Method::POST, path, body);

    assert_eq!(post("/v1/machines", body("web")).await.1, "name_taken");
    assert_eq!(post("/v1/machines", body("Not A Name")).await.0, 400);
    assert_eq!(post("/v1/machines", body("m-0123456789abcdef")).await.1, "bad_value");
    assert_eq!(post("/v1/machines", Some(json!({"vcpus": 1, "ram_bytes": 0}))).await.1, "bad_value");
    assert_eq!(post("/v1/machines", Some(json!({"vcpus": 0, "ram_bytes": 1 << 30}))).await.1, "bad_value");
    let (_, code, problem) = post("/v1/machines", Some(json!({"vcpus": 1, "ram_bytes": 1_u64 << 33}))).await;
    assert_eq!(code, "no_place");
    assert!(problem["detail"].as_str().unwrap().contains("a: 8192 MiB RAM asked for"), "{problem}");
    let (status, code, problem) =
        post("/v1/machines", Some(json!({"vcpus": 1, "ram_bytes": 1 << 30, "host": "z"}))).await;
    assert_eq!((status, code.as_str()), (404, "no_such_host"));
    assert!(problem["remedy"].as_str().unwrap().contains("a, b"), "{problem}");
    assert_eq!(
        post("/v1/machines", Some(json!({"vcpus": 1, "ram_bytes": 1 << 30, "kernel": "x"}))).await.0,
        422
    );
    assert_eq!(post("/v1/machines", Some(json!({"colour": 1}))).await.0, 400);
    let long = json!({"vcpus": 1, "ram_bytes": 1 << 30, "cmdline": "x".repeat(400_000)});
    assert_eq!(post("/v1/machines", Some(long)).await.1, "body_too_long");

    assert_eq!(post("/v1/machines/web/migrate", Some(json!({"target": "a"}))).await.1, "same_host");
    assert_eq!(post("/v1/machines/web/migrate", Some(json!({"target": "z"}))).await.1, "no_such_host");
    assert_eq!(post("/v1/machines/nope/migrate", Some(json!({}))).await.1, "no_such_machine");
    assert_eq!(post("/v1/machines/web/migrate", Some(json!({"downtime_budget_us": 1}))).await.1, "bad_value");
    assert_eq!(post("/v1/machines/web/dance", Some(json!({}))).await.1, "no_such_path");
    assert_eq!(post("/v1/machines/web/start", Some(json!({}))).await.1, "wrong_state");
    assert_eq!(fleet.refused(Method::PUT, "/v1/machines", None).await.0, 405);
    assert_eq!(fleet.refused(Method::GET, "/v1/machines?x=1", None).await.0, 400);
    assert_eq!(fleet.refused(Method::GET, "/v1/machines?state=odd", None).await.0, 400);
    assert_eq!(fleet.refused(Method::GET, "/v1/migrations/mig-1", None).await.0, 400);
    assert_eq!(fleet.refused(Method::GET, "/v1/migrations/mig-0000000000000001", None).await.0, 404);
    let wait = "/v1/machines/web/wait?state=stopped&timeout=0";
    assert_eq!(fleet.refused(Method::GET, wait, None).await.0, 408);

    fleet.world.fault(Fault::HoldInPrecopy, true);
    let running = fleet.migrate("web", "b").await;
    let (status, code, problem) = post("/v1/machines/web/migrate", Some(json!({}))).await;
    assert_eq!((status, code.as_str()), (409, "migration_running"));
    assert_eq!(problem["conflicting_id"], running.as_str());
    assert_eq!(post("/v1/machines/web/stop", Some(json!({}))).await.1, "migration_running");

    let no_token = fleet.http.get(format!("{}/v1/machines", fleet.running().url)).send().await.unwrap();
    assert_eq!(no_token.status(), 401);
    assert_eq!(no_token.headers()["content-type"], "application/problem+json");
    let open = fleet.http.get(format!("{}/healthz", fleet.running().url)).send().await.unwrap();
    assert_eq!(open.status(), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_launch_that_the_host_refuses_is_failed_and_can_be_started_again() {
    let fleet = Fleet::new(&["a"]).await;
    fleet.world.refuse_next(&name("a"), RefusalCode::BadBoot, "/boot/guest is no PVH ELF");
    fleet.post("/v1/machines", json!({"name": "web", "vcpus": 1, "ram_bytes": 64 << 20})).await;
    let (status, _, problem) = fleet.refused(Method::GET, "/v1/machines/web/wait?timeout=10", None).await;
    assert_eq!(status, 502);
    assert!(problem["detail"].as_str().unwrap().contains("is no PVH ELF"), "{problem}");
    let failed = fleet.get("/v1/machines/web").await;
    assert_eq!((&failed["state"], &failed["reason"]["code"]), (&json!("failed"), &json!("bad_boot")));
    fleet.post("/v1/machines/web/start", json!({})).await;
    fleet.get("/v1/machines/web/wait?timeout=10").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_machines_move_at_once_and_the_control_plane_is_killed_meanwhile() {
    let mut fleet = Fleet::new(&["a", "b"]).await;
    let mut ids = Vec::new();
    for at in 0..20 {
        ids.push(fleet.launch(&format!("web-{at}"), if at % 2 == 0 { "a" } else { "b" }).await);
    }
    for host in &fleet.hosts {
        host.delay(Duration::from_millis(15));
    }
    let mut migrations = Vec::new();
    fleet.world.fault(Fault::HoldInPrecopy, true);
    for at in 0..20 {
        migrations.push(fleet.migrate(&format!("web-{at}"), if at % 2 == 0 { "b" } else { "a" }).await);
    }
    let list = fleet.get("/v1/migrations?limit=1000").await;
    let pending = list["migrations"].as_array().unwrap().iter().filter(|m| m["phase"] == "pending").count();
    assert_eq!(pending, 16, "each host takes 4 at once");
    fleet.restart().await;
    fleet.world.fault(Fault::HoldInPrecopy, false);
    for migration in &migrations {
        let ended = fleet.ended(migration).await;
        assert_eq!(ended["phase"], "succeeded", "{ended}");
    }
    for (at, id) in ids.iter().enumerate() {
        let target = if at % 2 == 0 { "b" } else { "a" };
        assert_eq!(fleet.world.running(*id), [(name(target), wire::ids::Epoch(2))]);
    }
    assert_eq!(fleet.world.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_host_is_lost_and_its_machines_are_unknown_until_it_returns() {
    let fleet = Fleet::new(&["a", "b"]).await;
    let id = fleet.launch("web", "a").await;
    fleet.hosts[0].connect(false);
    fleet.get("/v1/machines/web/wait?state=unknown&timeout=10").await;
    fleet.hosts_are("lost", 1).await;
    fleet.hosts[0].connect(true);
    fleet.get("/v1/machines/web/wait?state=started&timeout=10").await;
    assert_eq!(fleet.world.running(id).len(), 1);

    fleet.hosts[0].connect(false);
    fleet.hosts_are("lost", 1).await;
    fleet.world.lose_power(&name("a"));
    fleet.hosts[0].connect(true);
    fleet.get("/v1/machines/web/wait?state=failed&timeout=10").await;
    assert_eq!(fleet.get("/v1/machines/web").await["reason"]["code"], "lost_with_host");
    fleet.post("/v1/machines/web/start", json!({})).await;
    fleet.get("/v1/machines/web/wait?timeout=10").await;
    assert_eq!(fleet.world.running(id).len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_copy_under_a_lower_epoch_is_destroyed() {
    let fleet = Fleet::new(&["a", "b", "c"]).await;
    let id = fleet.launch("web", "a").await;
    let migration = fleet.migrate("web", "b").await;
    fleet.ended(&migration).await;
    fleet.world.plant(&name("c"), &name("b"), id, wire::ids::Epoch(1));
    let until = Instant::now() + Duration::from_secs(10);
    while fleet.world.running(id).len() > 1 {
        assert!(Instant::now() < until, "{:?}", fleet.world.running(id));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(fleet.world.running(id), [(name("b"), wire::ids::Epoch(2))]);
    let events = fleet.get("/v1/events?after=0&follow=false&limit=1000").await;
    let stray = |event: &&Value| {
        event["kind"] == "machine.stray" && event["message"].as_str().unwrap().contains("host c")
    };
    assert_eq!(events["events"].as_array().unwrap().iter().filter(stray).count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_whose_name_is_not_its_certificates_is_turned_away() {
    let fleet = Fleet::new(&["a"]).await;
    let liar = FakeHost::start(&fleet.world, &name("a"), "b", &fleet.ca, fleet.running().hosts).unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while liar.rejected().is_none() {
        assert!(Instant::now() < until, "never turned away");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(liar.rejected().unwrap().contains("host-cert a"), "{:?}", liar.rejected());

    let other = FleetCa::create().unwrap();
    let _stranger = FakeHost::start(&fleet.world, &name("z"), "z", &other, fleet.running().hosts).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let hosts = fleet.get("/v1/hosts").await;
    assert_eq!(hosts["hosts"].as_array().unwrap().len(), 1, "{hosts}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_request_with_the_same_key_changes_nothing_more() {
    let mut fleet = Fleet::new(&["a"]).await;
    let body = json!({"vcpus": 1, "ram_bytes": 64 << 20});
    let send = async |fleet: &Fleet, body: &Value| {
        let request = fleet.http.post(format!("{}/v1/machines", fleet.running().url)).bearer_auth(TOKEN);
        let response = request.header("idempotency-key", "k1").json(body).send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    };
    let (status, first) = send(&fleet, &body).await;
    assert_eq!(status, 201);
    fleet.restart().await;
    assert_eq!(send(&fleet, &body).await, (201, first));
    let (status, problem) = send(&fleet, &json!({"vcpus": 2, "ram_bytes": 64 << 20})).await;
    assert_eq!((status, &problem["code"]), (422, &json!("idempotency_key_reused")));
    assert_eq!(fleet.get("/v1/machines").await["machines"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_come_in_pages() {
    let fleet = Fleet::new(&["a"]).await;
    for at in 0..5 {
        fleet.launch(&format!("web-{at}"), "a").await;
    }
    let mut seen = Vec::new();
    let mut path = "/v1/machines?limit=2".to_owned();
    loop {
        let page = fleet.get(&path).await;
        let machines = page["machines"].as_array().unwrap();
        assert!(machines.len() <= 2);
        seen.extend(machines.iter().map(|machine| machine["name"].as_str().unwrap().to_owned()));
        let Some(cursor) = page["next_cursor"].as_str() else { break };
        path = format!("/v1/machines?limit=2&cursor={cursor}");
    }
    seen.sort();
    assert_eq!(seen, ["web-0", "web-1", "web-2", "web-3", "web-4"]);
    assert_eq!(fleet.get("/v1/machines?host=b").await["machines"], json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_can_be_taken_up_again_without_loss() {
    let mut fleet = Fleet::new(&["a"]).await;
    fleet.launch("web", "a").await;
    let kept = fleet.get("/v1/events?after=0&follow=false").await;
    let ids: Vec<u64> =
        kept["events"].as_array().unwrap().iter().map(|e| e["id"].as_u64().unwrap()).collect();
    assert_eq!(ids, (1..=ids.len() as u64).collect::<Vec<_>>());
    let last = *ids.last().unwrap();
    fleet.restart().await;
    fleet.hosts_are("online", 1).await;
    fleet.post("/v1/machines/web/stop", json!({})).await;
    let request = fleet.http.get(format!("{}/v1/events", fleet.running().url)).bearer_auth(TOKEN);
    let mut stream = request.header("last-event-id", last).send().await.unwrap();
    assert_eq!(stream.headers()["content-type"], "text/event-stream");
    let mut text = String::new();
    while !text.contains("machine.stopped") {
        let chunk = tokio::time::timeout(Duration::from_secs(10), stream.chunk()).await.unwrap().unwrap();
        text.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
    }
    let seen: Vec<u64> = text
        .lines()
        .filter_map(|line| line.strip_prefix("id:"))
        .map(|id| id.trim().parse().unwrap())
        .collect();
    assert_eq!(seen[0], last + 1);
    assert!(seen.windows(2).all(|pair| pair[1] == pair[0] + 1), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_go_on_across_a_move_a_stop_and_a_start() {
    let fleet = Fleet::new(&["a", "b"]).await;
    let id = fleet.launch("web", "a").await;
    let mut offset = 0;
    let mut text = String::new();
    let mut read = async |fleet: &Fleet, until: &str| {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !text.ends_with(until) {
            assert!(Instant::now() < deadline, "{text:?}");
            let path = format!("{}/v1/machines/web/logs?offset={offset}&limit_bytes=5", fleet.running().url);
            let response = fleet.http.get(path).bearer_auth(TOKEN).send().await.unwrap();
            assert_eq!(response.status(), 200);
            let number = |name: &str| response.headers()[name].to_str().unwrap().parse::<u64>().unwrap();
            assert_eq!(number("x-offset"), offset);
            offset = number("x-next-offset");
            text.push_str(&response.text().await.unwrap());
        }
        text.clone()
    };
    fleet.world.write_console(id, "one\n");
    read(&fleet, "one\n").await;
    let migration = fleet.migrate("web", "b").await;
    fleet.ended(&migration).await;
    fleet.world.write_console(id, "two\n");
    read(&fleet, "two\n").await;
    fleet.world.write_console(id, "three\n");
    fleet.post("/v1/machines/web/stop", json!({})).await;
    fleet.get("/v1/machines/web/wait?state=stopped&timeout=10").await;
    read(&fleet, "three\n").await;
    fleet.post("/v1/machines/web/start", json!({})).await;
    fleet.get("/v1/machines/web/wait?timeout=10").await;
    let all = read(&fleet, "boot under e3\n").await;
    assert_eq!(all, "boot under e1\none\ntwo\nthree\nboot under e3\n");
}

/// The document says what is really answered: its routes are there, and its objects have the fields of real ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_openapi_document_is_true() {
    let fleet = Fleet::new(&["a", "b"]).await;
    let id = fleet.launch("web", "a").await;
    let migration = fleet.migrate("web", "b").await;
    let ended = fleet.ended(&migration).await;
    let document = fleet.get("/v1/openapi.json").await;
    let fields = |object: &Value| -> Vec<String> { object.as_object().unwrap().keys().cloned().collect() };
    let held = |name: &str, real: &Value| {
        let said = fields(&document["components"]["schemas"][name]["properties"]);
        let real = fields(real);
        let missing: Vec<_> = real.iter().filter(|field| !said.contains(field)).collect();
        assert!(missing.is_empty(), "{name} lacks {missing:?}");
        let extra: Vec<_> = said.iter().filter(|field| !real.contains(field)).collect();
        assert!(
            extra.iter().all(|field| ["next_cursor", "conflicting_id"].contains(&field.as_str())),
            "{name}: {extra:?}"
        );
    };
    held("Machine", &fleet.get("/v1/machines/web").await);
    held("MachineList", &fleet.get("/v1/machines").await);
    held("Migration", &ended);
    held("Timings", &ended["timings"]);
    held("MigrationList", &fleet.get("/v1/migrations").await);
    held("Host", &fleet.get("/v1/hosts/a").await);
    held("HostList", &fleet.get("/v1/hosts").await);
    held("Problem", &fleet.refused(Method::GET, "/v1/machines/nope", None).await.2);

    fleet.world.fault(Fault::HoldInPrecopy, true);
    let held_back = fleet.migrate("web", "a").await;
    let until = Instant::now() + Duration::from_secs(10);
    let moving = loop {
        let now = fleet.get(&format!("/v1/machines/{id}")).await;
        if !now["migration"]["progress"].is_null() {
            break now;
        }
        assert!(Instant::now() < until, "{now}");
    };
    held("MigrationRef", &moving["migration"]);
    held("Progress", &moving["migration"]["progress"]);

    for (path, methods) in document["paths"].as_object().unwrap() {
        let path = path.replace("{machine}", "web").replace("{migration}", &held_back).replace("{host}", "a");
        for method in methods.as_object().unwrap().keys() {
            // Anything but what would change the fleet: a body that is refused shows that the route is there.
            let method: Method = method.to_uppercase().parse().unwrap();
            let request = fleet.http.request(method.clone(), format!("{}{path}?odd=1", fleet.running().url));
            let request = request.bearer_auth(TOKEN).timeout(Duration::from_secs(5));
            let request = if method == Method::POST { request.body("{\"odd\": 1}") } else { request };
            let status = request.send().await.unwrap().status();
            assert!(status != 404 && status != 405, "{method} {path}: {status}");
        }
    }
}
