//! A stand-in for a CNI's load-balancing in sockets, such as Cilium's: programs in the connect hooks at cgroup2's root
//! that put a backend's address and port into the place of a Service's. It does that one thing, for the sockets of one
//! pod, and has nothing else of Cilium: no maps, no choice among backends, no getpeername hook, no UDP.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context, Result, ensure};

use crate::place::Place;

/// The programs' name, as the kernel shows it.
pub const NAME: &str = "socket_lb";

// enum bpf_cmd, bpf_prog_type and bpf_attach_type
const PROG_LOAD: i64 = 5;
const LINK_CREATE: i64 = 28;
const CGROUP_SOCK_ADDR: u32 = 18;
const CONNECT4: u32 = 10;
const CONNECT6: u32 = 11;

// Where struct bpf_sock_addr has its fields.
const USER_IP4: u16 = 4;
const USER_IP6: u16 = 8;
const USER_PORT: u16 = 24;

/// Attached programs, which end with this value and with this process.
#[derive(Debug)]
pub struct SocketLb {
    _links: Vec<OwnedFd>,
}

impl SocketLb {
    /// What `pod` connects to at the first address of a pair goes to the second one, which is of the same family. Whoever
    /// attaches programs of that kind to the root later sees the second.
    pub fn attach(pod: &Place, pairs: &[(SocketAddr, SocketAddr)]) -> Result<SocketLb> {
        let root = std::fs::File::open(crate::isolate::cgroup2_root()?).context("cgroup2's root")?;
        let cookie = pod.netns().run(netns_cookie)??;
        let mut links = Vec::new();
        for (service, backend) in pairs {
            ensure!(service.is_ipv4() == backend.is_ipv4(), "{service} and {backend} differ in family");
            // The kernel runs connect6 for the v4-mapped addresses of IPv6 sockets.
            let mut hooks = vec![(CONNECT6, USER_IP6)];
            if service.is_ipv4() {
                hooks.push((CONNECT4, USER_IP4));
            }
            for (hook, field) in hooks {
                let code = program(cookie, &fields(*service, field), &fields(*backend, field));
                let program = load(&code, hook).with_context(|| format!("the program for {service}"))?;
                let link = link(&program, &root, hook).with_context(|| format!("its link for {service}"))?;
                links.push(link);
            }
        }
        Ok(SocketLb { _links: links })
    }
}

/// What the context's fields hold for a destination, by their place; the address's first field is `address`.
fn fields(destination: SocketAddr, address: u16) -> Vec<(u16, u32)> {
    let octets = match destination.ip() {
        IpAddr::V4(v4) if address == USER_IP4 => v4.octets().to_vec(),
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let words = octets.chunks_exact(4).map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
    let port = (USER_PORT, u32::from(destination.port().to_be()));
    (address..).step_by(4).zip(words).chain([port]).collect()
}

/// One instruction: operation, destination and source register, offset, immediate.
const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: u32) -> u64 {
    code as u64
        | (to as u64) << 8
        | (from as u64) << 12
        | (offset as u16 as u64) << 16
        | (immediate as u64) << 32
}

/// `if cookie == the socket's && every field of `from` is as it says { write the fields of `to` } return 1`
fn program(cookie: u64, from: &[(u16, u32)], to: &[(u16, u32)]) -> Vec<u64> {
    const GET_NETNS_COOKIE: u32 = 122;
    const CALL: u8 = 0x85;
    const MOVE: u8 = 0xbf;
    const MOVE_WORD: u8 = 0xb4;
    const LOAD_WORD: u8 = 0x61;
    const STORE_WORD: u8 = 0x63;
    const JUMP_UNEQUAL: u8 = 0x5d;
    const LOAD_NUMBER: u8 = 0x18;
    const EXIT: u8 = 0x95;
    let mut code = vec![
        instruction(MOVE, 6, 1, 0, 0),
        instruction(CALL, 0, 0, 0, GET_NETNS_COOKIE),
        instruction(LOAD_NUMBER, 2, 0, 0, cookie as u32),
        instruction(0, 0, 0, 0, (cookie >> 32) as u32),
    ];
    let mut jumps = vec![code.len()];
    code.push(instruction(JUMP_UNEQUAL, 0, 2, 0, 0));
    for &(offset, word) in from {
        code.push(instruction(LOAD_WORD, 1, 6, offset as i16, 0));
        code.push(instruction(MOVE_WORD, 2, 0, 0, word));
        jumps.push(code.len());
        code.push(instruction(JUMP_UNEQUAL, 1, 2, 0, 0));
    }
    for &(offset, word) in to {
        code.push(instruction(MOVE_WORD, 1, 0, 0, word));
        code.push(instruction(STORE_WORD, 6, 1, offset as i16, 0));
    }
    for at in jumps {
        // Counted from the instruction after the jump.
        code[at] |= ((code.len() - at - 1) as u64) << 16;
    }
    code.push(instruction(MOVE_WORD, 0, 0, 0, 1));
    code.push(instruction(EXIT, 0, 0, 0, 0));
    code
}

#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    attach_type: u32,
}

fn load(code: &[u64], hook: u32) -> io::Result<OwnedFd> {
    let mut name = [0; 16];
    name[..NAME.len()].copy_from_slice(NAME.as_bytes());
    let mut attributes = ProgramLoad {
        kind: CGROUP_SOCK_ADDR,
        instructions: code.len() as u32,
        code: code.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        name,
        attach_type: hook,
        ..ProgramLoad::default()
    };
    // SAFETY: the structure of BPF_PROG_LOAD; code and license outlive the call.
    unsafe { bpf(PROG_LOAD, &mut attributes) }
}

#[repr(C)]
struct LinkCreate {
    program: i32,
    target: i32,
    attach_type: u32,
    flags: u32,
}

fn link(program: &OwnedFd, cgroup: &std::fs::File, hook: u32) -> io::Result<OwnedFd> {
    let (program, target) = (program.as_raw_fd(), cgroup.as_raw_fd());
    let mut attributes = LinkCreate { program, target, attach_type: hook, flags: 0 };
    // SAFETY: the structure of BPF_LINK_CREATE, without pointers.
    unsafe { bpf(LINK_CREATE, &mut attributes) }
}

/// `attributes` must be what the command expects, with pointers that are valid for the call, and the command one that
/// returns a new descriptor.
unsafe fn bpf<T>(command: i64, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads the size given; the caller vouches for the rest.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The cookie of this thread's network namespace.
fn netns_cookie() -> io::Result<u64> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: eight bytes are written at most, and there is room for them.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}
