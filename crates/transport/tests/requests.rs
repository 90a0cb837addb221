//! What a peer that proved itself may still send: requests by hand, frame by frame.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use common::*;
use rand::prelude::*;
use std::io::Write;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;
use weft_transport::Limits;

type Header<'a> = (&'a [u8], &'a [u8]);
type Headers<'a> = &'a [Header<'a>];

/// HPACK: each header a literal without indexing (RFC 7541, 6.2.2).
fn hpack(headers: Headers<'_>) -> Vec<u8> {
    fn string(out: &mut Vec<u8>, s: &[u8]) {
        if s.len() < 127 {
            out.push(s.len() as u8);
        } else {
            out.push(127);
            let mut rest = s.len() - 127;
            while rest >= 128 {
                out.push((rest % 128) as u8 | 128);
                rest /= 128;
            }
            out.push(rest as u8);
        }
        out.extend_from_slice(s);
    }
    let mut out = Vec::new();
    for (name, value) in headers {
        out.push(0);
        string(&mut out, name);
        string(&mut out, value);
    }
    out
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

/// HEADERS, and CONTINUATIONs where it is long.
fn headers_frames(stream: u32, headers: Headers<'_>) -> Vec<u8> {
    let block = hpack(headers);
    let mut chunks = block.chunks(16_000).peekable();
    let mut out = Vec::new();
    let mut kind = 1;
    while let Some(chunk) = chunks.next() {
        out.extend(frame(kind, if chunks.peek().is_none() { 4 } else { 0 }, stream, chunk));
        kind = 9;
    }
    out
}

#[derive(Debug, PartialEq)]
enum Answer {
    /// The first byte of the answer's headers: the status, from the static table.
    Headers(u8),
    Reset(u32),
    GoAway(u32),
    Closed,
}

const OK: u8 = 0x88;
const BAD_REQUEST: u8 = 0x8c;
const PROTOCOL_ERROR: u32 = 1;

struct Raw(TlsStream<TcpStream>);

impl Raw {
    async fn open(ca: &Ca, far: &Far) -> Self {
        let tcp = TcpStream::connect(far.address).await.unwrap();
        let connector = raw_client(Some(ca.leaf(&Leaf::of(CLIENT))), &["h2"], TLS13);
        let mut tls = connector.connect("server.example".try_into().unwrap(), tcp).await.unwrap();
        let mut hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        hello.extend(frame(4, 0, 0, &[]));
        tls.write_all(&hello).await.unwrap();
        Self(tls)
    }

    /// The next answer about `stream`.
    async fn answer(&mut self, stream: u32) -> Answer {
        loop {
            let mut head = [0; 9];
            if self.0.read_exact(&mut head).await.is_err() {
                return Answer::Closed;
            }
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let about = u32::from_be_bytes(head[5..9].try_into().unwrap());
            let mut payload = vec![0; length];
            if self.0.read_exact(&mut payload).await.is_err() {
                return Answer::Closed;
            }
            let number = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
            match head[3] {
                1 if about == stream => {
                    // A change of the table's size may come first.
                    let at = payload.iter().position(|b| b & 0xe0 != 0x20).unwrap();
                    return Answer::Headers(payload[at]);
                }
                3 if about == stream => return Answer::Reset(number(0)),
                7 => return Answer::GoAway(number(4)),
                _ => {}
            }
        }
    }
}

#[test]
fn malformed_requests_get_their_answer_and_harm_nobody() {
    run(async {
        let ca = Ca::new();
        let far = Far::start(ca.identity(SERVER), Limits::default()).await;
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = app.local_addr().unwrap().to_string();
        let good = good.as_bytes();
        let mapped = format!("[::ffff:127.0.0.1]:{}", app.local_addr().unwrap().port());
        let connect: (&[u8], &[u8]) = (b":method", b"CONNECT");
        let authority = |value| (&b":authority"[..], value);
        let huge = vec![b'x'; 60_000];
        let bad = Answer::Headers(BAD_REQUEST);
        // What HTTP/2 itself calls malformed is a stream error (RFC 9113, 8.1.1); h2 answers those.
        let malformed = || Answer::Reset(PROTOCOL_ERROR);
        let table: Vec<(&str, Vec<Header<'_>>, Answer)> = vec![
            ("good", vec![connect, authority(good)], Answer::Headers(OK)),
            ("mapped", vec![connect, authority(mapped.as_bytes())], Answer::Headers(OK)),
            ("host name", vec![connect, authority(b"web.shop.svc:80")], Answer::Headers(BAD_REQUEST)),
            ("no port", vec![connect, authority(b"127.0.0.1")], Answer::Headers(BAD_REQUEST)),
            ("port 0", vec![connect, authority(b"127.0.0.1:0")], Answer::Headers(BAD_REQUEST)),
            ("port too large", vec![connect, authority(b"127.0.0.1:99999")], Answer::Headers(BAD_REQUEST)),
            ("user", vec![connect, authority(b"me@127.0.0.1:80")], Answer::Headers(BAD_REQUEST)),
            ("v6 unbracketed", vec![connect, authority(b"::1:80")], malformed()),
            ("empty authority", vec![connect, authority(b"")], malformed()),
            ("no authority", vec![connect], bad),
            ("no method", vec![authority(good)], malformed()),
            (
                "GET",
                vec![(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/"), authority(good)],
                Answer::Headers(BAD_REQUEST),
            ),
            ("with scheme", vec![connect, (b":scheme", b"https"), authority(good)], malformed()),
            ("with path", vec![connect, (b":path", b"/"), authority(good)], malformed()),
            (
                "extended",
                vec![
                    connect,
                    (b":protocol", b"websocket"),
                    (b":scheme", b"https"),
                    (b":path", b"/"),
                    authority(good),
                ],
                malformed(),
            ),
            (
                "two uids",
                vec![
                    connect,
                    authority(good),
                    (b"weft-destination-uid", b"a"),
                    (b"weft-destination-uid", b"b"),
                ],
                Answer::Headers(BAD_REQUEST),
            ),
            (
                "uid in no charset",
                vec![connect, authority(good), (b"weft-destination-uid", b"\xff\xfe")],
                Answer::Headers(BAD_REQUEST),
            ),
            (
                "baggage in no charset",
                vec![connect, authority(good), (b"baggage", b"\xff")],
                Answer::Headers(OK),
            ),
            ("odd trace", vec![connect, authority(good), (b"traceparent", &[b'0'; 55])], Answer::Headers(OK)),
            ("huge header", vec![connect, authority(good), (b"baggage", &huge)], Answer::Headers(0)),
        ];
        let mut shared = Raw::open(&ca, &far).await;
        let mut stream = 1;
        for (what, headers, expected) in table {
            if what == "huge header" {
                // 431, or an end to the connection: but not a 200.
                shared.0.write_all(&headers_frames(stream, &headers)).await.unwrap();
                assert_ne!(shared.answer(stream).await, Answer::Headers(OK));
                continue;
            }
            shared.0.write_all(&headers_frames(stream, &headers)).await.unwrap();
            assert_eq!(shared.answer(stream).await, expected, "{what}");
            stream += 2;
        }
    });
}

/// Whatever a peer sends, its tunnel ends in order at worst, and others go on.
#[test]
fn random_requests_and_frames_never_panic() {
    run(async {
        let ca = Ca::new();
        let far = Far::start(ca.identity(SERVER), Limits::default()).await;
        let mut random = StdRng::seed_from_u64(7);
        let names: [&[u8]; 12] = [
            b":method",
            b":authority",
            b":scheme",
            b":path",
            b":protocol",
            b":status",
            b"weft-destination-uid",
            b"baggage",
            b"forwarded",
            b"traceparent",
            b"",
            b"x",
        ];
        let values: [&[u8]; 10] = [
            b"CONNECT",
            b"GET",
            b"127.0.0.1:1",
            b"[::1]:1",
            b"[::1%1]:1",
            b"a:b:c",
            b"",
            b"\0",
            b"\xff\xff",
            b"%00:80",
        ];
        let mut answered = 0;
        for _ in 0..40 {
            let mut raw = Raw::open(&ca, &far).await;
            for stream in (1..40).step_by(2) {
                let mut headers: Vec<(&[u8], &[u8])> = Vec::new();
                if random.random_bool(0.7) {
                    headers.push((b":method", b"CONNECT"));
                }
                for _ in 0..random.random_range(0..5) {
                    headers.push((names.choose(&mut random).unwrap(), values.choose(&mut random).unwrap()));
                }
                let mut bytes = headers_frames(stream, &headers);
                if !bytes.is_empty() && random.random_bool(0.1) {
                    let at = random.random_range(0..bytes.len());
                    bytes[at] = random.random();
                }
                if raw.0.write_all(&bytes).await.is_err() {
                    break;
                }
            }
            let _ = raw.0.shutdown().await;
            while !matches!(raw.answer(u32::MAX).await, Answer::Closed) {
                answered += 1;
            }
        }
        // A panic in a tunnel's task would leave it without an end.
        until(|| far.ended.borrow().len() == 40).await;
        assert!(answered > 0, "some of it was noticed");
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = app.local_addr().unwrap().to_string();
        let mut raw = Raw::open(&ca, &far).await;
        let good: Headers<'_> = &[(b":method", b"CONNECT"), (b":authority", to.as_bytes())];
        raw.0.write_all(&headers_frames(1, good)).await.unwrap();
        assert_eq!(raw.answer(1).await, Answer::Headers(OK));
    });
}

/// What is sent together with the end of the TLS handshake is not lost, nor is what follows the CONNECT at once.
#[test]
fn early_bytes_arrive() {
    run(async {
        let ca = Ca::new();
        let far = Far::start(ca.identity(SERVER), Limits::default()).await;
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = app.local_addr().unwrap().to_string();
        let good: Headers<'_> = &[(b":method", b"CONNECT"), (b":authority", to.as_bytes())];
        // More than rustls reads at once, so that some of it waits outside.
        let early = vec![7; 12_000];
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend(frame(4, 0, 0, &[]));
        bytes.extend(headers_frames(1, good));
        bytes.extend(frame(0, 1, 1, &early));

        let connector = raw_client(Some(ca.leaf(&Leaf::of(CLIENT))), &["h2"], TLS13);
        let name = "server.example".try_into().unwrap();
        let mut tls = rustls::ClientConnection::new(connector.config().clone(), name).unwrap();
        tls.writer().write_all(&bytes).unwrap();
        let mut tcp = TcpStream::connect(far.address).await.unwrap();
        loop {
            let mut out = Vec::new();
            while tls.wants_write() {
                tls.write_tls(&mut out).unwrap();
            }
            tcp.write_all(&out).await.unwrap();
            if !tls.is_handshaking() {
                break;
            }
            let mut flight = [0; 8192];
            let n = tcp.read(&mut flight).await.unwrap();
            tls.read_tls(&mut &flight[..n]).unwrap();
            tls.process_new_packets().unwrap();
        }
        let (mut server, _) = app.accept().await.unwrap();
        let mut got = Vec::new();
        server.read_to_end(&mut got).await.unwrap();
        assert!(got == early, "{} bytes", got.len());
    });
}

/// A peer that opens and resets streams without end is told to go (CVE-2023-44487).
#[test]
fn rapid_resets_end_the_tunnel() {
    run(async {
        let ca = Ca::new();
        let far = Far::start(ca.identity(SERVER), Limits::default()).await;
        let mut raw = Raw::open(&ca, &far).await;
        let good: Headers<'_> = &[(b":method", b"CONNECT"), (b":authority", b"127.0.0.1:1")];
        for stream in (1..20_000).step_by(2) {
            let mut bytes = headers_frames(stream, good);
            bytes.extend(frame(3, 0, stream, &8_u32.to_be_bytes()));
            if raw.0.write_all(&bytes).await.is_err() {
                break;
            }
        }
        let end = raw.answer(u32::MAX).await;
        assert!(matches!(end, Answer::GoAway(11) | Answer::Closed), "{end:?}");
        assert_eq!(far.ended().await, "http2");
    });
}
