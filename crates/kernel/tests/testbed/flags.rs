//! Another program of the kind sockops, as ill-mannered as some are: whenever a socket begins to connect, it turns off every
//! notification that others have asked for. Attached to cgroup2's root after ours, for the sockets of one network namespace.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

const PROG_LOAD: i64 = 5;
const LINK_CREATE: i64 = 28;
const SOCK_OPS: u32 = 13;
const CGROUP_SOCK_OPS: u32 = 3;

/// One instruction: operation, destination and source register, offset, immediate.
const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: u32) -> u64 {
    code as u64
        | (to as u64) << 8
        | (from as u64) << 12
        | (offset as u16 as u64) << 16
        | (immediate as u64) << 32
}

/// Attached until the value is dropped.
pub fn turn_off(cookie: u64, cgroup: &Path) -> OwnedFd {
    const CONNECT: u32 = 3;
    const GET_NETNS_COOKIE: u32 = 122;
    const SET_FLAGS: u32 = 59;
    let code = [
        instruction(0xbf, 6, 1, 0, 0),                  // r6 = context
        instruction(0x61, 2, 6, 0, 0),                  // r2 = op
        instruction(0x55, 2, 0, 7, CONNECT),            // if r2 != CONNECT goto end
        instruction(0x85, 0, 0, 0, GET_NETNS_COOKIE),   // r0 = cookie of r1
        instruction(0x18, 2, 0, 0, cookie as u32),      // r2 = cookie
        instruction(0, 0, 0, 0, (cookie >> 32) as u32), //
        instruction(0x5d, 0, 2, 3, 0),                  // if r0 != r2 goto end
        instruction(0xbf, 1, 6, 0, 0),                  // r1 = context
        instruction(0xb7, 2, 0, 0, 0),                  // r2 = no flags
        instruction(0x85, 0, 0, 0, SET_FLAGS),          //
        instruction(0xb7, 0, 0, 0, 1),                  // end: r0 = 1
        instruction(0x95, 0, 0, 0, 0),                  // return r0
    ];
    // The fields of BPF_PROG_LOAD up to the flags, as pairs of words.
    let code_at = code.as_ptr() as u64;
    let mut load =
        [u64::from(SOCK_OPS) | (code.len() as u64) << 32, code_at, c"GPL".as_ptr() as u64, 0, 0, 0];
    // SAFETY: code and license outlive the call.
    let program = unsafe { bpf(PROG_LOAD, &mut load) }.unwrap();
    let cgroup = File::open(cgroup).unwrap();
    let mut link = [program.as_raw_fd() as u32, cgroup.as_raw_fd() as u32, CGROUP_SOCK_OPS, 0];
    // SAFETY: no pointers in it.
    unsafe { bpf(LINK_CREATE, &mut link) }.unwrap()
}

/// `attributes` must be what the command expects, and the command one that returns a new descriptor.
unsafe fn bpf<T>(command: i64, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads the size given; the caller vouches for the rest.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
