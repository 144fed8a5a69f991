//! What streams promise: integrity, order, bounded memory, and codes that arrive.

use std::cell::Cell;
use std::rc::Rc;

use bytes::Bytes;

use super::*;

#[test]
fn sixty_four_mebibytes_over_four_streams_arrive_as_sent() {
    const STREAMS: u64 = 4;
    const EACH: usize = 16 << 20;
    let ((), stats) = connected(
        TransportOptions::default(),
        |connection| async move {
            let mut tasks = Vec::new();
            for _ in 0..STREAMS {
                let mut stream = connection.accept_uni().await.unwrap();
                tasks.push(glommio::spawn_local(async move {
                    let mut seed = [0; 8];
                    stream.read_exact(&mut seed).await.unwrap();
                    let data = read_all(&mut stream).await.unwrap();
                    // Not assert_eq: a difference would print megabytes.
                    assert!(data == pattern(u64::from_le_bytes(seed), EACH), "content differs");
                    seed
                }));
            }
            let mut seeds = Vec::new();
            for task in tasks {
                seeds.push(u64::from_le_bytes(task.await));
            }
            seeds.sort_unstable();
            assert_eq!(seeds, [0, 1, 2, 3]);
        },
        |connection| async move {
            let mut tasks = Vec::new();
            for seed in 0..STREAMS {
                let mut stream = connection.open_uni().await.unwrap();
                tasks.push(glommio::spawn_local(async move {
                    stream.write_all(&seed.to_le_bytes()).await.unwrap();
                    let data = Bytes::from(pattern(seed, EACH));
                    let mut chunks: Vec<Bytes> =
                        (0..EACH).step_by(100_000).map(|at| data.slice(at..EACH.min(at + 100_000))).collect();
                    stream.write_chunks(&mut chunks).await.unwrap();
                    stream.finish().unwrap();
                    stream.acknowledged().await.unwrap();
                }));
            }
            for task in tasks {
                task.await;
            }
            connection.stats()
        },
    );
    assert!(stats.bytes_sent > 64 << 20);
    // Loopback carries 64 KiB datagrams; discovery must have found that out on the way.
    assert!(stats.mtu > 60_000, "{stats:?}");
}

#[test]
fn both_directions_and_an_early_end() {
    connected(
        TransportOptions::default(),
        |connection| async move {
            let (mut send, mut recv) = connection.accept_bi().await.unwrap();
            let question = read_all(&mut recv).await.unwrap();
            send.write_all(&question).await.unwrap();
            send.finish().unwrap();
            send.acknowledged().await.unwrap();
        },
        |connection| async move {
            let (mut send, mut recv) = connection.open_bi().await.unwrap();
            send.write_all(b"ping").await.unwrap();
            send.finish().unwrap();
            assert!(matches!(send.write_all(b"more").await, Err(QuicError::Closed)));
            let mut answer = [0; 3];
            recv.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"pin");
            assert!(matches!(recv.read_exact(&mut [0; 5]).await, Err(QuicError::Ended { missing: 4 })));
            assert!(recv.read_chunk(1).await.unwrap().is_none());
        },
    );
}

#[test]
fn a_sender_waits_for_a_receiver_that_does_not_read() {
    const STREAM: u32 = 128 << 10;
    const SEND: u32 = 512 << 10;
    const TOTAL: u64 = 8 << 20;
    let options = TransportOptions {
        // Twice the stream's, so that one stream that is not read leaves credit for the others.
        receive_window_bytes: 2 * STREAM,
        stream_window_bytes: STREAM,
        send_window_bytes: SEND,
        ..Default::default()
    };
    connected(
        options,
        |connection| async move {
            let mut stream = connection.accept_uni().await.unwrap();
            // The sender tells when it has come to a halt.
            let mut halted = connection.accept_uni().await.unwrap();
            assert_eq!(read_all(&mut halted).await.unwrap(), b"halted");
            assert_eq!(read_all(&mut stream).await.unwrap().len() as u64, TOTAL);
        },
        |connection| async move {
            let mut stream = connection.open_uni().await.unwrap();
            let mut signal = connection.open_uni().await.unwrap();
            let written = Rc::new(Cell::new(0_u64));
            let progress = written.clone();
            let writer = glommio::spawn_local(async move {
                let piece = Bytes::from(pattern(7, 16 << 10));
                while progress.get() < TOTAL {
                    stream.write_chunk(piece.clone()).await.unwrap();
                    progress.set(progress.get() + piece.len() as u64);
                }
                stream.finish().unwrap();
                stream.acknowledged().await.unwrap();
            });
            // Halted means: no progress for a while that is long against a loopback round trip.
            let mut last = u64::MAX;
            while written.get() != last || last == 0 {
                last = written.get();
                glommio::timer::sleep(Duration::from_millis(100)).await;
            }
            assert!(last <= u64::from(STREAM + SEND), "{last} bytes are buffered somewhere");
            signal.write_all(b"halted").await.unwrap();
            signal.finish().unwrap();
            writer.await;
        },
    );
}

#[test]
fn reset_and_stop_carry_their_codes_and_a_dropped_sender_is_a_reset() {
    connected(
        TransportOptions::default(),
        |connection| async move {
            let mut reset = connection.accept_uni().await.unwrap();
            assert_eq!(reset.read_chunk(1).await.unwrap().unwrap().as_ref(), b"a");
            assert!(matches!(read_all(&mut reset).await, Err(QuicError::Reset(77))));
            assert!(matches!(reset.read_chunk(1).await, Err(QuicError::Reset(77))));

            let mut dropped = connection.accept_uni().await.unwrap();
            assert!(matches!(read_all(&mut dropped).await, Err(QuicError::Reset(0))));

            let mut stopped = connection.accept_uni().await.unwrap();
            stopped.stop(88);
            assert!(matches!(stopped.read_chunk(1).await, Err(QuicError::Closed)));
            let mut done = connection.accept_uni().await.unwrap();
            assert_eq!(read_all(&mut done).await.unwrap(), b"done");
        },
        |connection| async move {
            let mut reset = connection.open_uni().await.unwrap();
            reset.write_all(b"a").await.unwrap();
            // Give the byte time to be read: a reset may overtake what was sent before it.
            glommio::timer::sleep(Duration::from_millis(50)).await;
            reset.reset(77);
            assert!(matches!(reset.write_all(b"b").await, Err(QuicError::Closed)));

            let mut dropped = connection.open_uni().await.unwrap();
            dropped.write_all(&[1; 100]).await.unwrap();
            drop(dropped);

            let mut stopped = connection.open_uni().await.unwrap();
            let piece = Bytes::from(vec![0; 64 << 10]);
            let error = loop {
                if let Err(error) = stopped.write_chunk(piece.clone()).await {
                    break error;
                }
            };
            assert!(matches!(error, QuicError::Stopped(88)), "{error:?}");
            let mut done = connection.open_uni().await.unwrap();
            done.write_all(b"done").await.unwrap();
            done.finish().unwrap();
            done.acknowledged().await.unwrap();
        },
    );
}

#[test]
fn opening_waits_for_the_peers_limit_of_streams() {
    let options = TransportOptions { uni_streams_max: 2, ..Default::default() };
    connected(
        options,
        |connection| async move {
            for expected in 0..10_u8 {
                let mut stream = connection.accept_uni().await.unwrap();
                assert_eq!(read_all(&mut stream).await.unwrap(), [expected]);
            }
        },
        |connection| async move {
            for number in 0..10_u8 {
                let mut stream = connection.open_uni().await.unwrap();
                stream.write_all(&[number]).await.unwrap();
                stream.finish().unwrap();
                if number == 9 {
                    stream.acknowledged().await.unwrap();
                }
            }
        },
    );
}
