//! Who is let in: identities, names, backlog.

use super::*;

/// Connects as `trust` to host-b of the fleet of `server`, and returns how that ended.
fn attempt(server: Trust, client: Trust, name: &'static str) -> Lost {
    let running = Server::start(server, TransportOptions::default(), any_port(), |endpoint| async move {
        let accepted = glommio::timer::timeout(Duration::from_secs(1), async {
            let _ = endpoint.accept().await;
            Ok::<(), glommio::GlommioError<()>>(())
        });
        assert!(accepted.await.is_err(), "the server let it in");
        endpoint.shutdown(0, "").await;
    });
    let addr = running.addr;
    let lost = on_shard(async move {
        let endpoint = Endpoint::bind(any_port(), &client, TransportOptions::default()).unwrap();
        let lost = match endpoint.connect(addr, &host(name)).await {
            // A client is done before the server has seen its certificate, and hears of it later.
            Ok(connection) => connection.closed().await,
            Err(QuicError::Lost(lost)) => lost,
            Err(other) => panic!("{other:?}"),
        };
        endpoint.shutdown(0, "").await;
        lost
    });
    running.join();
    lost
}

#[test]
fn members_of_another_fleet_are_refused_by_either_side() {
    let (ours, theirs) = (FleetCa::create().unwrap(), FleetCa::create().unwrap());
    // The client does not know the server's authority.
    let lost = attempt(member(&theirs, "host-b"), member(&ours, "host-a"), "host-b");
    assert!(matches!(lost, Lost::Protocol(quinn_proto::ConnectionError::TransportError(_))), "{lost:?}");
    // The client trusts the server, but has a certificate that the server does not.
    let stranger = Trust::new(ours.cert_pem(), &theirs.issue("host-a", Kind::Host).unwrap()).unwrap();
    let lost = attempt(member(&ours, "host-b"), stranger, "host-b");
    assert!(matches!(lost, Lost::Protocol(quinn_proto::ConnectionError::ConnectionClosed(_))), "{lost:?}");
}

#[test]
fn a_member_with_another_name_is_not_the_one_that_was_dialled() {
    let ca = FleetCa::create().unwrap();
    let lost = attempt(member(&ca, "host-b"), member(&ca, "host-a"), "host-c");
    assert!(matches!(lost, Lost::Protocol(_)), "{lost:?}");
}

#[test]
fn more_connections_than_the_backlog_holds_are_refused() {
    let ca = FleetCa::create().unwrap();
    let options = TransportOptions { accept_backlog: 1, ..Default::default() };
    let (go, wait) = mpsc::channel();
    let running = Server::start(member(&ca, "host-b"), options, any_port(), move |endpoint| async move {
        // Polled, because the other shard's word comes through a plain channel.
        while wait.try_recv().is_err() {
            glommio::timer::sleep(Duration::from_millis(5)).await;
        }
        let first = endpoint.accept().await.unwrap();
        first.close(7, "seen");
        endpoint.shutdown(0, "").await;
    });
    let (trust, addr) = (member(&ca, "host-a"), running.addr);
    on_shard(async move {
        let endpoint = Endpoint::bind(any_port(), &trust, TransportOptions::default()).unwrap();
        let first = endpoint.connect(addr, &host("host-b")).await.unwrap();
        let second = endpoint.connect(addr, &host("host-b")).await;
        assert!(matches!(second, Err(QuicError::Lost(Lost::Protocol(_)))), "{second:?}");
        assert!(first.lost().is_none());
        go.send(()).unwrap();
        // The server ends it: were it closed here, that could overtake the server's half of the handshake,
        // and there would be nothing to accept.
        let lost = first.closed().await;
        assert!(matches!(lost, Lost::ClosedByPeer { code: 7, .. }), "{lost:?}");
        endpoint.shutdown(0, "").await;
    });
    running.join();
}

#[test]
fn the_wildcard_address_takes_both_families() {
    let ca = FleetCa::create().unwrap();
    let wildcard = "[::]:0".parse().unwrap();
    let running =
        Server::start(member(&ca, "host-b"), TransportOptions::default(), wildcard, |endpoint| async move {
            for _ in 0..2 {
                let connection = endpoint.accept().await.unwrap();
                let mut stream = connection.accept_uni().await.unwrap();
                assert_eq!(read_all(&mut stream).await.unwrap().len(), 1 << 20);
                connection.close(0, "");
            }
            endpoint.shutdown(0, "").await;
        });
    let (trust, port) = (member(&ca, "host-a"), running.addr.port());
    on_shard(async move {
        for (bind, ip) in [("[::]:0", "127.0.0.2"), ("127.0.0.1:0", "127.0.0.1")] {
            let endpoint =
                Endpoint::bind(bind.parse().unwrap(), &trust, TransportOptions::default()).unwrap();
            let addr = SocketAddr::new(ip.parse().unwrap(), port);
            let connection = endpoint.connect(addr, &host("host-b")).await.unwrap();
            assert_eq!(connection.remote_addr(), addr);
            let mut stream = connection.open_uni().await.unwrap();
            stream.write_all(&pattern(3, 1 << 20)).await.unwrap();
            stream.finish().unwrap();
            assert!(matches!(connection.closed().await, Lost::ClosedByPeer { code: 0, .. }));
            endpoint.shutdown(0, "").await;
        }
    });
    running.join();
}
