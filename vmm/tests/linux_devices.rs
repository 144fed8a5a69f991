//! vsock and balloon with Linux' own drivers. Skipped, loudly, where KVM cannot run Linux or there is no kernel to run.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::host::{Parts, spec};
use common::initramfs;
use common::linux::Linux;
use common::skip;
use wire::vmm::{Reply, Request, VSOCK_OPEN};

const RAM: u64 = 256 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// The guest's echo program; `None` where it cannot be compiled. A machine without a compiler takes it from `MASHINE_VSOCK_ECHO`.
fn echo_program() -> Option<Vec<u8>> {
    if let Some(path) = std::env::var_os("MASHINE_VSOCK_ECHO") {
        return std::fs::read(path).ok();
    }
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("echo");
    let done = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-o"])
        .arg(&output)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/vsock_echo.rs"))
        .status();
    done.is_ok_and(|status| status.success()).then(|| std::fs::read(output).unwrap())
}

fn boot() -> Option<Linux> {
    let kernel = initramfs::runnable()?;
    let Some(program) = echo_program() else {
        skip("the guest's echo program cannot be compiled (rustc and a static libc)");
        return None;
    };
    let mut linux = Linux::boot_with(&kernel, Parts::new(spec(2, RAM)), "", Some(&program));
    linux.type_line("test-program &");
    linux.wait_for("LISTENING");
    Some(linux)
}

fn connect(socket: &Path) -> UnixStream {
    let mut client = UnixStream::connect(socket).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(&1024u32.to_le_bytes()).unwrap();
    let mut open = [0xff];
    client.read_exact(&mut open).unwrap();
    assert_eq!(open, [VSOCK_OPEN]);
    client
}

/// Sends `bytes` bytes and an end of file, and expects both back.
fn echo(client: &UnixStream, bytes: usize) {
    let data: Vec<u8> = (0..=250).cycle().take(bytes).collect();
    let got = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut out = client;
            out.write_all(&data).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        let mut input = client;
        input.read_to_end(&mut got).unwrap();
        got
    });
    assert!(got == data, "{} of {} bytes came back as they were", got.len(), data.len());
}

#[test]
fn linux_is_reached_over_vsock_before_and_after_a_move() {
    let Some(mut linux) = boot() else { return };
    echo(&connect(&linux.vmm.vsock), 3 << 20);
    let many: Vec<_> = (0..20).map(|_| connect(&linux.vmm.vsock)).collect();
    for client in &many {
        echo(client, 70_000);
    }
    drop(many);
    // Nobody listens there.
    let mut refused = UnixStream::connect(&linux.vmm.vsock).unwrap();
    refused.write_all(&99u32.to_le_bytes()).unwrap();
    assert_eq!(refused.read(&mut [0]).unwrap(), 0);

    let held = connect(&linux.vmm.vsock);
    linux.sh("sleep 1");
    assert_eq!(linux.sh("wc -l < /ends"), "21", "ended so far");
    linux.move_to_a_fresh_vmm();
    // The first client of the new host meets an agent that has lost its old connections.
    echo(&connect(&linux.vmm.vsock), 100_000);
    linux.sh("sleep 1");
    let ends = linux.sh("cat /ends");
    assert_eq!(ends.lines().filter(|line| line.contains("reset by peer")).count(), 1, "{ends}");
    assert_eq!(ends.lines().count(), 23, "{ends}");
    drop(held);
    assert_eq!(linux.bad_lines(), Vec::<String>::new());
}

#[test]
fn linux_reports_its_free_memory() {
    let Some(mut linux) = boot() else { return };
    let mut ask = || match linux.vmm.ask(Request::BalloonStats) {
        Reply::Balloon(report) => report,
        other => panic!("{other:?}"),
    };
    let begin = Instant::now();
    loop {
        let report = ask();
        // Free page reporting begins two seconds after the driver.
        if let Some(total) = report.total_bytes
            && report.reported_bytes > RAM / 4
        {
            assert!(total > RAM / 2 && total <= RAM, "{report:?}");
            assert!(report.available_bytes.unwrap() > 0 && report.free_bytes.unwrap() > 0, "{report:?}");
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "{report:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
    // What was given back can be used again, and survives a move.
    linux.sh("mount -t tmpfs t /mnt 2>/dev/null || (mkdir /mnt; mount -t tmpfs t /mnt); head -c 60000000 /dev/urandom > /mnt/a; md5sum < /mnt/a > /sum");
    linux.move_to_a_fresh_vmm();
    assert_eq!(linux.sh("md5sum < /mnt/a | cmp - /sum && echo same"), "same");
    assert_eq!(linux.bad_lines(), Vec::<String>::new());
}
