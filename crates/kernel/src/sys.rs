//! The few system calls that neither aya nor nix wraps: bpf(2) for links and pins, setns, socket options.
//!
//! aya 0.14 cannot replace the program of a cgroup or netns link, which is what makes an upgrade without a gap.

use std::{
    ffi::{CString, c_long},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

// enum bpf_cmd
const MAP_UPDATE_ELEM: c_long = 2;
const PROG_LOAD: c_long = 5;
const OBJ_PIN: c_long = 6;
const OBJ_GET: c_long = 7;
const OBJ_GET_INFO_BY_FD: c_long = 15;
const PROG_QUERY: c_long = 16;
const LINK_CREATE: c_long = 28;
const LINK_UPDATE: c_long = 29;
const LINK_DETACH: c_long = 34;

/// `enum bpf_attach_type`, as far as we attach.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachType {
    Connect4 = 10,
    Connect6 = 11,
    SkLookup = 36,
}

/// `attr` must have the layout that the command expects, and pointers in it must stay valid for the call.
unsafe fn bpf<T>(command: c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes at most the size given; the caller vouches for the contents.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

/// `command` must return a new descriptor.
unsafe fn bpf_fd<T>(command: c_long, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: as the caller vouches; a successful result is a new descriptor that nobody else has.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(command, attr)?)) }
}

#[repr(C)]
struct LinkCreate {
    program: i32,
    target: i32,
    attach_type: u32,
    flags: u32,
}

/// Attaches a program. The link ends with its last descriptor or pin.
pub fn link_create(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate {
        program: program.as_raw_fd(),
        target: target.as_raw_fd(),
        attach_type: attach_type as u32,
        flags: 0,
    };
    // SAFETY: the structure of BPF_LINK_CREATE, without pointers.
    unsafe { bpf_fd(LINK_CREATE, &mut attr) }
}

#[repr(C)]
struct ProgramQuery {
    target: i32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    padding: u32,
    program_attach_flags: u64,
}

/// Ids of the programs attached to a cgroup, in the order in which they run.
pub fn attached_programs(cgroup: BorrowedFd<'_>, attach_type: AttachType) -> io::Result<Vec<u32>> {
    /// BPF_CGROUP_MAX_PROGS: the kernel attaches no more of a kind.
    const MOST: usize = 64;
    let mut ids = vec![0; MOST];
    let mut attr = ProgramQuery {
        target: cgroup.as_raw_fd(),
        attach_type: attach_type as u32,
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: MOST as u32,
        padding: 0,
        program_attach_flags: 0,
    };
    // SAFETY: the structure of BPF_PROG_QUERY; `ids` outlives the call and has room for `count` of them.
    unsafe { bpf(PROG_QUERY, &mut attr) }?;
    ids.truncate(attr.count as usize);
    Ok(ids)
}

#[repr(C)]
struct LinkUpdate {
    link: i32,
    program: i32,
    flags: u32,
    old_program: i32,
}

/// Puts another program into a link, atomically: every connection sees the old one or the new one.
/// ENOLINK if what the link was attached to is gone.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr =
        LinkUpdate { link: link.as_raw_fd(), program: program.as_raw_fd(), flags: 0, old_program: 0 };
    // SAFETY: the structure of BPF_LINK_UPDATE, without pointers.
    unsafe { bpf(LINK_UPDATE, &mut attr) }.map(drop)
}

#[repr(C)]
struct LinkDetach {
    link: i32,
}

/// Detaches at once, however many descriptors and pins the link still has. (Removing the last pin also detaches, but
/// some time later.)
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the structure of BPF_LINK_DETACH, without pointers.
    unsafe { bpf(LINK_DETACH, &mut LinkDetach { link: link.as_raw_fd() }) }.map(drop)
}

/// The start of `struct bpf_link_info` for cgroup and netns links.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkInfo {
    kind: u32,
    id: u32,
    program_id: u32,
    padding: u32,
    /// Two numbers: a cgroup link has a 64-bit cgroup id here, then the attach type; a netns link the inode of the
    /// namespace, then the attach type.
    target: [u32; 4],
}

impl LinkInfo {
    /// The cgroup that a cgroup link is attached to, zero once it is detached.
    pub fn cgroup_id(&self) -> u64 {
        let [a, b, ..] = self.target;
        let (a, b) = (a.to_ne_bytes(), b.to_ne_bytes());
        u64::from_ne_bytes([a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]])
    }

    /// The inode of the network namespace that a netns link is attached to, zero once that is gone.
    pub fn netns_inode(&self) -> u32 {
        self.target[0]
    }
}

#[repr(C)]
struct GetInfo {
    fd: i32,
    length: u32,
    info: u64,
}

/// What the kernel says of a link.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = LinkInfo::default();
    let mut attr = GetInfo {
        fd: link.as_raw_fd(),
        length: size_of::<LinkInfo>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: the structure of BPF_OBJ_GET_INFO_BY_FD; `info` outlives the call and has the length given.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

#[repr(C)]
struct Object {
    path: u64,
    fd: i32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Pins a map or link at `path` in a bpffs.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = Object { path: path.as_ptr() as u64, fd: object.as_raw_fd(), flags: 0 };
    // SAFETY: the structure of BPF_OBJ_PIN; the path outlives the call and ends in a zero.
    unsafe { bpf(OBJ_PIN, &mut attr) }.map(drop)
}

/// Opens what is pinned at `path`.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = Object { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: as for `pin`.
    unsafe { bpf_fd(OBJ_GET, &mut attr) }
}

#[repr(C)]
struct MapElement {
    map: i32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Writes one into a socket storage map for `socket`. Not by way of aya, whose map wants `&mut self`: workers do this
/// for every connection, and the kernel needs no lock of ours.
pub fn mark_own(storage: BorrowedFd<'_>, socket: BorrowedFd<'_>) -> io::Result<()> {
    let (key, value) = (socket.as_raw_fd(), 1u32);
    let mut attr = MapElement {
        map: storage.as_raw_fd(),
        key: std::ptr::from_ref(&key) as u64,
        value: std::ptr::from_ref(&value) as u64,
        flags: 0,
    };
    // SAFETY: the structure of BPF_MAP_UPDATE_ELEM; key and value outlive the call and have the sizes of that map,
    // which was checked when it was opened.
    unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

/// SO_NETNS_COOKIE: the cookie of the network namespace a socket was created in. Kernel 5.14.
pub fn netns_cookie(socket: &impl AsFd) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: eight bytes are written at most, and there is room for them.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// NS_GET_NSTYPE: which kind of namespace a descriptor is for, as a CLONE_ flag.
pub fn namespace_kind(namespace: BorrowedFd<'_>) -> io::Result<i32> {
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: the request takes no argument.
    let result = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_NSTYPE) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
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
    expected_attach_type: u32,
}

/// Loads, and forgets, a socket lookup program that reads `ingress_ifindex`: kernels before 5.17 refuse it.
pub fn probe_ingress_ifindex() -> io::Result<()> {
    const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
    /// Where `struct bpf_sk_lookup` has the field.
    const OFFSET: u64 = 64;
    // An instruction: code (8 bits), destination and source register (4 each), offset (16), immediate (32).
    let code: [u64; 3] = [
        0x61 | 1 << 12 | OFFSET << 16, // r0 = *(u32 *)(r1 + OFFSET)
        0xb7 | 1 << 32,                // r0 = 1
        0x95,                          // exit
    ];
    let mut attr = ProgramLoad {
        kind: BPF_PROG_TYPE_SK_LOOKUP,
        instructions: code.len() as u32,
        code: code.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach_type: AttachType::SkLookup as u32,
        ..ProgramLoad::default()
    };
    // SAFETY: the structure of BPF_PROG_LOAD; code and license outlive the call and have the lengths given.
    unsafe { bpf_fd(PROG_LOAD, &mut attr) }.map(drop)
}
