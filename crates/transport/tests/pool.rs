//! The pool of tunnels: how many, when they are shared, and when they go.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use common::*;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_local;
use tokio::time::sleep;
use weft_transport::*;

#[test]
fn three_hundred_streams_at_once_need_three_tunnels() {
    run(async {
        let (near, far, app) = pair(Limits::default()).await;
        spawn_local(async move {
            while let Ok((mut socket, _)) = app.accept().await {
                spawn_local(async move {
                    let (mut r, mut w) = socket.split();
                    tokio::io::copy(&mut r, &mut w).await
                });
            }
        });
        let clients: Vec<_> = (0..300_u32)
            .map(|n| {
                let to = near.address;
                spawn_local(async move {
                    let mut socket = TcpStream::connect(to).await.unwrap();
                    socket.write_u32(n).await.unwrap();
                    assert_eq!(socket.read_u32().await.unwrap(), n);
                    socket
                })
            })
            .collect();
        let mut open = Vec::new();
        for client in clients {
            open.push(client.await.unwrap());
        }
        assert_eq!(near.pool.len(), 3);
        assert_eq!(*far.accepted.borrow(), 3, "handshakes are shared by all who wait");
        drop(open);
        until(|| near.relays.borrow().len() == 300).await;
        // What is there is used again.
        let mut again = TcpStream::connect(near.address).await.unwrap();
        again.write_u32(7).await.unwrap();
        assert_eq!(again.read_u32().await.unwrap(), 7);
        assert_eq!(*far.accepted.borrow(), 3);
    });
}

#[test]
fn a_peer_that_allows_fewer_streams_gets_more_tunnels() {
    run(async {
        let ca = Ca::new();
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to_app = app.local_addr().unwrap();
        let far =
            Far::start(ca.identity(SERVER), Limits { max_concurrent_streams: 10, ..Limits::default() }).await;
        let near = Near::start(ca.identity(CLIENT), Limits::default(), far.address, to_app).await;
        let mut open = Vec::new();
        for _ in 0..35 {
            let mut client = TcpStream::connect(near.address).await.unwrap();
            let (mut server, _) = app.accept().await.unwrap();
            server.write_u8(1).await.unwrap();
            client.read_u8().await.unwrap();
            open.push((client, server));
        }
        assert_eq!(near.pool.len(), 4);
    });
}

#[test]
fn drain_moves_new_streams_away_and_lets_open_ones_finish() {
    run(async {
        let (near, far, app) = pair(Limits::default()).await;
        let mut client = TcpStream::connect(near.address).await.unwrap();
        let (mut server, _) = app.accept().await.unwrap();
        client.write_u8(1).await.unwrap();
        assert_eq!(server.read_u8().await.unwrap(), 1);

        far.drain.send(true).unwrap();
        sleep(Duration::from_millis(50)).await;
        assert!(far.ended.borrow().is_empty(), "an open stream keeps it");
        far.drain.send(false).unwrap();
        let mut second = TcpStream::connect(near.address).await.unwrap();
        let (mut second_server, _) = app.accept().await.unwrap();
        second.write_u8(2).await.unwrap();
        assert_eq!(second_server.read_u8().await.unwrap(), 2);
        assert_eq!(*far.accepted.borrow(), 2, "the drained tunnel takes no new stream");
        assert_eq!(near.pool.len(), 1);

        client.write_u8(3).await.unwrap();
        assert_eq!(server.read_u8().await.unwrap(), 3);
        drop((client, server));
        assert_eq!(far.ended().await, "ok");
    });
}

/// Requests that cross a GOAWAY on the wire are tried again elsewhere.
#[test]
fn connects_during_a_drain_do_not_fail() {
    run(async {
        let (near, far, app) = pair(Limits::default()).await;
        spawn_local(async move {
            let mut keep = Vec::new();
            while let Ok((mut socket, _)) = app.accept().await {
                socket.write_u8(1).await.unwrap();
                keep.push(socket);
            }
        });
        for round in 0..20_u64 {
            let clients: Vec<_> = (0..10)
                .map(|_| {
                    let to = near.address;
                    spawn_local(async move { TcpStream::connect(to).await.unwrap().read_u8().await })
                })
                .collect();
            sleep(Duration::from_micros(100 * round)).await;
            far.drain.send(true).unwrap();
            sleep(Duration::from_millis(1)).await;
            far.drain.send(false).unwrap();
            for client in clients {
                assert_eq!(client.await.unwrap().unwrap(), 1, "round {round}");
            }
        }
    });
}

#[test]
fn idle_tunnels_close() {
    run(async {
        let limits = Limits { tunnel_idle: Duration::from_millis(200), ..Limits::default() };
        let (near, far, app) = pair(limits).await;
        let client = TcpStream::connect(near.address).await.unwrap();
        let (server, _) = app.accept().await.unwrap();
        sleep(Duration::from_millis(500)).await;
        assert_eq!(near.pool.len(), 1, "a tunnel with a quiet stream is not idle");
        drop((client, server));
        assert_eq!(far.ended().await, "ok");
        assert!(near.pool.is_empty());
        let _again = TcpStream::connect(near.address).await.unwrap();
        app.accept().await.unwrap();
        assert_eq!(*far.accepted.borrow(), 2);
    });
}

#[test]
fn retired_tunnels_serve_their_streams_only() {
    run(async {
        let ca = Ca::new();
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let authority = app.local_addr().unwrap();
        let far = Far::start(ca.identity(SERVER), Limits::default()).await;
        let to = far.address;
        let pool = Pool::new(Limits::default());
        let (old, new) = (ca.identity(CLIENT), ca.identity(CLIENT));
        let open = |tls: std::sync::Arc<TlsIdentity>| {
            let pool = pool.clone();
            async move { pool.open(key(to), &tls, request(authority), dial(to)).await.unwrap().stream }
        };
        let mut first = open(old.clone()).await;
        let (mut server, _) = app.accept().await.unwrap();
        let _second = open(new.clone()).await;
        assert_eq!((pool.len(), *far.accepted.borrow()), (2, 2), "a renewed certificate has its own tunnels");

        pool.retire_identity(&old);
        assert_eq!(pool.len(), 1);
        first.send("hello"[..].into()).await.unwrap();
        let mut got = [0; 5];
        server.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"hello");
        drop(first);
        assert_eq!(far.ended().await, "ok");

        pool.retire(1);
        assert_eq!(pool.len(), 0);
        let _third = open(new).await;
        assert_eq!(*far.accepted.borrow(), 3);
    });
}

#[test]
fn a_failed_handshake_fails_everyone_who_waits_once() {
    run(async {
        let (ours, other) = (Ca::new(), Ca::new());
        let far = Far::start(other.identity(SERVER), Limits::default()).await;
        let (to, tls) = (far.address, ours.identity(CLIENT));
        let pool = Pool::new(Limits::default());
        let dials = Rc::new(Cell::new(0));
        let waiters: Vec<_> = (0..50)
            .map(|_| {
                let (pool, tls, dials) = (pool.clone(), tls.clone(), dials.clone());
                spawn_local(async move {
                    let dial = || {
                        dials.set(dials.get() + 1);
                        dial(to)()
                    };
                    pool.open(key(to), &tls, request(to), dial).await.unwrap_err().reason()
                })
            })
            .collect();
        for waiter in waiters {
            assert_eq!(waiter.await.unwrap(), "unknown_issuer");
        }
        assert_eq!(dials.get(), 1);
    });
}

#[test]
fn dialling_fails_with_its_reason() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let tls = Ca::new().identity(CLIENT);
        let limits = Limits { handshake_timeout: Duration::from_millis(50), ..Limits::default() };
        let pool = Pool::new(limits);
        let silent = pool.open(key(to), &tls, request(to), dial(to)).await.unwrap_err();
        assert_eq!(silent.reason(), "timeout", "{silent}");
        drop(listener);
        let refused = pool.open(key(to), &tls, request(to), dial(to)).await.unwrap_err();
        assert_eq!(refused.reason(), "dial", "{refused}");
        let broken = || Err(std::io::ErrorKind::PermissionDenied.into());
        assert_eq!(pool.open(key(to), &tls, request(to), broken).await.unwrap_err().reason(), "dial");
    });
}

/// One caller that gives up does not take the handshake away from the others.
#[test]
fn a_caller_that_goes_away_harms_nobody() {
    run(async {
        let ca = Ca::new();
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let authority = app.local_addr().unwrap();
        let far = Far::start(ca.identity(SERVER), Limits::default()).await;
        let (to, tls, pool) = (far.address, ca.identity(CLIENT), Pool::new(Limits::default()));
        let open = || {
            let (pool, tls) = (pool.clone(), tls.clone());
            spawn_local(async move { pool.open(key(to), &tls, request(authority), dial(to)).await.is_ok() })
        };
        let (first, second) = (open(), open());
        tokio::task::yield_now().await;
        first.abort();
        assert!(second.await.unwrap());
        assert_eq!(*far.accepted.borrow(), 1);
    });
}

#[test]
fn a_refused_connect_says_status_and_reason() {
    run(async {
        let ca = Ca::new();
        let far = Far::start(ca.identity(SERVER), Limits::default()).await;
        let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let pool = Pool::new(Limits::default());
        let to = far.address;
        match pool.open(key(to), &ca.identity(CLIENT), request(nobody), dial(to)).await {
            Err(OpenError::Refused { status: 503, reason: Some(reason) }) => {
                assert!(reason.contains("refused"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(pool.len(), 1, "the tunnel is fine");
    });
}

/// A certificate of two seconds, so that it expires while its tunnel is in use.
fn short(uri: &'static str) -> Leaf {
    Leaf { valid: (-60, 2), ..Leaf::of(uri) }
}

#[test]
fn a_tunnel_takes_no_stream_when_its_certificate_has_expired() {
    for (of_client, of_server) in [(short(CLIENT), Leaf::of(SERVER)), (Leaf::of(CLIENT), short(SERVER))] {
        run(async move {
            let ca = Ca::new();
            let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let to_app = app.local_addr().unwrap();
            let far = Far::start(ca.identity_of(&of_server, &[]), Limits::default()).await;
            let client = ca.identity_of(&of_client, &[]);
            let near = Near::start(client, Limits::default(), far.address, to_app).await;
            let mut open = TcpStream::connect(near.address).await.unwrap();
            let (mut server, _) = app.accept().await.unwrap();
            server.write_u8(1).await.unwrap();
            assert_eq!(open.read_u8().await.unwrap(), 1);
            sleep(Duration::from_secs(3)).await;
            // Another needs a handshake, in which the certificate is seen to have expired.
            let mut late = TcpStream::connect(near.address).await.unwrap();
            assert!(late.read_u8().await.is_err());
            let reason = near.relay_ended().await;
            assert!(["certificate_expired", "refused_by_peer"].contains(&reason), "{reason}");
            // What was open before lives on.
            server.write_u8(2).await.unwrap();
            assert_eq!(open.read_u8().await.unwrap(), 2);
        });
    }
}

/// A caller that goes on with its tunnel is not served: here one without our pool.
#[test]
fn a_caller_whose_certificate_has_expired_is_told_to_come_anew() {
    run(async {
        let ca = Ca::new();
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let far = Far::start(ca.identity(SERVER), Limits::default()).await;
        let mut raw = Raw::connect(&far, ca.leaf(&short(CLIENT)), app.local_addr().unwrap()).await;
        let _stream = raw.ask().await.unwrap();
        sleep(Duration::from_secs(3)).await;
        assert!(raw.ask().await.is_err());
    });
}

/// A caller without our pool.
struct Raw {
    requests: h2::client::SendRequest<bytes::Bytes>,
    app: SocketAddr,
}

impl Raw {
    async fn connect(
        far: &Far,
        (chain, key): (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>),
        app: SocketAddr,
    ) -> Raw {
        let tcp = TcpStream::connect(far.address).await.unwrap();
        let connector = raw_client(Some((chain, key)), &["h2"], TLS13);
        let tls = connector.connect("server.example".try_into().unwrap(), tcp).await.unwrap();
        let (requests, connection) = h2::client::handshake(tls).await.unwrap();
        spawn_local(async move { drop(connection.await) });
        Raw { requests, app }
    }

    /// A stream that is served; an error whether the GOAWAY has been read or not.
    async fn ask(&mut self) -> Result<h2::SendStream<bytes::Bytes>, h2::Error> {
        let request = http::Request::builder().method("CONNECT").uri(self.app.to_string()).body(()).unwrap();
        let (answer, stream) = self.requests.send_request(request, false)?;
        assert_eq!(answer.await?.status(), 200);
        Ok(stream)
    }
}

/// A mesh changes its root: both are believed, then certificates change, then one root is let go. Whichever end is told
/// first, what is open lives on, and what was proven by the old root serves nothing new.
#[test]
fn roots_rotate_under_an_open_stream() {
    for server_first in [true, false] {
        run(async move {
            let (old, new) = (Ca::new(), Ca::new());
            let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let to_app = app.local_addr().unwrap();
            let (both, only) = (old.roots(&[&new]), new.roots(&[]));
            let far =
                Far::start(Arc::new(old.identity(SERVER).with_roots(&both).unwrap()), Limits::default())
                    .await;
            let client = Arc::new(old.identity(CLIENT).with_roots(&both).unwrap());
            let near = Near::start(client, Limits::default(), far.address, to_app).await;
            let mut open = TcpStream::connect(near.address).await.unwrap();
            let (mut server, _) = app.accept().await.unwrap();
            server.write_u8(1).await.unwrap();
            assert_eq!(open.read_u8().await.unwrap(), 1);

            let renewed = |uri| Arc::new(new.identity(uri).with_roots(&both).unwrap());
            let (at_server, at_client) = (renewed(SERVER), renewed(CLIENT));
            assert!(only.issued(at_client.chain()) && !only.issued(old.identity(CLIENT).chain()));
            let over = Leaf { valid: (-60, -30), ..Leaf::of(CLIENT) };
            assert!(only.issued(&new.leaf(&over).0) && !only.issued(&old.leaf(&over).0));
            match server_first {
                true => far.identity.replace(at_server.clone()),
                false => near.identity.replace(at_client.clone()),
            };
            let mut half = TcpStream::connect(near.address).await.unwrap();
            let (mut half_server, _) = app.accept().await.unwrap();
            far.identity.replace(at_server);
            near.identity.replace(at_client);

            both.retire();
            let fresh = |uri| Arc::new(new.identity(uri).with_roots(&only).unwrap());
            far.identity.replace(fresh(SERVER));
            near.identity.replace(fresh(CLIENT));
            let mut last = TcpStream::connect(near.address).await.unwrap();
            let (mut last_server, _) = app.accept().await.unwrap();
            for (value, (near, far)) in
                [(&mut open, &mut server), (&mut half, &mut half_server), (&mut last, &mut last_server)]
                    .into_iter()
                    .enumerate()
            {
                far.write_u8(value as u8).await.unwrap();
                assert_eq!(near.read_u8().await.unwrap(), value as u8);
            }
            // Whoever still shows what the old root issued is nobody.
            near.identity.replace(old.identity_of(&Leaf::of(CLIENT), &[&new]));
            let mut stranger = TcpStream::connect(near.address).await.unwrap();
            assert!(stranger.read_u8().await.is_err());
            assert_eq!(near.relay_ended().await, "refused_by_peer");
        });
    }
}

/// A tunnel by roots that are retired takes no stream, though its certificates are good: the peer might be an impostor who
/// has the old root's key and came in time.
#[test]
fn a_tunnel_by_retired_roots_takes_no_stream() {
    run(async {
        let ca = Ca::new();
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let roots = ca.roots(&[]);
        let far =
            Far::start(Arc::new(ca.identity(SERVER).with_roots(&roots).unwrap()), Limits::default()).await;
        let mut raw = Raw::connect(&far, ca.leaf(&Leaf::of(CLIENT)), app.local_addr().unwrap()).await;
        let _stream = raw.ask().await.unwrap();
        roots.retire();
        assert!(raw.ask().await.is_err());
    });
}

/// Whoever had taken its identity up before that is told to take the new one.
#[test]
fn an_identity_of_retired_roots_opens_nothing() {
    run(async {
        let ca = Ca::new();
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let far = Far::start(ca.identity(SERVER), Limits::default()).await;
        let client = ca.identity(CLIENT);
        let near =
            Near::start(client.clone(), Limits::default(), far.address, app.local_addr().unwrap()).await;
        client.roots().retire();
        let mut late = TcpStream::connect(near.address).await.unwrap();
        assert!(late.read_u8().await.is_err());
        assert_eq!(near.relay_ended().await, "closed");
        assert!(client.roots().are_retired());
    });
}
