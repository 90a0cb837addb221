//! What a tunnel costs next to plain TCP on this machine, over loopback: an application and its server on one thread each,
//! both agents on one thread each. Interleaved rounds, medians, and the ratio; the
//! same for the CPU time of all parties, in microseconds a request or Gbit. Arguments: rounds, seconds a measurement, part of a
//! measurement's name.
//!
//! `cargo run --release -p weft-transport --example tunnel_cost -- 5 1`

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::PrivateKeyDer;
use std::future::Future;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{LocalSet, spawn_local};
use weft_transport::{
    ConnectRequest, Counters, Limits, Pool, Roots, TlsIdentity, TunnelKey, relay, serve, warm_up,
};

type Failure = Box<dyn std::error::Error>;

const CLIENT: &str = "spiffe://cluster.local/ns/bench/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/bench/sa/server";
const WARM: Duration = Duration::from_millis(200);
const REQUEST: usize = 120;
const RESPONSE: usize = 850;

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let rounds: usize = args.next().map_or(Ok(5), |a| a.parse())?;
    let time = Duration::from_secs_f64(args.next().map_or(Ok(1.0), |a| a.parse())?);
    let chosen = args.next().unwrap_or_default();

    let (server, client) = identities()?;
    let app = listen()?;
    let far = listen()?;
    let near = listen()?;
    let (direct, through, far_addr) = (app.local_addr()?, near.local_addr()?, far.local_addr()?);
    thread("application", move || application(app))?;
    thread("far", move || far_agent(far, server))?;
    thread("near", move || near_agent(near, client, far_addr, direct))?;

    println!(
        "{:<22} {:>12} {:>12} {:>7} {:>10} {:>10} {:>7}",
        "", "plain", "tunnel", "ratio", "CPU", "CPU", "ratio"
    );
    for (name, mode, connections, unit) in [
        ("upload, 1 stream", b'u', 1, 1e9 / 8.0),
        ("download, 1 stream", b'd', 1, 1e9 / 8.0),
        ("upload, 4 streams", b'u', 4, 1e9 / 8.0),
        ("requests, 1 kept", b'r', 1, 1.0),
        ("requests, 64 kept", b'r', 64, 1.0),
        ("requests, 1 each", b'c', 32, 1.0),
    ] {
        if !name.contains(&chosen) {
            continue;
        }
        let (mut plain, mut tunnel) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            for (to, results) in [(direct, &mut plain), (through, &mut tunnel)] {
                let before = cpu_seconds()?;
                let rate = measure(to, mode, connections, time)? / unit;
                // Of the warm-up, too, as if it had gone at the same rate.
                let each = (cpu_seconds()? - before) / (rate * (WARM + time).as_secs_f64());
                results.push((rate, each * 1e6));
            }
        }
        let ((p, p_cpu), (t, t_cpu)) = (medians(plain), medians(tunnel));
        let (rate, cpu) = (t / p, p_cpu / t_cpu);
        println!("{name:<22} {p:>12.2} {t:>12.2} {rate:>7.3} {p_cpu:>10.1} {t_cpu:>10.1} {cpu:>7.3}");
    }
    Ok(())
}

fn medians(pairs: Vec<(f64, f64)>) -> (f64, f64) {
    let (a, b) = pairs.into_iter().unzip();
    (median(a), median(b))
}

/// What all threads have used; on a busy machine a better measure than the clock.
fn cpu_seconds() -> Result<f64, Failure> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let ticks = stat.split(' ').skip(13).take(2).map(str::parse::<f64>).sum::<Result<f64, _>>()?;
    Ok(ticks / 100.0)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn identities() -> Result<(Arc<TlsIdentity>, Arc<TlsIdentity>), Failure> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&key)?.der().clone();
    let issuer = Issuer::new(params, key);
    let roots = Arc::new(Roots::new([root])?);
    let make = |uri: &str| -> Result<_, Failure> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
        let chain = vec![params.signed_by(&key, &issuer)?.der().clone()];
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        Ok(Arc::new(TlsIdentity::new(uri.parse()?, chain, key, &roots)?))
    };
    Ok((make(SERVER)?, make(CLIENT)?))
}

fn listen() -> Result<StdListener, Failure> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

/// A worker: one thread, one runtime, one LocalSet.
fn thread<F: Future<Output = Result<(), Failure>>>(
    name: &str,
    work: impl FnOnce() -> F + Send + 'static,
) -> Result<(), Failure> {
    std::thread::Builder::new().name(name.into()).spawn(move || {
        warm_up();
        if let Err(e) = block_on(work()) {
            eprintln!("{e}");
            std::process::exit(1);
        }
    })?;
    Ok(())
}

fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, work)
}

/// Does what the first byte of a connection says: u takes bytes, d sends them, r and c answer requests.
async fn application(listener: StdListener) -> Result<(), Failure> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let (mut socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        spawn_local(async move {
            let mut buffer = vec![0; 128 << 10];
            match socket.read_u8().await {
                Ok(b'u') => while socket.read(&mut buffer).await.is_ok_and(|n| n > 0) {},
                Ok(b'd') => while socket.write_all(&buffer).await.is_ok() {},
                _ => {
                    while socket.read_exact(&mut buffer[..REQUEST]).await.is_ok() {
                        if socket.write_all(&buffer[..RESPONSE]).await.is_err() {
                            break;
                        }
                    }
                }
            }
        });
    }
}

async fn far_agent(listener: StdListener, tls: Arc<TlsIdentity>) -> Result<(), Failure> {
    let listener = TcpListener::from_std(listener)?;
    let (_keep, drain) = watch::channel(false);
    loop {
        let (tcp, _) = listener.accept().await?;
        let (tls, drain) = (tls.clone(), drain.clone());
        spawn_local(async move {
            let handler = |incoming: weft_transport::Incoming| {
                spawn_local(async move {
                    let Ok(to) = incoming.authority.clone() else { return };
                    let Ok(app) = TcpStream::connect(to).await else { return };
                    let _ = app.set_nodelay(true);
                    if let Ok(stream) = incoming.accept(None) {
                        let _ = relay(app, stream, &Counters::default()).await;
                    }
                });
            };
            if let Err(e) = serve(tcp, tls, &limits(), handler, drain).await {
                eprintln!("far: {e}");
            }
        });
    }
}

async fn near_agent(
    listener: StdListener,
    tls: Arc<TlsIdentity>,
    to: SocketAddr,
    authority: SocketAddr,
) -> Result<(), Failure> {
    let listener = TcpListener::from_std(listener)?;
    let pool = Pool::new(limits());
    let key = TunnelKey { pod: 1, source: CLIENT.parse()?, to, expected: SERVER.parse()? };
    loop {
        let (app, _) = listener.accept().await?;
        app.set_nodelay(true)?;
        let (pool, tls, key) = (pool.clone(), tls.clone(), key.clone());
        spawn_local(async move {
            let request = ConnectRequest {
                authority,
                destination_uid: "Kubernetes//Pod/bench/server".into(),
                baggage: "k8s.namespace.name=bench".into(),
                forwarded: None,
                traceparent: None,
            };
            let dial = || {
                let socket = std::net::TcpStream::connect(to)?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            };
            match pool.open(key, &tls, request, dial).await {
                Ok(tunneled) => {
                    let _ = relay(app, tunneled.stream, &Counters::default()).await;
                }
                Err(e) => eprintln!("near: {e}"),
            }
        });
    }
}

/// Bytes or requests a second.
fn measure(to: SocketAddr, mode: u8, connections: usize, time: Duration) -> Result<f64, Failure> {
    block_on(async move {
        let tasks: Vec<_> = (0..connections)
            .map(|_| {
                spawn_local(async move {
                    let begin = Instant::now();
                    let mut done = 0;
                    let mut buffer = vec![0; 128 << 10];
                    let mut socket = TcpStream::connect(to).await?;
                    socket.set_nodelay(true)?;
                    socket.write_u8(mode).await?;
                    while begin.elapsed() < WARM + time {
                        let n = match mode {
                            b'u' => {
                                socket.write_all(&buffer).await?;
                                buffer.len()
                            }
                            b'd' => socket.read(&mut buffer).await?,
                            _ => {
                                if mode == b'c' && done > 0 {
                                    socket = TcpStream::connect(to).await?;
                                    socket.set_nodelay(true)?;
                                    socket.write_u8(mode).await?;
                                }
                                socket.write_all(&buffer[..REQUEST]).await?;
                                socket.read_exact(&mut buffer[..RESPONSE]).await?;
                                1
                            }
                        };
                        if mode == b'c' || begin.elapsed() >= WARM {
                            done += n;
                        }
                    }
                    let counted = if mode == b'c' { WARM + time } else { time };
                    Ok::<_, std::io::Error>(done as f64 / counted.as_secs_f64())
                })
            })
            .collect();
        let mut sum = 0.0;
        for task in tasks {
            sum += task.await??;
        }
        Ok(sum)
    })
}

/// The defaults, but for `CHUNK`, `FRAME` and `WINDOW` (bytes) in the environment.
fn limits() -> Limits {
    let mut limits = Limits::default();
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse().ok());
    limits.copy_chunk.1 = number("CHUNK").unwrap_or(limits.copy_chunk.1);
    limits.stream_window = number("WINDOW").map_or(limits.stream_window, |w| w as u32);
    limits.max_frame = number("FRAME").map_or(limits.max_frame, |f| f as u32);
    limits
}
