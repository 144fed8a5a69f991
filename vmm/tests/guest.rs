//! The bare-metal test guest over a real tap: it boots, serves TCP on both IP versions, and keeps its connections and
//! its memory across a move to another process. Skipped, loudly, where that is not possible.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::host::Vmm;
use common::net::{GUEST_IP4, GUEST_IP6};
use common::session::{Session, migrate, with_guest};
use wire::vmm::{GuestEnd, Notice, Reply, Request};

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
