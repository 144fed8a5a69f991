//! The bare-metal test guest on a tap: connections to it, and moving it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use super::host::{PATIENCE, Parts, Vmm, spec, wait_until};
use super::{have_kvm, net, test_guest};
use wire::ids::Epoch;
use wire::vmm::{Disowned, Reply, Request};

pub const RAM: u64 = 128 << 20;

/// A TCP connection to one of the guest's ports.
pub struct Session(pub BufReader<TcpStream>);

impl Session {
    pub fn open(address: &str, port: u16) -> Self {
        let stream = TcpStream::connect_timeout(
            &(address.parse::<std::net::IpAddr>().unwrap(), port).into(),
            PATIENCE,
        )
        .unwrap_or_else(|error| panic!("{address} port {port}: {error}"));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self(BufReader::new(stream))
    }

    pub fn command(&mut self, line: &str) -> String {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut reply = String::new();
        self.0.read_line(&mut reply).unwrap();
        assert!(reply.starts_with("{\"ok\":true"), "{line}: {reply}");
        reply
    }

    pub fn echo(&mut self, message: &[u8]) {
        self.0.get_mut().write_all(message).unwrap();
        let mut back = vec![0; message.len()];
        self.0.read_exact(&mut back).unwrap();
        assert_eq!(back, message);
    }
}

fn ready(parts: &Parts) -> bool {
    String::from_utf8_lossy(&parts.console_from(0)).contains("ready ram=")
}

/// Runs `test` with the guest on a tap, in a thread (and so a network namespace) of its own.
pub fn with_guest(vcpus: u32, test: fn(Parts, Vmm)) {
    with_guest_of(move || Parts::new(spec(vcpus, RAM)), test);
}

/// As [`with_guest`], with a machine of these parts but the tap.
pub fn with_guest_of(parts: impl FnOnce() -> Parts + Send + 'static, test: fn(Parts, Vmm)) {
    let run = move || {
        if !have_kvm() {
            return;
        }
        let Some(kernel) = test_guest() else { return };
        let Some(tap) = net::tap() else { return };
        let mut parts = parts();
        let vcpus = parts.spec.vcpus;
        parts.tap = Some(tap);
        let mut vmm = Vmm::start();
        assert_eq!(vmm.create(&parts), Reply::Done);
        assert_eq!(vmm.boot(&kernel, &format!("{} mashine.vcpus={vcpus}", net::CMDLINE)), Reply::Done);
        vmm.run(1);
        wait_until("the guest is ready", || ready(&parts));
        test(parts, vmm);
    };
    std::thread::spawn(run).join().unwrap();
}

/// Moves the machine to memory and disks of its own, round by round, as a migration does.
pub fn migrate(parts: &Parts, vmm: &mut Vmm, epoch: u64) -> (Parts, Vmm) {
    let there = parts.elsewhere();
    let mut target = Vmm::start();
    assert_eq!(target.create(&there), Reply::Done);
    vmm.must(Request::DirtyLog { on: true });
    for _ in 0..4 {
        vmm.ask(Request::DirtySync);
        for first in (0..parts.spec.space().pages()).step_by(512) {
            vmm.ask(Request::DirtyTake { first: wire::units::PageIndex(first), count: 512 });
            parts.copy_pages(&parts.take_bitmap(), &there);
        }
    }
    vmm.pause(true);
    parts.copy_pages(&parts.take_bitmap(), &there);
    target.must(Request::Restore(vmm.save()));
    let migration = wire::ids::MigrationId::from_u64(epoch);
    let host = "host-b".parse().unwrap();
    vmm.must(Request::Disown(Disowned { epoch: Epoch(epoch), migration, target: host }));
    target.run(epoch);
    (there, target)
}
