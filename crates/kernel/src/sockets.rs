//! The sockets that the agent opens inside a pod: its listener, its legs to the network and to the application.
//! Everything here runs on the caller's thread and never blocks.

use crate::{Error, Netns, sys};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, BorrowedFd},
};
use weft_ebpf_common::{MARK_AGENT, MARK_CAPTURED};

/// Connections waiting to be accepted; beyond that SYNs are dropped and sent again. net.core.somaxconn caps it.
const BACKLOG: i32 = 4096;

/// Source ports of the leg to the application. Outside the default ephemeral range (from 32768 on): a leg with the
/// address and port of a live client connection would meet that connection's socket instead of the application's.
const PORTS: std::ops::RangeInclusive<u16> = 1024..=32767;
/// Tried first: few applications listen this high, and one that starts without SO_REUSEADDR cannot bind a port that
/// a leg has in use.
const QUIET_PORTS: std::ops::RangeInclusive<u16> = 10240..=32767;
const QUIET_ATTEMPTS: u32 = 16;
const ATTEMPTS: u32 = 64;

/// Ports of listeners: above the default ephemeral range and below nothing that is registered, so that they are in
/// no application's way, which would fail to bind a port taken by a listener.
const LISTENER_PORTS: std::ops::RangeInclusive<u16> = 61000..=65535;

/// The pod's one listener, and its port. Bound to the wildcard, because IPv6 makes a socket bound to anything else
/// refuse IPv4; the pod's socket lookup refuses connections to that port itself.
pub fn listener(netns: &Netns) -> Result<(TcpListener, u16), Error> {
    let failed = || format!("the listener in {} could not be made", netns.path().display());
    netns.run(|| dual_stack().or_else(|_| ipv4_only()))?.map_err(Error::io(failed()))
}

fn dual_stack() -> io::Result<(TcpListener, u16)> {
    let socket = tcp(Domain::IPV6)?;
    socket.set_only_v6(false)?;
    socket.set_ip_transparent_v6(true)?;
    listen(socket, Ipv6Addr::UNSPECIFIED.into())
}

/// Where the kernel runs without IPv6.
fn ipv4_only() -> io::Result<(TcpListener, u16)> {
    listen(tcp(Domain::IPV4)?, Ipv4Addr::UNSPECIFIED.into())
}

fn listen(socket: Socket, address: IpAddr) -> io::Result<(TcpListener, u16)> {
    // Accepted connections have local addresses that are not this host's; they inherit this.
    socket.set_ip_transparent_v4(true)?;
    // They also sit on the application's ports, which it must still be able to bind.
    socket.set_reuse_address(true)?;
    let bind = |port| socket.bind(&SocketAddr::new(address, port).into());
    if !(0..ATTEMPTS).any(|_| bind(rand::random_range(LISTENER_PORTS)).is_ok()) {
        bind(0)?;
    }
    socket.listen(BACKLOG)?;
    let listener = TcpListener::from(socket);
    let port = listener.local_addr()?.port();
    Ok((listener, port))
}

/// The leg to the network. Registered as the agent's own, so that the hook lets it pass.
pub fn outbound(netns: &Netns, own: BorrowedFd<'_>, to: SocketAddr) -> io::Result<TcpStream> {
    let to = canonical(to);
    let socket = netns.run(|| tcp(Domain::for_address(to))).map_err(io::Error::other)??;
    socket.set_mark(MARK_AGENT)?;
    sys::mark_own(own, socket.as_fd())?;
    start(&socket, to)?;
    Ok(socket.into())
}

/// The leg to the application, which sees the client's address.
pub fn inbound(netns: &Netns, own: BorrowedFd<'_>, client: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let (client, to) = (client.to_canonical(), canonical(to));
    if client.is_ipv4() != to.is_ipv4() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{client} cannot connect to {to}")));
    }
    // All attempts in one stay inside the namespace: a second socket is rarely needed.
    netns.run(|| inbound_here(own, client, to)).map_err(io::Error::other)?
}

fn inbound_here(own: BorrowedFd<'_>, client: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for attempt in 0..ATTEMPTS {
        let range = if attempt < QUIET_ATTEMPTS { QUIET_PORTS } else { PORTS };
        match inbound_from(own, SocketAddr::new(client, rand::random_range(range)), to) {
            // The port is taken, or this very connection exists: another one.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL)) => {
                last = error
            }
            result => return result,
        }
    }
    Err(last)
}

fn inbound_from(own: BorrowedFd<'_>, from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = tcp(Domain::for_address(to))?;
    // To be the client.
    match to {
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        SocketAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
    }
    // The mark brings the answers back through lo; the device makes the SYN arrive from lo, by which socket lookup
    // knows it. Without it the SYN would look as if it came from the pod's own device.
    socket.set_mark(MARK_CAPTURED)?;
    socket.bind_device(Some(b"lo"))?;
    socket.set_reuse_address(true)?;
    socket.bind(&from.into())?;
    sys::mark_own(own, socket.as_fd())?;
    start(&socket, to)?;
    Ok(socket.into())
}

fn tcp(domain: Domain) -> io::Result<Socket> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(domain, kind, Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

fn start(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    match socket.connect(&SockAddr::from(to)) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(()),
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
        // Keeps the scope of a link-local address.
        IpAddr::V6(_) => address,
    }
}
