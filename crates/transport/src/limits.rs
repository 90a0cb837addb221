//! Every bound of the data path, named, with its default and the reason for it. Read by the agent's configuration.

use socket2::{SockRef, TcpKeepalive};
use std::{io, time::Duration};

/// Bounds on tunnels, streams, buffers and waiting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// CONNECT streams a client opens on one tunnel before it starts another; what ztunnel does, too.
    pub max_streams_per_tunnel: usize,
    /// CONNECT streams a server lets a peer have open on one tunnel.
    pub max_concurrent_streams: u32,
    /// Bytes a peer may send on one stream beyond what the application has taken: the memory a stalled stream can cost.
    pub stream_window: u32,
    /// Bytes of one stream that may wait for the tunnel's socket.
    pub send_buffer: usize,
    /// Largest DATA frame accepted, in bytes; HTTP/2 allows 16 384 to 16 777 215. h2 assembles a frame in one buffer, and
    /// measured, those of 64 KiB cost a third less than those of 1 MiB, which miss the caches and churn the allocator.
    pub max_frame: u32,
    /// Largest list of request or response headers accepted, in bytes as HTTP/2 counts them.
    pub max_header_list: u32,
    /// For the TCP connection of a tunnel.
    pub connect_timeout: Duration,
    /// For the TLS and HTTP/2 handshakes together, on either side.
    pub handshake_timeout: Duration,
    /// For the answer to a CONNECT: the far agent connects to its application meanwhile.
    pub response_timeout: Duration,
    /// A client's tunnel without streams closes after this long.
    pub tunnel_idle: Duration,
    /// TCP_USER_TIMEOUT of tunnels: how long sent bytes may stay unacknowledged before the peer counts as gone.
    pub tcp_user_timeout: Duration,
    /// Quiet time before a tunnel's first TCP keepalive probe. Probes replace HTTP/2 PINGs: the kernel sends them.
    pub keepalive_time: Duration,
    /// Time between keepalive probes.
    pub keepalive_interval: Duration,
    /// Bytes read from an application at once: it starts at `.0`, grows to `.1` (at most 128 KiB) while reads fill it, and
    /// shrinks again.
    pub copy_chunk: (usize, usize),
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_streams_per_tunnel: 100,
            max_concurrent_streams: 200,
            stream_window: 2 << 20,
            send_buffer: 512 << 10,
            max_frame: 64 << 10,
            max_header_list: 16 << 10,
            connect_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            response_timeout: Duration::from_secs(15),
            tunnel_idle: Duration::from_secs(90),
            tcp_user_timeout: Duration::from_secs(20),
            keepalive_time: Duration::from_secs(15),
            keepalive_interval: Duration::from_secs(5),
            copy_chunk: (16 << 10, 128 << 10),
        }
    }
}

impl Limits {
    /// Every stream's window together, so that streams whose applications do not read never starve their siblings.
    pub(crate) fn connection_window(&self, streams: usize) -> u32 {
        const MAX: u64 = (1 << 31) - 1; // RFC 9113, 6.9.1
        u64::from(self.stream_window).saturating_mul(streams as u64).clamp(65_535, MAX) as u32
    }

    /// Options of a tunnel's TCP socket.
    pub(crate) fn tune(&self, socket: SockRef<'_>) -> io::Result<()> {
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_user_timeout(Some(self.tcp_user_timeout))?;
        let keepalive =
            TcpKeepalive::new().with_time(self.keepalive_time).with_interval(self.keepalive_interval);
        socket.set_tcp_keepalive(&keepalive)
    }
}
