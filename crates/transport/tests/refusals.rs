//! Who is refused, by which side, and with which reason.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use common::*;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_local;
use tokio_rustls::TlsAcceptor;
use weft_transport::*;

fn name() -> rustls::pki_types::ServerName<'static> {
    "server.example".try_into().unwrap()
}

const OTHER_DOMAIN: &str = "spiffe://elsewhere.example/ns/shop/sa/client";

#[test]
fn a_server_refuses_callers() {
    run(async {
        let (ours, other) = (Ca::new(), Ca::new());
        let good = Leaf::of(CLIENT);
        let expired = Leaf { valid: (-3600, -60), ..good.clone() };
        let early = Leaf { valid: (1800, 3600), ..good.clone() };
        let two = Leaf { uris: vec![CLIENT, SERVER], ..good.clone() };
        let none = Leaf { uris: vec![], ..good.clone() };
        let odd = Leaf::of("spiffe://cluster.local/some/thing");
        let foreign = Leaf::of(OTHER_DOMAIN);
        let h2: &[&str] = &["h2"];
        let of = |ca: &Ca, leaf| Some(ca.leaf(leaf));
        for (expected, certificate, alpn, versions) in [
            ("certificate_expired", of(&ours, &expired), h2, TLS13),
            ("certificate_not_yet_valid", of(&ours, &early), h2, TLS13),
            ("many_sans", of(&ours, &two), h2, TLS13),
            ("no_san", of(&ours, &none), h2, TLS13),
            ("not_spiffe", of(&ours, &odd), h2, TLS13),
            ("trust_domain", of(&ours, &foreign), h2, TLS13),
            ("unknown_issuer", of(&other, &good), h2, TLS13),
            ("no_certificate", None, h2, TLS13),
            ("tls_version", of(&ours, &good), h2, TLS12),
            ("alpn", of(&ours, &good), &["http/1.1"], TLS13),
            ("alpn", of(&ours, &good), &[], TLS13),
            // The table can pass, too: this one ends only because the caller hangs up.
            ("closed", of(&ours, &good), h2, TLS13),
        ] {
            let far = Far::start(ours.identity(SERVER), Limits::default()).await;
            let tcp = TcpStream::connect(far.address).await.unwrap();
            if let Ok(mut tls) = raw_client(certificate, alpn, versions).connect(name(), tcp).await {
                if expected == "closed" {
                    // The server's SETTINGS: it let us in.
                    assert!(tls.read(&mut [0; 9]).await.unwrap() > 0);
                } else {
                    let mut rest = Vec::new();
                    let _ = tls.read_to_end(&mut rest).await;
                    assert!(rest.is_empty(), "{expected}: the server went on");
                }
            }
            let ended = far.ended().await;
            if expected == "closed" {
                assert!(["http2", "ok"].contains(&ended), "{ended}");
            } else {
                assert_eq!(ended, expected);
            }
        }
    });
}

#[test]
fn a_client_refuses_servers_before_it_sends_anything() {
    run(async {
        let (ours, other) = (Ca::new(), Ca::new());
        let good = Leaf::of(SERVER);
        let expired = Leaf { valid: (-3600, -60), ..good.clone() };
        let early = Leaf { valid: (1800, 3600), ..good.clone() };
        let two = Leaf { uris: vec![SERVER, CLIENT], ..good.clone() };
        let none = Leaf { uris: vec![], ..good.clone() };
        let odd = Leaf::of("https://cluster.local/ns/shop/sa/server");
        let wrong = Leaf::of("spiffe://cluster.local/ns/shop/sa/other");
        let foreign = Leaf::of("spiffe://elsewhere.example/ns/shop/sa/server");
        let h2: &[&str] = &["h2"];
        for (expected, certificate, alpn, versions) in [
            ("certificate_expired", ours.leaf(&expired), h2, TLS13),
            ("certificate_not_yet_valid", ours.leaf(&early), h2, TLS13),
            ("many_sans", ours.leaf(&two), h2, TLS13),
            ("no_san", ours.leaf(&none), h2, TLS13),
            ("not_spiffe", ours.leaf(&odd), h2, TLS13),
            ("wrong_identity", ours.leaf(&wrong), h2, TLS13),
            ("wrong_identity", ours.leaf(&foreign), h2, TLS13),
            ("unknown_issuer", other.leaf(&good), h2, TLS13),
            ("refused_by_peer", ours.leaf(&good), h2, TLS12),
            ("refused_by_peer", ours.leaf(&good), &["http/1.1"], TLS13),
            ("alpn", ours.leaf(&good), &[], TLS13),
            // And what passes every check gets the request, which nobody answers here.
            ("timeout", ours.leaf(&good), h2, TLS13),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let to = listener.local_addr().unwrap();
            let acceptor = TlsAcceptor::from(raw_server(certificate, alpn, versions));
            let server = spawn_local(async move {
                let (tcp, _) = listener.accept().await.unwrap();
                let mut got = Vec::new();
                if let Ok(mut tls) = acceptor.accept(tcp).await {
                    let _ = tls.read_to_end(&mut got).await;
                }
                got
            });
            let limits =
                Limits { response_timeout: std::time::Duration::from_millis(50), ..Limits::default() };
            let pool = Pool::new(limits);
            let error = pool.open(key(to), &ours.identity(CLIENT), request(to), dial(to)).await.unwrap_err();
            assert_eq!(error.reason(), expected, "{error}");
            drop(pool);
            assert_eq!(!server.await.unwrap().is_empty(), expected == "timeout", "{expected}");
        }
    });
}

#[test]
fn both_ends_say_why_when_the_server_refuses_after_the_client_is_done() {
    run(async {
        let (ours, other) = (Ca::new(), Ca::new());
        let far = Far::start(ours.identity(SERVER), Limits::default()).await;
        // The client trusts the server's root; the server does not trust the client's.
        let stranger = other.identity_of(&Leaf::of(CLIENT), &[&ours]);
        let pool = Pool::new(Limits::default());
        let to = far.address;
        let error = pool.open(key(to), &stranger, request(to), dial(to)).await.unwrap_err();
        assert_eq!(error.reason(), "refused_by_peer", "{error}");
        assert_eq!(far.ended().await, "unknown_issuer");
        assert_eq!(pool.len(), 0);
    });
}

#[test]
fn a_silent_caller_is_dropped_in_time() {
    run(async {
        let limits = Limits { handshake_timeout: std::time::Duration::from_millis(50), ..Limits::default() };
        let far = Far::start(Ca::new().identity(SERVER), limits).await;
        let _silent = TcpStream::connect(far.address).await.unwrap();
        assert_eq!(far.ended().await, "timeout");
    });
}

#[test]
fn a_certificate_that_is_not_ours_makes_no_identity() {
    let ca = Ca::new();
    let make = |leaf: &Leaf, of: &str| {
        let (chain, key) = ca.leaf(leaf);
        TlsIdentity::new(id(of), chain, key, &ca.roots(&[])).map(drop)
    };
    assert!(make(&Leaf::of(SERVER), SERVER).is_ok());
    assert!(matches!(make(&Leaf::of(SERVER), CLIENT), Err(TlsError::OtherIdentity { .. })));
    let two = Leaf { uris: vec![SERVER, CLIENT], valid: (0, 60) };
    assert!(matches!(make(&two, SERVER), Err(TlsError::Identity(PeerRefused::ManySans(2)))));
    let (chain, _) = ca.leaf(&Leaf::of(SERVER));
    let (_, key) = ca.leaf(&Leaf::of(SERVER));
    let mixed = TlsIdentity::new(id(SERVER), chain, key, &ca.roots(&[]));
    assert!(matches!(mixed, Err(TlsError::Key(_))));
    assert!(matches!(Roots::new([]), Err(TlsError::Roots(_))));
}
