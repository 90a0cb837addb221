//! Sockets of the bed's own clients and servers, with the options that real programs set. Each function makes its
//! sockets in the network namespace of the calling thread: call them through `Place`.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Multipath TCP (IANA protocol number as Linux numbers it).
const IPPROTO_MPTCP: i32 = 262;
/// Nothing in the bed waits longer than this for one read or write.
pub const IO_TIMEOUT: Duration = Duration::from_secs(30);

/// A connect with options.
#[derive(Clone, Debug)]
pub struct Dial {
    to: SocketAddr,
    mark: Option<u32>,
    device: Option<String>,
    bind: Option<SocketAddr>,
    mptcp: bool,
    v4_mapped: bool,
    fast_open: Option<Vec<u8>>,
    first: Option<SocketAddr>,
    timeout: Duration,
}

impl Dial {
    /// A plain connect to `to`, given up after 10 s.
    pub fn to(to: SocketAddr) -> Dial {
        Dial {
            to,
            mark: None,
            device: None,
            bind: None,
            mptcp: false,
            v4_mapped: false,
            fast_open: None,
            first: None,
            timeout: Duration::from_secs(10),
        }
    }

    /// Sets SO_MARK first (needs CAP_NET_RAW or CAP_NET_ADMIN).
    pub fn mark(mut self, mark: u32) -> Dial {
        self.mark = Some(mark);
        self
    }

    /// Sets SO_BINDTODEVICE first.
    pub fn device(mut self, name: &str) -> Dial {
        self.device = Some(name.to_owned());
        self
    }

    /// Binds to a source address first.
    pub fn bind(mut self, from: SocketAddr) -> Dial {
        self.bind = Some(from);
        self
    }

    /// Uses Multipath TCP.
    pub fn mptcp(mut self) -> Dial {
        self.mptcp = true;
        self
    }

    /// Dials an IPv4 address as `::ffff:a.b.c.d` on an IPv6 socket, as a JVM does.
    pub fn v4_mapped(mut self) -> Dial {
        self.v4_mapped = true;
        self
    }

    /// Sends `data` with the connect (MSG_FASTOPEN): in the SYN, where the kernel may.
    pub fn fast_open(mut self, data: &[u8]) -> Dial {
        self.fast_open = Some(data.to_vec());
        self
    }

    /// Connects the same socket to another address first, of the same family, and dissolves that, however it went.
    pub fn after(mut self, first: SocketAddr) -> Dial {
        self.first = Some(first);
        self
    }

    /// Gives up after `timeout`.
    pub fn timeout(mut self, timeout: Duration) -> Dial {
        self.timeout = timeout;
        self
    }

    /// Connects from the network namespace of this thread. The stream has read and write timeouts of `IO_TIMEOUT`.
    pub fn connect(&self) -> io::Result<TcpStream> {
        let to = match (self.v4_mapped, self.to.ip()) {
            (true, IpAddr::V4(v4)) => {
                SocketAddr::V6(SocketAddrV6::new(v4.to_ipv6_mapped(), self.to.port(), 0, 0))
            }
            _ => self.to,
        };
        let protocol = if self.mptcp { Protocol::from(IPPROTO_MPTCP) } else { Protocol::TCP };
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol))?;
        if let Some(mark) = self.mark {
            socket.set_mark(mark)?;
        }
        if let Some(device) = &self.device {
            socket.bind_device(Some(device.as_bytes()))?;
        }
        if let Some(from) = self.bind {
            socket.bind(&from.into())?;
        }
        if let Some(first) = self.first {
            let _ = socket.connect_timeout(&first.into(), self.timeout);
            dissolve(&socket)?;
        }
        match &self.fast_open {
            Some(data) => fast_open(&socket, to, data, self.timeout)?,
            None => socket.connect_timeout(&to.into(), self.timeout)?,
        }
        socket.set_read_timeout(Some(IO_TIMEOUT))?;
        socket.set_write_timeout(Some(IO_TIMEOUT))?;
        Ok(socket.into())
    }
}

/// connect(AF_UNSPEC): the socket is as if it had never been connected.
fn dissolve(socket: &Socket) -> io::Result<()> {
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    // SAFETY: the address outlives the call and its size is given.
    let done = unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, size_of_val(&nowhere) as u32) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// sendto(MSG_FASTOPEN): a blocking connect with data, bounded by the socket's send timeout.
fn fast_open(socket: &Socket, to: SocketAddr, data: &[u8], timeout: Duration) -> io::Result<()> {
    socket.set_write_timeout(Some(timeout))?;
    let address = SockAddr::from(to);
    // SAFETY: the data and the address outlive the call and their sizes are given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            data.as_ptr().cast(),
            data.len(),
            libc::MSG_FASTOPEN | libc::MSG_NOSIGNAL,
            address.as_ptr().cast(),
            address.len(),
        )
    };
    match usize::try_from(sent) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(sent) if sent == data.len() => Ok(()),
        Ok(sent) => Err(io::Error::new(io::ErrorKind::WriteZero, format!("{sent} of {} bytes", data.len()))),
    }
}

/// Listens on both address families in the network namespace of this thread.
pub fn listen(port: u16) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

/// An address with a v4-mapped one shown as what it is.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The unspecified address of the same family as `like`, for binding before a connect.
pub fn any_like(like: SocketAddr) -> IpAddr {
    match like {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// SHA-256 of what went through a stream, with its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    pub bytes: u64,
    pub sha256: [u8; 32],
}

/// Sends `bytes` bytes that begin with `marker` in every block, and returns their checksum. Does not close.
pub fn send_bulk(mut to: impl io::Write, marker: &[u8], bytes: u64) -> io::Result<Checksum> {
    let mut block = vec![0u8; 64 << 10];
    // Any cheap sequence without a short period does: what matters is that a lost or doubled block changes the sum.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for chunk in block.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes());
    }
    let marker_length = marker.len().min(1024);
    block[8..8 + marker_length].copy_from_slice(&marker[..marker_length]);
    let mut hash = Sha256::new();
    let mut sent = 0u64;
    while sent < bytes {
        block[..8].copy_from_slice(&sent.to_le_bytes());
        let length = usize::try_from(bytes - sent).unwrap_or(block.len()).min(block.len());
        to.write_all(&block[..length])?;
        hash.update(&block[..length]);
        sent += length as u64;
    }
    Ok(Checksum { bytes, sha256: hash.finalize().into() })
}

/// Reads to the end of the stream and returns the checksum of what came.
pub fn receive_bulk(mut from: impl io::Read) -> io::Result<Checksum> {
    let mut buffer = vec![0u8; 64 << 10];
    let mut hash = Sha256::new();
    let mut bytes = 0u64;
    loop {
        let length = from.read(&mut buffer)?;
        if length == 0 {
            return Ok(Checksum { bytes, sha256: hash.finalize().into() });
        }
        hash.update(&buffer[..length]);
        bytes += length as u64;
    }
}

/// Sends one line and reads one line back.
pub fn ask(stream: &mut TcpStream, line: &str) -> io::Result<String> {
    stream.write_all(format!("{line}\n").as_bytes())?;
    read_line(stream)
}

/// Reads one line, byte by byte so that nothing beyond it is taken.
pub fn read_line(stream: &mut TcpStream) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0u8];
    loop {
        if stream.read(&mut byte)? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the stream ended after {:?}", String::from_utf8_lossy(&line)),
            ));
        }
        match byte[0] {
            b'\n' => return Ok(String::from_utf8_lossy(&line).into_owned()),
            other => line.push(other),
        }
    }
}
