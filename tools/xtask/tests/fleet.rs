//! The fleet's ground, without its programs: namespaces, marked processes, clearing up. Needs root; says so and counts as skipped where it is not.

use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use xtask::fleet::layout::{FABRIC_IP4, FABRIC_IP6, FleetName, Host};
use xtask::fleet::leaks::Baseline;
use xtask::fleet::processes::{self, Service};
use xtask::fleet::{self, netns};

/// A fleet of this test process only, taken down however the test ends.
struct Ground(FleetName);

impl Ground {
    fn new(test: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: namespaces need root");
            return None;
        }
        Some(Self(format!("{test}{}", std::process::id()).parse().expect("letters and digits")))
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        fleet::down(&self.0).expect("everything can be removed");
    }
}

fn sleeper(ground: &Ground, namespace: String) -> Service {
    Service {
        name: "sleeper".to_owned(),
        namespace,
        program: "/bin/sh".into(),
        // A child of its own, that ignores the polite signal.
        arguments: vec!["-c".to_owned(), "trap '' TERM; sleep 1000 & echo begun; wait".to_owned()],
        log: ground.0.state_dir().join("sleeper.log"),
    }
}

#[test]
fn hosts_and_client_reach_each_other_over_both_families() {
    let Some(ground) = Ground::new("tn") else { return };
    let hosts = Host::first(2).unwrap();
    netns::create(&ground.0, &hosts).unwrap();
    for client in [FABRIC_IP4.to_string(), FABRIC_IP6.to_string()] {
        let address = (client.as_str(), 0);
        let listener =
            netns::within(&ground.0.fabric_namespace(), || TcpListener::bind(address)).unwrap().unwrap();
        let to = listener.local_addr().unwrap();
        for host in &hosts {
            let connected = netns::within(&ground.0.host_namespace(host), || {
                TcpStream::connect_timeout(&to, Duration::from_secs(2))
            });
            connected.unwrap().unwrap();
        }
    }
    assert!(netns::create(&ground.0, &hosts).is_err(), "made twice");
}

#[test]
fn down_clears_what_a_crash_left() {
    let before = Baseline::take();
    let Some(ground) = Ground::new("td") else { return };
    std::fs::create_dir_all(ground.0.state_dir()).unwrap();
    netns::create(&ground.0, &Host::first(1).unwrap()).unwrap();
    let service = sleeper(&ground, ground.0.fabric_namespace());
    let mut child = service.start(&ground.0).unwrap();
    processes::await_line("sleeper", &mut child, &service.log, Duration::from_secs(5), |line| {
        line == "begun"
    })
    .unwrap();
    let leaks = before.leaks(&ground.0);
    assert_eq!(leaks.iter().filter(|leak| leak.starts_with("process")).count(), 2, "{leaks:?}");
    assert_eq!(leaks.iter().filter(|leak| leak.starts_with("namespace")).count(), 2, "{leaks:?}");
    assert!(leaks.iter().any(|leak| leak.starts_with("directory")), "{leaks:?}");
    assert!(!fleet::is_up(&ground.0), "half a fleet is not up");

    assert!(fleet::down(&ground.0).unwrap(), "there was something");
    child.wait().unwrap();
    assert_eq!(before.leaks(&ground.0), Vec::<String>::new());
    assert!(!fleet::down(&ground.0).unwrap(), "a second time there is nothing");
}

#[test]
fn a_program_that_ends_early_is_reported_with_its_log() {
    let Some(ground) = Ground::new("te") else { return };
    std::fs::create_dir_all(ground.0.state_dir()).unwrap();
    netns::create(&ground.0, &[]).unwrap();
    let mut service = sleeper(&ground, ground.0.fabric_namespace());
    service.arguments = vec!["-c".to_owned(), "echo no such luck; exit 3".to_owned()];
    let mut child = service.start(&ground.0).unwrap();
    let failed =
        processes::await_line("sleeper", &mut child, &service.log, Duration::from_secs(5), |_| false);
    let text = format!("{:#}", failed.unwrap_err());
    assert!(text.contains("no such luck") && text.contains('3'), "{text}");
}
