//! Streams stay streams: half-close, resets, bulk both ways, stalled readers.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use common::*;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};
use weft_transport::*;

async fn read_all(socket: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut got = Vec::new();
    socket.read_to_end(&mut got).await.map(|_| got)
}

#[test]
fn half_close_in_either_direction() {
    run(async {
        let (near, far, app) = pair(Limits::default()).await;
        // The client is done first, the server answers after that.
        let mut client = TcpStream::connect(near.address).await.unwrap();
        let (mut server, _) = app.accept().await.unwrap();
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(read_all(&mut server).await.unwrap(), b"question");
        sleep(Duration::from_millis(20)).await;
        server.write_all(b"late answer").await.unwrap();
        assert!(near.relays.borrow().is_empty() && far.relays.borrow().is_empty());
        drop(server);
        assert_eq!(read_all(&mut client).await.unwrap(), b"late answer");

        // The server speaks first and is done, the client goes on.
        let mut client = TcpStream::connect(near.address).await.unwrap();
        let (mut server, _) = app.accept().await.unwrap();
        server.write_all(b"banner").await.unwrap();
        server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut client).await.unwrap(), b"banner");
        client.write_all(b"still here").await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(read_all(&mut server).await.unwrap(), b"still here");
        until(|| near.relays.borrow().len() == 2 && far.relays.borrow().len() == 2).await;
        assert_eq!(*near.relays.borrow(), ["ok", "ok"]);
        assert_eq!(*far.relays.borrow(), ["ok", "ok"]);
        assert_eq!(near.counters.borrow()[1].sent(), 10);
        assert_eq!(near.counters.borrow()[1].received(), 6);
        assert_eq!(far.counters.borrow()[1].sent(), 6);
    });
}

fn is_reset(result: std::io::Result<Vec<u8>>) -> bool {
    result.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset)
}

/// A reset must arrive as one whatever the other direction is doing.
#[test]
fn resets_in_either_direction() {
    run(async {
        for server_resets in [false, true] {
            for half_closed in [None, Some(false), Some(true)] {
                let (near, far, app) = pair(Limits::default()).await;
                let client = TcpStream::connect(near.address).await.unwrap();
                let (server, _) = app.accept().await.unwrap();
                let (mut resets, mut other) = if server_resets { (server, client) } else { (client, server) };
                other.write_all(b"x").await.unwrap();
                assert_eq!(resets.read_u8().await.unwrap(), b'x');
                match half_closed {
                    None => {}
                    Some(false) => {
                        resets.shutdown().await.unwrap();
                        assert_eq!(other.read(&mut [0; 1]).await.unwrap(), 0);
                    }
                    Some(true) => {
                        other.shutdown().await.unwrap();
                        assert_eq!(resets.read(&mut [0; 1]).await.unwrap(), 0);
                    }
                }
                sleep(Duration::from_millis(10)).await;
                SockReset::reset(&resets);
                drop(resets);
                let (from, to) = if server_resets {
                    (far.relay_ended().await, near.relay_ended().await)
                } else {
                    (near.relay_ended().await, far.relay_ended().await)
                };
                assert_eq!(from, "application_reset", "server {server_resets}, half-closed {half_closed:?}");
                assert_eq!(to, "reset_by_peer");
                if half_closed == Some(false) {
                    // Its reading has ended in order already; the reset shows on writing.
                    let failed = async {
                        while other.write_all(b"y").await.is_ok() {
                            sleep(Duration::from_millis(1)).await;
                        }
                    };
                    timeout(Duration::from_secs(2), failed).await.expect("no reset");
                } else {
                    assert!(is_reset(read_all(&mut other).await));
                }
            }
        }
    });
}

/// A reset is passed on though the relay cannot read any more, because the far side does not take what was sent.
#[test]
fn a_reset_behind_a_stall_is_noticed() {
    run(async {
        let limits = Limits { stream_window: 64 << 10, ..Limits::default() };
        let (near, far, app) = pair(limits).await;
        let client = TcpStream::connect(near.address).await.unwrap();
        let (_server, _) = app.accept().await.unwrap();
        let chunk = vec![1; 1 << 20];
        // Fill everything up to the client's own socket.
        loop {
            client.writable().await.unwrap();
            if client.try_write(&chunk).is_err()
                && timeout(Duration::from_millis(200), client.writable()).await.is_err()
            {
                break;
            }
        }
        SockReset::reset(&client);
        drop(client);
        assert_eq!(near.relay_ended().await, "application_reset");
        assert_eq!(far.relay_ended().await, "reset_by_peer");
    });
}

/// As when an agent is killed: neither application may believe that the other has finished.
#[test]
fn an_agent_that_drops_its_relay_resets_the_application() {
    run(async {
        let ca = Ca::new();
        let far = Far::start(ca.identity(SERVER), Limits::default()).await;
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mine = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(mine.local_addr().unwrap()).await.unwrap();
        let (accepted, _) = mine.accept().await.unwrap();
        let (to, authority) = (far.address, app.local_addr().unwrap());
        let pool = Pool::new(Limits::default());
        let opened = pool.open(key(to), &ca.identity(CLIENT), request(authority), dial(to)).await.unwrap();
        let task =
            spawn_local(async move { relay(accepted, opened.stream, &Counters::default()).await.is_ok() });
        let (mut server, _) = app.accept().await.unwrap();
        client.write_all(b"a").await.unwrap();
        assert_eq!(server.read_u8().await.unwrap(), b'a');
        task.abort();
        assert!(is_reset(read_all(&mut client).await));
        assert!(is_reset(read_all(&mut server).await));
        assert_eq!(far.relay_ended().await, "reset_by_peer");
    });
}

/// Bytes that depend on their position and on `seed`.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut x = seed | 1;
    let mut out = Vec::with_capacity(length + 8);
    while out.len() < length {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend_from_slice(&x.to_le_bytes());
    }
    out.truncate(length);
    out
}

async fn both_ways(client: TcpStream, server: TcpStream, total: usize) {
    let (a, b) = (pattern(1, total), pattern(2, total));
    let (mut cr, mut cw) = client.into_split();
    let (mut sr, mut sw) = server.into_split();
    let (mut got_b, mut got_a) = (Vec::with_capacity(total), Vec::with_capacity(total));
    tokio::try_join!(
        async {
            cw.write_all(&a).await?;
            cw.shutdown().await
        },
        async {
            sw.write_all(&b).await?;
            sw.shutdown().await
        },
        async { cr.read_to_end(&mut got_b).await.map(drop) },
        async { sr.read_to_end(&mut got_a).await.map(drop) },
    )
    .unwrap();
    assert!(got_a == a && got_b == b, "bytes were lost or changed");
}

#[test]
fn bulk_both_ways_at_once() {
    run(async {
        let (near, far, app) = pair(Limits::default()).await;
        let client = TcpStream::connect(near.address).await.unwrap();
        let (server, _) = app.accept().await.unwrap();
        both_ways(client, server, 64 << 20).await;
        assert_eq!(near.relay_ended().await, "ok");
        assert_eq!(far.relay_ended().await, "ok");
        assert_eq!(near.counters.borrow()[0].sent(), 64 << 20);
        assert_eq!(near.counters.borrow()[0].received(), 64 << 20);
    });
}

#[test]
fn plain_relay_carries_bulk_half_close_and_resets() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connection = || async {
            let out = TcpStream::connect(address).await.unwrap();
            (out, listener.accept().await.unwrap().0)
        };
        let counters: &'static Counters = Box::leak(Box::default());
        let ((client, a), (b, server)) = (connection().await, connection().await);
        let task = spawn_local(relay_plain(a, b, counters));
        both_ways(client, server, 8 << 20).await;
        task.await.unwrap().unwrap();
        assert_eq!((counters.sent(), counters.received()), (8 << 20, 8 << 20));

        for server_resets in [false, true] {
            let ((mut client, a), (b, mut server)) = (connection().await, connection().await);
            let task = spawn_local(relay_plain(a, b, counters));
            client.shutdown().await.unwrap();
            assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
            server.write_all(b"z").await.unwrap();
            assert_eq!(client.read_u8().await.unwrap(), b'z');
            let (resets, mut other) = if server_resets { (server, client) } else { (client, server) };
            SockReset::reset(&resets);
            drop(resets);
            let reason = task.await.unwrap().unwrap_err().reason();
            assert_eq!(reason, if server_resets { "other_reset" } else { "application_reset" });
            if server_resets {
                assert!(is_reset(read_all(&mut other).await));
            }
        }
    });
}

#[test]
fn a_stalled_stream_is_bounded_and_starves_nobody() {
    run(async {
        let limits = Limits { stream_window: 256 << 10, ..Limits::default() };
        let (near, far, app) = pair(limits.clone()).await;
        // More stalled streams than one stream's window times four, which is where others run dry.
        let mut stalled = Vec::new();
        let much: &'static [u8] = vec![7; 16 << 20].leak();
        for _ in 0..40 {
            let client = TcpStream::connect(near.address).await.unwrap();
            let (server, _) = app.accept().await.unwrap();
            // Keep the kernel's share out of the sum.
            socket2::SockRef::from(&server).set_recv_buffer_size(128 << 10).unwrap();
            let (reader, mut writer) = client.into_split();
            spawn_local(async move { writer.write_all(much).await });
            stalled.push((reader, server));
        }
        sleep(Duration::from_millis(500)).await;
        let client = TcpStream::connect(near.address).await.unwrap();
        let (server, _) = app.accept().await.unwrap();
        timeout(Duration::from_secs(20), both_ways(client, server, 4 << 20)).await.expect("starved");
        assert_eq!(near.pool.len(), 1, "all of them share a tunnel");
        for (near, far) in near.counters.borrow().iter().zip(far.counters.borrow().iter()).take(40) {
            let held = near.sent() - far.received();
            assert!(held <= u64::from(limits.stream_window) + (256 << 10), "{held} bytes in the agents");
            assert!(held >= u64::from(limits.stream_window) / 2, "it does stall ({held})");
        }
        // And they go on when somebody reads.
        let (_, server) = &mut stalled[0];
        let mut left = 8 << 20;
        let mut buffer = vec![0; 1 << 16];
        while left > 0 {
            let n = server.read(&mut buffer).await.unwrap();
            assert!(n > 0 && buffer[..n].iter().all(|b| *b == 7));
            left -= n.min(left);
        }
    });
}

/// Many tiny frames to a reader that does not read: h2 ends connections that make it keep too many of them.
#[test]
fn tiny_writes_to_a_stalled_reader_do_not_cost_the_tunnel() {
    run(async {
        // h2 lets a peer have half of the connection's window in bookkeeping.
        let limits = Limits { stream_window: 6 << 20, max_concurrent_streams: 1, ..Limits::default() };
        let (near, far, app) = pair(limits).await;
        let mut client = TcpStream::connect(near.address).await.unwrap();
        client.set_nodelay(true).unwrap();
        let (mut server, _) = app.accept().await.unwrap();
        // More than the kernel takes for a server that does not read.
        let mut sent: usize = 5 << 20;
        client.write_all(&vec![9; sent]).await.unwrap();
        until(|| near.counters.borrow()[0].sent() == sent as u64).await;
        sleep(Duration::from_millis(50)).await;
        assert!(far.counters.borrow()[0].received() < sent as u64, "it stalls");
        for _ in 0..40_000 {
            client.write_all(&[9; 8]).await.unwrap();
            sent += 8;
            // Lets the relay read it alone.
            tokio::task::yield_now().await;
        }
        let mut got = 0;
        let mut buffer = vec![0; 1 << 16];
        while got < sent {
            let n = timeout(Duration::from_secs(5), server.read(&mut buffer)).await.expect("stuck").unwrap();
            assert!(n > 0, "the tunnel ended after {got} of {sent}");
            got += n;
        }
        assert_eq!(near.pool.len(), 1);
    });
}
