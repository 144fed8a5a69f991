//! The bare-metal test guest over a real tap: it boots, serves TCP on both IP versions, and keeps its connections and
//! its memory across a move to another process. Skipped, loudly, where that is not possible.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::host::{PATIENCE, Parts, Vmm, spec, wait_until};
use common::net::{self, GUEST_IP4, GUEST_IP6};
use common::{have_kvm, test_guest};
use wire::ids::Epoch;
use wire::vmm::{Disowned, GuestEnd, Notice, Reply, Request};

const RAM: u64 = 128 << 20;

/// A TCP connection to one of the guest's ports.
struct Session(BufReader<TcpStream>);

impl Session {
    fn open(address: &str, port: u16) -> Self {
        let stream = TcpStream::connect_timeout(
            &(address.parse::<std::net::IpAddr>().unwrap(), port).into(),
            PATIENCE,
        )
        .unwrap_or_else(|error| panic!("{address} port {port}: {error}"));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self(BufReader::new(stream))
    }

    fn command(&mut self, line: &str) -> String {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut reply = String::new();
        self.0.read_line(&mut reply).unwrap();
        assert!(reply.starts_with("{\"ok\":true"), "{line}: {reply}");
        reply
    }

    fn echo(&mut self, message: &[u8]) {
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
fn with_guest(vcpus: u32, test: fn(Parts, Vmm)) {
    let run = move || {
        if !have_kvm() {
            return;
        }
        let Some(kernel) = test_guest() else { return };
        let Some(tap) = net::tap() else { return };
        let mut parts = Parts::new(spec(vcpus, RAM));
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

#[test]
fn the_guest_serves_tcp_and_powers_off() {
    with_guest(1, |parts, mut vmm| {
        assert_eq!(parts.console_from(0)[0], b'M');
        for address in [GUEST_IP4, GUEST_IP6] {
            let mut echo = Session::open(address, 7);
            for size in [1, 100, 1400, 60_000] {
                echo.echo(&vec![0x5a; size]);
            }
            let status = Session::open(address, 9).command("status");
            assert!(status.contains("\"rng_ok\":true"), "{status}");
        }
        let mut control = Session::open(GUEST_IP4, 9);
        control.command("shutdown");
        assert_eq!(vmm.notice(), Notice::GuestEnded(GuestEnd::PowerOff));
    });
}

#[test]
fn connections_and_memory_survive_moves_between_processes() {
    with_guest(2, |parts, vmm| {
        let mut echo = Session::open(GUEST_IP4, 7);
        let mut echo6 = Session::open(GUEST_IP6, 7);
        let mut control = Session::open(GUEST_IP4, 9);
        control.command("populate entropy=100");
        control.command("dirty rate=2000");
        let boot_id = |status: &str| status.split("\"boot_id\":").nth(1).unwrap()[..10].to_owned();
        let born = boot_id(&control.command("status"));

        let (mut parts, mut vmm) = (parts, vmm);
        for epoch in 2..12 {
            echo.echo(b"before");
            // A segment that arrives during the pause waits in the tap.
            vmm.pause(true);
            echo.0.get_mut().write_all(b"during").unwrap();
            let state = vmm.save();
            let there = parts.again();
            let mut target = Vmm::start();
            assert_eq!(target.create(&there), Reply::Done);
            target.must(Request::Restore(state));
            target.run(epoch);
            let mut during = [0; 6];
            echo.0.read_exact(&mut during).unwrap();
            assert_eq!(&during, b"during");
            echo6.echo(b"after");
            (parts, vmm) = (there, target);
        }
        assert_eq!(boot_id(&control.command("status")), born);
        control.command("dirty rate=0");
        let verified = control.command("verify");
        assert!(verified.contains("\"wrong\":0") && verified.contains("\"sum_ok\":true"), "{verified}");
        drop((parts, vmm));
    });
}

/// Moves the machine to memory of its own, round by round, as a migration does.
fn migrate(parts: &Parts, vmm: &mut Vmm, epoch: u64) -> (Parts, Vmm) {
    let there = parts.elsewhere();
    let mut target = Vmm::start();
    assert_eq!(target.create(&there), Reply::Done);
    vmm.must(Request::DirtyLog { on: true });
    for _ in 0..4 {
        vmm.ask(Request::DirtySync);
        for first in (0..RAM / 4096).step_by(512) {
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

#[test]
fn a_migration_by_copying_loses_no_page() {
    let moves = std::env::var("MASHINE_TEST_MOVES").ok().and_then(|n| n.parse().ok()).unwrap_or(4);
    MOVES.store(moves, Ordering::Relaxed);
    with_guest(2, |mut parts, mut vmm| {
        let mut echo = Session::open(GUEST_IP4, 7);
        let mut control = Session::open(GUEST_IP4, 9);
        control.command("populate entropy=100");
        control.command("dirty rate=20000");
        // Traffic all the while: the device writes into RAM too.
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let pinger = std::thread::spawn(move || {
            let mut echoes = 0u32;
            while !stopped.load(Ordering::Relaxed) {
                echo.echo(&echoes.to_le_bytes().repeat(200));
                echoes += 1;
            }
            echoes
        });
        for epoch in 2..2 + MOVES.load(Ordering::Relaxed) {
            (parts, vmm) = migrate(&parts, &mut vmm, epoch);
            let state = control.command("status");
            assert!(!state.contains("\"pages_written\":0,"), "{state}");
        }
        stop.store(true, Ordering::Relaxed);
        assert!(pinger.join().unwrap() > 100);
        control.command("dirty rate=0");
        let verified = control.command("verify");
        assert!(verified.contains("\"wrong\":0") && verified.contains("\"sum_ok\":true"), "{verified}");
        drop((parts, vmm));
    });
}

/// Moves in [`a_migration_by_copying_loses_no_page`]; more of them with `MASHINE_TEST_MOVES`.
static MOVES: AtomicU64 = AtomicU64::new(4);

#[test]
fn an_interface_that_is_flooded_stays_alive() {
    with_guest(1, |_parts, mut vmm| {
        let mut echo = Session::open(GUEST_IP4, 7);
        let mut control = Session::open(GUEST_IP4, 9);
        let block = vec![7u8; 256 << 10];
        let mut writer = echo.0.get_ref().try_clone().unwrap();
        let sent = block.clone();
        let sender = std::thread::spawn(move || {
            for _ in 0..16 {
                writer.write_all(&sent).unwrap();
            }
        });
        let mut back = vec![0; block.len()];
        for round in 0..16 {
            echo.0.read_exact(&mut back).unwrap();
            assert!(back == block, "round {round}");
            if round % 4 == 0 {
                vmm.pause(false);
                std::thread::sleep(Duration::from_millis(2));
                vmm.run(1);
                control.command("ping");
            }
        }
        sender.join().unwrap();
    });
}
