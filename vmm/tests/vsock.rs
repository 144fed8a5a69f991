//! virtio-vsock, driven by hand: a client on one side, a driver that keeps to the rules or does not on the other. No KVM needed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::driver::{Driver, NEEDS_RESET, WRITE};
use common::vsock::*;
use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::{Bytes, GuestAddress};
use vmm::virtio::vsock::{CONNECTIONS_MAX, Vsock};
use vmm::virtio::{Resources, Transport};

#[test]
fn a_client_connects_and_data_goes_both_ways() {
    let mut guest = Guest::start();
    let (mut client, ports) = guest.connect(1024);
    client.write_all(b"hello guest").unwrap();
    let packet = guest.expect(RW);
    assert_eq!(
        (packet.host_port, packet.guest_port, packet.data.as_slice()),
        (ports.0, 1024, &b"hello guest"[..])
    );
    guest.send(ports, RW, b"hello client");
    let mut got = [0; 12];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello client");
    client.write_all(b"!").unwrap();
    assert_eq!(guest.expect(RW).fwd_cnt, 12, "every packet says what was passed on");
    assert_eq!(guest.next(), None);
    assert_eq!(guest.status(), 15);
}

/// As newer Linux sends: header and data in any number of descriptors.
#[test]
fn packets_may_be_scattered() {
    let mut guest = Guest::start();
    let (mut client, ports) = guest.connect(7);
    let raw = guest.raw(ports, (1, RW), 0, b"scattered");
    let cuts = [0, 20, 44, 46, raw.len()];
    for (index, cut) in (0..4u16).zip(cuts.windows(2)) {
        let at = 0x30_0000 + u64::from(index) * 0x1000;
        guest.driver.ram.memory().write_slice(&raw[cut[0]..cut[1]], GuestAddress(at)).unwrap();
        let bytes = u32::try_from(cut[1] - cut[0]).unwrap();
        let next = if index < 3 { common::driver::NEXT } else { 0 };
        guest.driver.descriptor(FROM_GUEST, index, (at, bytes), next, index + 1);
    }
    guest.driver.offer(FROM_GUEST, 0);
    guest.driver.notify(FROM_GUEST);
    let mut got = [0; 9];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"scattered");
}

#[test]
fn a_guest_that_refuses_closes_the_client() {
    let mut guest = Guest::start();
    let mut client = guest.client();
    client.write_all(&9u32.to_le_bytes()).unwrap();
    let request = guest.expect(REQUEST);
    guest.send((request.host_port, 9), RST, &[]);
    assert_eq!(rest(&client), Vec::<u8>::new(), "closed without the byte that says it is open");
}

#[test]
fn a_client_that_hangs_up_before_the_answer_is_forgotten() {
    let mut guest = Guest::start();
    let mut client = guest.client();
    client.write_all(&9u32.to_le_bytes()).unwrap();
    let request = guest.expect(REQUEST);
    drop(client);
    assert_eq!(guest.expect(RST).host_port, request.host_port);
    guest.send((request.host_port, 9), RESPONSE, &[]);
    guest.expect(RST);
    // One that does not even name a port.
    let mut client = guest.client();
    client.write_all(&[1, 2]).unwrap();
    guest.serve();
    drop(client);
    assert_eq!(guest.next(), None);
}

#[test]
fn the_client_sends_no_more_than_the_guest_has_room_for() {
    let mut guest = Guest::start();
    guest.buf_alloc = 100;
    let (mut client, ports) = guest.connect(5);
    client.write_all(&[7; 250]).unwrap();
    assert_eq!(guest.expect(RW).data.len(), 100);
    guest.expect(CREDIT_REQUEST);
    assert_eq!(guest.next(), None, "asked once");
    // No news: still no room.
    guest.send(ports, CREDIT_UPDATE, &[]);
    assert_eq!(guest.next(), None);
    guest.fwd_cnt = 60;
    guest.send(ports, CREDIT_UPDATE, &[]);
    assert_eq!(guest.expect(RW).data.len(), 60);
    guest.expect(CREDIT_REQUEST);
    // A lie: more passed on than was sent. There is no room then, until the guest thinks better of it.
    guest.fwd_cnt = 10_000;
    guest.send(ports, CREDIT_UPDATE, &[]);
    assert_eq!(guest.next().map(|packet| packet.op), None);
    guest.fwd_cnt = 160;
    guest.send(ports, CREDIT_UPDATE, &[]);
    assert_eq!(guest.expect(RW).data.len(), 90);
    assert_eq!(guest.next(), None);
}

#[test]
fn the_guest_sends_no_more_than_the_client_takes() {
    let mut guest = Guest::start();
    let (client, ports) = guest.connect(5);
    // The socket takes something, the device buffers the rest; the guest keeps to what it is told.
    let (mut sent, mut forwarded) = (0usize, 0usize);
    let mut byte = (0..=u8::MAX).cycle();
    let mut want = Vec::new();
    loop {
        let room = DEVICE_BUFFER - (sent - forwarded);
        if room == 0 {
            guest.send(ports, CREDIT_REQUEST, &[]);
            let told = usize::try_from(guest.expect(CREDIT_UPDATE).fwd_cnt).unwrap();
            if told == forwarded {
                break;
            }
            forwarded = told;
            continue;
        }
        let data: Vec<u8> = byte.by_ref().take(room.min(32 << 10)).collect();
        sent += data.len();
        want.extend_from_slice(&data);
        guest.send(ports, RW, &data);
        while let Some(packet) = guest.next() {
            assert_eq!(packet.op, CREDIT_UPDATE);
            forwarded = usize::try_from(packet.fwd_cnt).unwrap();
        }
        assert!(sent < 64 << 20, "never full");
    }
    assert_eq!(sent - forwarded, DEVICE_BUFFER);
    // One byte more breaks the rules and the connection, but not the device. What was accepted still reaches the client.
    guest.send(ports, RW, &[1]);
    guest.expect(RST);
    assert_eq!(guest.status(), 15);
    drop(client);
}

#[test]
fn a_slow_client_gets_everything_the_guest_sent_before_it_ended() {
    for end in [RST, SHUTDOWN] {
        let mut guest = Guest::start();
        let (client, ports) = guest.connect(5);
        let data: Vec<u8> = (0..=u8::MAX).cycle().take(64 << 10).collect();
        let mut sent = 0;
        // More than a socket takes.
        for _ in 0..5 {
            guest.send(ports, RW, &data);
            sent += data.len();
            while let Some(packet) = guest.next() {
                assert_eq!(packet.op, CREDIT_UPDATE);
            }
        }
        if end == RST {
            guest.send(ports, RST, &[]);
        } else {
            guest.send_shutdown(ports, 3);
        }
        let reader = std::thread::spawn(move || rest(&client));
        let begin = Instant::now();
        let mut reset = false;
        while !reader.is_finished() {
            assert!(begin.elapsed() < Duration::from_secs(10), "the client waits");
            reset |= guest.next().is_some_and(|packet| packet.op == RST);
            std::thread::yield_now();
        }
        let got = reader.join().unwrap();
        assert_eq!(got.len(), sent);
        assert!(got.chunks(data.len()).all(|chunk| chunk == data));
        reset |= guest.next().is_some_and(|packet| packet.op == RST);
        assert_eq!(reset, end == SHUTDOWN, "a shutdown of both directions is answered by a reset");
    }
}

#[test]
fn an_end_of_file_travels_both_ways() {
    let mut guest = Guest::start();
    let (mut client, ports) = guest.connect(5);
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(RW).data, b"question");
    assert_eq!(guest.expect(SHUTDOWN).flags, 2, "the client sends no more, but receives");
    guest.send(ports, RW, b"answer");
    guest.send_shutdown(ports, 2);
    assert_eq!(rest(&client), b"answer");
    drop(client);
    assert_eq!(guest.expect(SHUTDOWN).flags, 3);
    // The guest reads on and says so; that must not cost it what it has not read.
    guest.send(ports, CREDIT_UPDATE, &[]);
    assert_eq!(guest.next(), None);
    guest.send_shutdown(ports, 3);
    guest.expect(RST);
    guest.send(ports, CREDIT_UPDATE, &[]);
    guest.expect(RST);
}

#[test]
fn a_guest_that_receives_no_more_is_sent_no_more() {
    let mut guest = Guest::start();
    let (mut client, ports) = guest.connect(5);
    guest.send_shutdown(ports, 1);
    assert_eq!(guest.expect(SHUTDOWN).flags, 2);
    let _refused = client.write_all(b"unheard");
    assert_eq!(guest.next(), None);
    guest.send(ports, RW, b"still talking");
    let mut got = [0; 13];
    client.read_exact(&mut got).unwrap();
}

#[test]
fn a_client_that_leaves_without_reading_does_not_hold_the_guest() {
    let mut guest = Guest::start();
    let (client, ports) = guest.connect(5);
    let data = [3; 60 << 10];
    guest.send(ports, RW, &data);
    guest.send(ports, RW, &data);
    drop(client);
    let mut last = guest.next().unwrap();
    while let Some(packet) = guest.next() {
        last = packet;
    }
    assert_eq!((last.op, last.flags), (SHUTDOWN, 3));
    assert_eq!(last.buf_alloc, 128 << 10);
}

#[test]
fn connections_of_the_guest_are_refused() {
    let mut guest = Guest::start();
    guest.send((80, 4000), REQUEST, &[]);
    let packet = guest.expect(RST);
    assert_eq!((packet.host_port, packet.guest_port), (80, 4000));
    // A reset is never answered by one.
    guest.send((80, 4000), RST, &[]);
    assert_eq!(guest.next(), None);
}

#[test]
fn what_breaks_the_protocol_costs_the_connection() {
    for (kind, op) in [(1, REQUEST), (1, RESPONSE), (1, 0), (1, 8), (1, 0xffff)] {
        let mut guest = Guest::start();
        let (client, ports) = guest.connect(5);
        let raw = guest.raw(ports, (kind, op), 0, &[]);
        guest.send_raw(&raw);
        guest.expect(RST);
        assert_eq!(rest(&client), Vec::<u8>::new(), "operation {op}");
        assert_eq!(guest.status(), 15);
    }
    // What is no stream, or comes from elsewhere, has nothing to do with the connection.
    let mut guest = Guest::start();
    let (mut client, ports) = guest.connect(5);
    let raw = guest.raw(ports, (2, RW), 0, b"datagram");
    guest.send_raw(&raw);
    guest.expect(RST);
    let mut raw = guest.raw(ports, (1, RW), 0, b"spoofed");
    raw[0] = 9;
    guest.send_raw(&raw);
    assert_eq!(guest.next(), None);
    let other = (ports.0, 6);
    guest.send(other, RW, b"other port");
    guest.expect(RST);
    guest.send(ports, RW, b"fine");
    let mut got = [0; 4];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"fine");
}

#[test]
fn what_breaks_the_rules_of_queues_stops_the_device() {
    type Crime = fn(&mut Guest);
    let crimes: [(&str, Crime); 5] = [
        ("a packet without a whole header", |guest| guest.send_raw(&[0; 43])),
        ("a packet shorter than it says", |guest| {
            let mut raw = guest.raw((1, 2), (1, RW), 0, b"abc");
            raw[24] = 4;
            guest.send_raw(&raw);
        }),
        ("a packet that claims to be endless", |guest| {
            let mut raw = guest.raw((1, 2), (1, RW), 0, b"abc");
            raw[24..28].fill(0xff);
            guest.send_raw(&raw);
        }),
        ("more data than a packet holds", |guest| {
            let raw = guest.raw((1, 2), (1, RW), 0, &[0; (64 << 10) + 1]);
            guest.send_raw(&raw);
        }),
        ("a receive buffer without room for a header", |guest| {
            guest.driver.descriptor(TO_GUEST, 0, (buffer(TO_GUEST, 0), 43), WRITE, 0);
            guest.send((80, 4000), REQUEST, &[]);
        }),
    ];
    for (name, crime) in crimes {
        let mut guest = Guest::start();
        let (client, _) = guest.connect(5);
        for index in 1..8 {
            guest.driver.descriptor(TO_GUEST, index, (buffer(TO_GUEST, index), 43), WRITE, 0);
        }
        crime(&mut guest);
        assert_eq!(guest.status(), 15 | NEEDS_RESET, "{name}");
        // The driver's reset closes what there was.
        guest.driver.write(0x70, 0);
        assert_eq!(rest(&client), Vec::<u8>::new(), "{name}");
    }
}

#[test]
fn floods_are_bounded() {
    let mut guest = Guest::start();
    // Thousands of packets for nobody, and never a buffer for the answers.
    for _ in 0..5000 {
        guest.send((80, 4000), REQUEST, &[]);
    }
    assert_eq!(guest.status(), 15);
    let mut resets = 0;
    while guest.next().is_some() {
        resets += 1;
    }
    assert!((8..=8 + 2 * CONNECTIONS_MAX).contains(&resets), "{resets}");
}

#[test]
fn clients_beyond_the_bound_wait_for_their_turn() {
    let mut guest = Guest::start();
    let mut clients: Vec<_> = (0..CONNECTIONS_MAX).map(|_| guest.connect(5)).collect();
    let mut late = guest.client();
    late.write_all(&6u32.to_le_bytes()).unwrap();
    assert_eq!(guest.next(), None);
    let (first, ports) = clients.remove(0);
    guest.send(ports, RST, &[]);
    assert_eq!(guest.expect(REQUEST).guest_port, 6);
    assert_eq!(rest(&first), Vec::<u8>::new());
}

#[test]
fn after_a_restore_the_guest_hears_that_its_connections_are_gone() {
    let mut guest = Guest::start();
    let (mut client, ports) = guest.connect(5);
    let saved = guest.driver.transport.save();
    // The source goes on as if nothing had happened, should the migration fail.
    client.write_all(b"still here").unwrap();
    assert_eq!(guest.expect(RW).data, b"still here");
    let saved_again = guest.driver.transport.save();
    assert_ne!(saved, saved_again);
    // It is given away: clients see the end at once.
    guest.driver.transport.left();
    assert_eq!(rest(&client), Vec::<u8>::new());

    let (vsock, socket, dir) = device();
    let mut target =
        Transport::new(Box::new(vsock), Arc::clone(guest.driver.ram.memory()), Resources::new(3).unwrap());
    target.restore(&saved_again).unwrap();
    guest.driver.transport = target;
    (guest.socket, guest.dir) = (socket, dir);
    // A client that comes before the guest has heard waits.
    let mut early = guest.client();
    early.write_all(&77u32.to_le_bytes()).unwrap();
    assert_eq!(guest.next(), None);
    assert_eq!(guest.driver.used(EVENTS).0, 1, "one event");
    let mut event = [0xff; 4];
    guest.driver.ram.memory().read_slice(&mut event, GuestAddress(buffer(EVENTS, 0))).unwrap();
    assert_eq!(event, [0; 4], "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
    assert_eq!(guest.next(), None, "until the guest has taken the event");
    guest.offer(EVENTS, 0, 8);
    guest.driver.notify(EVENTS);
    assert_eq!(guest.expect(REQUEST).guest_port, 77);
    assert_eq!(guest.driver.used(EVENTS).0, 1, "still one event");
    // What the guest says on old connections is refused.
    guest.send(ports, RW, b"are you there?");
    guest.expect(RST);
}

#[test]
fn the_event_waits_for_a_buffer() {
    let (vsock, socket, dir) = device();
    let driver = Driver::new(Box::new(vsock)).start(3);
    let mut guest = Guest { driver, socket, dir, seen: 0, buf_alloc: 1 << 18, fwd_cnt: 0 };
    let saved = guest.driver.transport.save();
    guest.driver.transport.restore(&saved).unwrap();
    guest.driver.transport.resume();
    guest.serve();
    guest.driver.notify(EVENTS);
    assert_eq!(guest.driver.used(EVENTS).0, 0);
    guest.offer(EVENTS, 3, 8);
    guest.driver.notify(EVENTS);
    assert_eq!(guest.driver.used(EVENTS), (1, 3, 4));
}

#[test]
fn a_guest_that_never_answers_is_given_up() {
    let mut guest = Guest::start();
    let mut client = guest.client();
    client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    client.write_all(&5u32.to_le_bytes()).unwrap();
    guest.expect(REQUEST);
    let begin = Instant::now();
    let fd = guest.driver.transport.host_fd().unwrap();
    let patience = rustix::event::Timespec { tv_sec: 30, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&patience)).unwrap(), 1);
    assert!(begin.elapsed() > Duration::from_secs(9));
    guest.expect(RST);
    assert_eq!(rest(&client), Vec::<u8>::new());
}

#[test]
fn without_a_listener_there_are_no_connections() {
    let mut driver = Driver::new(Box::new(Vsock::new(None).unwrap())).start(3);
    assert!(!driver.transport.host_event());
    let mut cid = [0; 8];
    driver.transport.read(0x100, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 3);
    assert_eq!(driver.status(), 15);
    // A client that finds nobody.
    let dir = tempfile::tempdir().unwrap();
    let error = UnixStream::connect(dir.path().join("none")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}
