//! What happens when the link or the peer fails.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;

use super::relay::Relay;
use super::*;

/// Runs a server that reads one stream to its end, and a client that reaches it through `relay`.
fn through_relay<C, CF>(
    loss_per_mille: u64,
    options: TransportOptions,
    client: C,
) -> Result<Vec<u8>, QuicError>
where
    C: FnOnce(Endpoint, Connection, Arc<Relay>) -> CF + 'static,
    CF: Future<Output = ()> + 'static,
{
    let ca = FleetCa::create().unwrap();
    let running = Server::start(member(&ca, "host-b"), options.clone(), any_port(), |endpoint| async move {
        let connection = endpoint.accept().await.unwrap();
        let mut stream = match connection.accept_uni().await {
            Ok(stream) => stream,
            Err(error) => return Err(error),
        };
        let data = read_all(&mut stream).await;
        if data.is_ok() {
            connection.close(5, "read it all");
        }
        endpoint.shutdown(0, "").await;
        data
    });
    let relay = Arc::new(Relay::start(running.addr, loss_per_mille));
    let trust = member(&ca, "host-a");
    let link = relay.clone();
    on_shard(async move {
        let endpoint = Endpoint::bind(any_port(), &trust, options).unwrap();
        let connection = endpoint.connect(link.addr, &host("host-b")).await.unwrap();
        client(endpoint.clone(), connection, link).await;
        endpoint.shutdown(0, "").await;
    });
    running.join()
}

#[test]
fn lost_packets_are_sent_again() {
    const BYTES: usize = 4 << 20;
    // Small datagrams, so that there are thousands to lose.
    let options = TransportOptions { mtu_max: 1452, ..Default::default() };
    let data = through_relay(20, options, |_, connection, relay| async move {
        let mut stream = connection.open_uni().await.unwrap();
        stream.write_all(&pattern(11, BYTES)).await.unwrap();
        stream.finish().unwrap();
        assert!(matches!(connection.closed().await, Lost::ClosedByPeer { code: 5, .. }));
        assert!(relay.dropped.load(Ordering::SeqCst) > 10);
        assert!(connection.stats().packets_lost > 10, "{:?}", connection.stats());
    });
    assert!(data.unwrap() == pattern(11, BYTES), "content differs");
}

#[test]
fn a_cut_link_ends_every_wait_on_both_sides_within_the_idle_timeout() {
    let options = TransportOptions {
        keep_alive: Duration::from_millis(200),
        idle_timeout: Duration::from_secs(1),
        ..Default::default()
    };
    let data = through_relay(0, options, |_, connection, relay| async move {
        let mut stream = connection.open_uni().await.unwrap();
        stream.write_all(b"begin").await.unwrap();
        // A quiet connection that is alive stays alive.
        glommio::timer::sleep(Duration::from_millis(1500)).await;
        assert!(connection.lost().is_none(), "{:?}", connection.lost());

        relay.cut(true);
        let cut = Instant::now();
        let waits: Vec<_> = (0..3)
            .map(|kind| {
                let connection = connection.clone();
                glommio::spawn_local(async move {
                    match kind {
                        0 => connection.accept_uni().await.err(),
                        1 => connection.accept_bi().await.err(),
                        _ => Some(connection.closed().await.into()),
                    }
                })
            })
            .collect();
        let piece = Bytes::from(vec![1; 64 << 10]);
        let error = loop {
            if let Err(error) = stream.write_chunk(piece.clone()).await {
                break error;
            }
        };
        assert!(matches!(error, QuicError::Lost(Lost::TimedOut)), "{error:?}");
        for wait in waits {
            let error = wait.await;
            assert!(matches!(error, Some(QuicError::Lost(Lost::TimedOut))), "{error:?}");
        }
        // The timeout counts from the last thing that was heard, or first sent after it.
        assert!(cut.elapsed() < Duration::from_secs(3), "{:?}", cut.elapsed());
        assert!(matches!(connection.open_uni().await, Err(QuicError::Lost(Lost::TimedOut))));
    });
    assert!(matches!(data, Err(QuicError::Lost(Lost::TimedOut))), "{data:?}");
}

#[test]
fn a_short_outage_is_survived() {
    const BYTES: usize = 8 << 20;
    let data = through_relay(0, TransportOptions::default(), |_, connection, relay| async move {
        let mut stream = connection.open_uni().await.unwrap();
        let content = Bytes::from(pattern(5, BYTES));
        stream.write_chunk(content.slice(..BYTES / 2)).await.unwrap();
        relay.cut(true);
        let restored = glommio::spawn_local(async move {
            glommio::timer::sleep(Duration::from_millis(700)).await;
            relay.cut(false);
        });
        stream.write_chunk(content.slice(BYTES / 2..)).await.unwrap();
        stream.finish().unwrap();
        restored.await;
        assert!(matches!(connection.closed().await, Lost::ClosedByPeer { code: 5, .. }));
    });
    assert!(data.unwrap() == pattern(5, BYTES), "content differs");
}

#[test]
fn nobody_answers_and_the_endpoint_goes_on() {
    let ca = FleetCa::create().unwrap();
    let trust = member(&ca, "host-a");
    // Bound, so that the port is taken, but never read.
    let deaf = std::net::UdpSocket::bind("[::1]:0").unwrap();
    let addr = deaf.local_addr().unwrap();
    on_shard(async move {
        let options = TransportOptions {
            keep_alive: Duration::from_millis(100),
            idle_timeout: Duration::from_millis(600),
            ..Default::default()
        };
        let endpoint = Endpoint::bind(any_port(), &trust, options).unwrap();
        let begun = Instant::now();
        let error = endpoint.connect(addr, &host("host-b")).await.unwrap_err();
        assert!(matches!(error, QuicError::Lost(Lost::TimedOut)), "{error:?}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        let nowhere = endpoint.connect("[::1]:0".parse().unwrap(), &host("host-b")).await;
        assert!(matches!(nowhere, Err(QuicError::Connect { .. })), "{nowhere:?}");
        endpoint.shutdown(0, "").await;
        assert!(matches!(endpoint.connect(addr, &host("host-b")).await, Err(QuicError::EndpointClosed)));
        assert!(matches!(endpoint.accept().await, Err(QuicError::EndpointClosed)));
    });
}

#[test]
fn garbage_on_the_port_harms_nobody() {
    let ca = FleetCa::create().unwrap();
    let running = Server::start(
        member(&ca, "host-b"),
        TransportOptions::default(),
        any_port(),
        |endpoint| async move {
            let connection = endpoint.accept().await.unwrap();
            let mut stream = connection.accept_uni().await.unwrap();
            let data = read_all(&mut stream).await.unwrap();
            connection.close(0, "");
            endpoint.shutdown(0, "").await;
            data
        },
    );
    let attacker = std::net::UdpSocket::bind("[::1]:0").unwrap();
    let noise = pattern(99, 4000);
    for length in (0..3000).step_by(7) {
        let mut datagram = noise[length % 500..][..length].to_vec();
        // Every kind of header: long and short, known and unknown versions.
        if let Some(first) = datagram.first_mut() {
            *first |= if length % 3 == 0 { 0xC0 } else { 0x40 };
        }
        if length % 2 == 0 && length > 5 {
            datagram[1..5].copy_from_slice(&[0, 0, 0, 1]);
        }
        attacker.send_to(&datagram, running.addr).unwrap();
    }
    let (trust, addr) = (member(&ca, "host-a"), running.addr);
    on_shard(async move {
        let endpoint = Endpoint::bind(any_port(), &trust, TransportOptions::default()).unwrap();
        let connection = endpoint.connect(addr, &host("host-b")).await.unwrap();
        let mut stream = connection.open_uni().await.unwrap();
        stream.write_all(b"still here").await.unwrap();
        stream.finish().unwrap();
        connection.closed().await;
        endpoint.shutdown(0, "").await;
    });
    assert_eq!(running.join(), b"still here");
}
