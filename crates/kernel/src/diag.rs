//! The TCP connections in a pod's network namespace, as sock_diag(7) lists them, and an end to one of them.
//!
//! One listing looks at every TCP socket of the machine, whatever the namespace: a millisecond or so. So this is nothing to do
//! for each connection.

use crate::{Error, Netns, PodAddresses};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recvfrom, send,
            setsockopt, socket, sockopt::ReceiveTimeout,
        },
        time::TimeVal,
    },
};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
};
use weft_ebpf_common::{MARK_AGENT, MARK_CAPTURED, MARK_MASK, TUNNEL_PORT};

// linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const INET_DIAG_MARK: u16 = 15;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct inet_diag_sockid`: ports, addresses, device and cookie.
const ID: usize = 48;
/// `struct inet_diag_msg`: family, state and two more bytes, the id, five numbers.
const MESSAGE: usize = 4 + ID + 20;
/// The kernel fills at most 32 KiB at a time.
const BUFFER: usize = 64 * 1024;

const FIN_WAIT2: u8 = 5;
/// States in which a byte may still be sent one way or the other, as bits: ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT1,
/// FIN_WAIT2, CLOSE_WAIT.
const OPEN: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << FIN_WAIT2 | 1 << 8;

/// A TCP connection of a pod, by the socket that it has there.
#[derive(Clone, Copy, Debug)]
pub struct Connection {
    family: u8,
    id: [u8; ID],
    near: SocketAddr,
    far: SocketAddr,
    mark: u32,
}

impl Connection {
    /// The other end, as this socket knows it: the client, or what was dialled.
    pub fn far(&self) -> SocketAddr {
        self.far
    }

    /// What the kernel calls the socket: unique until the next boot.
    pub fn cookie(&self) -> u64 {
        u64::from_ne_bytes(self.id[ID - 8..].try_into().expect("eight bytes"))
    }
}

/// The pod's connections with others in which no agent has a part: those that are older than its enrolment, and what is let go.
///
/// Marks tell the rest apart: agents set them, the connect hooks do, and so does the kernel where it accepts a connection whose
/// SYN had one (`sysctl`). What an agent accepts from the network has none; tunnels come to a port of their own. (Plaintext
/// that an agent let in looks direct: it is in the clear. And a process with CAP_NET_ADMIN can hide its own by a mark.)
pub fn direct(netns: &Netns, addresses: PodAddresses) -> Result<Vec<Connection>, Error> {
    let failed = || format!("the connections in {} could not be listed", netns.path().display());
    let mut found = list(netns).map_err(Error::io(failed()))?;
    found.retain(|c| {
        let far = c.far.ip();
        ![MARK_AGENT, MARK_CAPTURED].contains(&(c.mark & MARK_MASK))
            && c.near.port() != TUNNEL_PORT
            && !far.is_loopback()
            && !addresses.contains(far)
    });
    Ok(found)
}

/// Ends a connection as a broken wire would: both ends are told at once. One that has ended is no error.
pub fn destroy(netns: &Netns, connection: &Connection) -> Result<(), Error> {
    let failed = format!("the connection with {} could not be ended", connection.far);
    let request = request(SOCK_DESTROY, NLM_F_ACK, connection.family, u32::MAX, &connection.id);
    match ask(netns, &request, |_| Ok(())) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            Err(Error::io(format!("{failed}: the kernel was built without CONFIG_INET_DIAG_DESTROY"))(error))
        }
        result => result.map_err(Error::io(failed)),
    }
}

fn list(netns: &Netns) -> io::Result<Vec<Connection>> {
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let request = request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family as u8, OPEN, &[0; ID]);
        ask(netns, &request, |message| {
            found.push(connection(message).ok_or_else(malformed)?);
            Ok(())
        })?;
    }
    Ok(found)
}

/// A `struct inet_diag_req_v2` with its header.
fn request(kind: u16, flags: u16, family: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let mut request = Vec::new();
    request.extend((HEADER as u32 + 8 + ID as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    request.extend([0; 8]); // sequence and port: one request a socket
    request.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
    request.extend(states.to_ne_bytes());
    request.extend(id);
    request
}

/// Sends a request and hands over every answer until the kernel says that it was the last.
fn ask(netns: &Netns, request: &[u8], mut answer: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let socket = netns.run(open).map_err(io::Error::other)??;
    send(socket.as_raw_fd(), request, MsgFlags::empty())?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let (length, from) = recvfrom::<NetlinkAddr>(socket.as_raw_fd(), &mut buffer)?;
        // A process of the pod's could send something here, too; the kernel's port is 0.
        if from.is_none_or(|from| from.pid() != 0) {
            continue;
        }
        let mut left = &buffer[..length];
        while !left.is_empty() {
            let (kind, message, rest) = split(left).ok_or_else(malformed)?;
            left = rest;
            match kind {
                SOCK_DIAG_BY_FAMILY => answer(message)?,
                // Either may carry an error number, and 0 is none.
                NLMSG_DONE | NLMSG_ERROR => {
                    return match number(message, 0).ok_or_else(malformed)? as i32 {
                        0 => Ok(()),
                        error => Err(io::Error::from_raw_os_error(error.wrapping_neg())),
                    };
                }
                _ => return Err(malformed()),
            }
        }
    }
}

/// A socket of the namespace's; the kernel answers for that.
fn open() -> Result<OwnedFd, Errno> {
    let (family, kind, flags) = (AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC);
    let socket = socket(family, kind, flags, SockProtocol::NetlinkSockDiag)?;
    // The kernel answers while it is asked; this is against being wrong about that.
    setsockopt(&socket, ReceiveTimeout, &TimeVal::new(5, 0))?;
    Ok(socket)
}

/// The first message: its type, what is in it, and what comes after it.
fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = number(bytes, 0)? as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let message = bytes.get(HEADER..length)?;
    Some((kind, message, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// A `struct inet_diag_msg`, with the socket's mark from the attributes that follow it.
fn connection(message: &[u8]) -> Option<Connection> {
    let family = *message.first()?;
    let id: [u8; ID] = message.get(4..4 + ID)?.try_into().ok()?;
    let port = |at: usize| u16::from_be_bytes([id[at], id[at + 1]]);
    let address = |at: usize| -> Option<IpAddr> {
        let bytes: [u8; 16] = id[at..at + 16].try_into().ok()?;
        match i32::from(family) {
            libc::AF_INET => Some(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()),
            libc::AF_INET6 => Some(Ipv6Addr::from(bytes).to_canonical()),
            _ => None,
        }
    };
    let near = SocketAddr::new(address(4)?, port(0));
    let far = SocketAddr::new(address(20)?, port(2));
    // Whoever may not administer the network is not told, and would take every socket for the application's: no answer.
    // But of what is left of a closed socket older kernels tell nobody, and it is nobody's any more.
    let mark = attribute(message.get(MESSAGE..)?, INET_DIAG_MARK).and_then(|mark| number(mark, 0));
    let mark = mark.or((message[1] == FIN_WAIT2).then_some(MARK_AGENT))?;
    Some(Connection { family, id, near, far, mark })
}

/// The content of an attribute. Each is its length, its type, its content, and zeroes up to a multiple of four.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(0..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let content = attributes.get(4..length)?;
        if kind == wanted {
            return Some(content);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "what the kernel answered cannot be read")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a kernel sends it: 10.0.0.2:8080 with ::ffff:10.0.0.3:40000, and a mark after another attribute.
    fn message() -> Vec<u8> {
        let mut id = [0; ID];
        id[..4].copy_from_slice(&[0x1f, 0x90, 0x9c, 0x40]);
        id[4..20].copy_from_slice(&Ipv4Addr::new(10, 0, 0, 2).to_ipv6_mapped().octets());
        id[20..36].copy_from_slice(&Ipv4Addr::new(10, 0, 0, 3).to_ipv6_mapped().octets());
        id[40..].copy_from_slice(&7u64.to_ne_bytes());
        let mut message = vec![libc::AF_INET6 as u8, 1, 0, 0];
        message.extend(id);
        message.extend([0; 20]);
        for (length, kind) in [(5u16, 8u16), (8, INET_DIAG_MARK)] {
            message.extend(length.to_ne_bytes());
            message.extend(kind.to_ne_bytes());
            message.extend(MARK_AGENT.to_ne_bytes());
        }
        message
    }

    #[test]
    fn reads_a_connection() {
        let read = connection(&message()).unwrap();
        assert_eq!(read.far(), "10.0.0.3:40000".parse().unwrap());
        assert_eq!(read.near, "10.0.0.2:8080".parse().unwrap());
        assert_eq!((read.cookie(), read.mark), (7, MARK_AGENT));
    }

    #[test]
    fn what_is_cut_short_or_says_nonsense_is_no_connection() {
        let whole = message();
        for length in 0..whole.len() {
            assert!(connection(&whole[..length]).is_none(), "{length} bytes");
            assert!(
                split(&whole[..length]).is_none_or(|(_, message, rest)| message.len() + rest.len() <= length)
            );
        }
        let mut endless = whole;
        let first_attribute = MESSAGE..MESSAGE + 2;
        endless[first_attribute].copy_from_slice(&0u16.to_ne_bytes());
        assert!(connection(&endless).is_none(), "an attribute of no length");
    }
}
