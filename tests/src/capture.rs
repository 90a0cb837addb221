//! The wire between the nodes, recorded by the kernel (AF_PACKET): the one witness that is no part of the mesh. Every
//! frame is kept once, as it enters the wire, with the kernel's own time. Judging a recording is done by `evidence`.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};

use crate::evidence::Recording;
use crate::netns::Netns;

/// Room for frames that wait to be read. Large, because the two cores of a small machine also run the traffic.
const KERNEL_BUFFER_BYTES: libc::c_int = 512 << 20;
/// Segmentation offload makes frames of up to 64 KiB.
const FRAME_BYTES: usize = 70_000;

/// One moment on the kernel's clock, to divide a recording into before and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub(crate) Duration);

impl Moment {
    /// This moment.
    pub fn now() -> Moment {
        Moment(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
    }

    /// This moment, once what was sent in the clear just before has been acknowledged: on a busy machine the kernel sends
    /// the last segment of a connection that has already ended once more, which is not what a later connection did.
    pub fn after_plain_traffic() -> Moment {
        crate::poll::pause(Duration::from_millis(300));
        Moment::now()
    }
}

/// A running recording.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    reader: JoinHandle<Result<Recording>>,
}

impl Capture {
    /// Starts recording what enters the interfaces of `wire`. Returns when the kernel has begun.
    pub(crate) fn start(wire: &Netns) -> Result<Capture> {
        let socket = wire.run(open_socket)??;
        let stop = Arc::new(AtomicBool::new(false));
        let reader = std::thread::spawn({
            let stop = stop.clone();
            move || read_all(&socket, &stop)
        });
        Ok(Capture { stop, reader })
    }

    /// Stops, and fails where the kernel had to drop frames: then nothing could be concluded from an absence.
    pub fn stop(self) -> Result<Recording> {
        self.stop.store(true, Ordering::SeqCst);
        self.reader.join().map_err(|_| anyhow!("the capture thread panicked"))?
    }
}

fn open_socket() -> Result<OwnedFd> {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: a plain system call; the descriptor is owned from here on.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error()).context("AF_PACKET socket");
    }
    // SAFETY: `fd` was just opened and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, KERNEL_BUFFER_BYTES)?;
    set_option(&socket, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1)?;
    // A frame that crosses the bridge leaves it through another port: counted once, where it enters.
    set_option(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
    // Wakes the reader so that it can see it is to stop.
    let timeout = libc::timeval { tv_sec: 0, tv_usec: 50_000 };
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, timeout)?;
    // Bound last, so that no frame is queued under the wrong options. Interface 0: all of the wire's.
    let mut address: libc::sockaddr_ll =
        // SAFETY: sockaddr_ll is plain data, all zeroes are valid.
        unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    // SAFETY: the address outlives the call and its size is given.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            std::mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if bound != 0 {
        return Err(io::Error::last_os_error()).context("binding the AF_PACKET socket");
    }
    Ok(socket)
}

fn set_option<T>(socket: &OwnedFd, level: i32, name: i32, value: T) -> Result<()> {
    // SAFETY: the value outlives the call and its size is given.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            std::mem::size_of::<T>() as libc::socklen_t,
        )
    };
    if set != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("socket option {level}/{name}"));
    }
    Ok(())
}

fn read_all(socket: &OwnedFd, stop: &AtomicBool) -> Result<Recording> {
    let mut recording = Recording::default();
    let mut frame = vec![0u8; FRAME_BYTES];
    loop {
        // Read before receiving: whatever was queued when the stop came is still taken.
        let stopping = stop.load(Ordering::SeqCst);
        match receive(socket, &mut frame) {
            Ok(Some((length, time, bridge))) => {
                if length > frame.len() {
                    bail!("a frame of {length} bytes on the wire is larger than the capture's buffer");
                }
                // The bridge hands frames for itself up as its own: the port has counted them already.
                if !bridge {
                    recording.push(Moment(time), &frame[..length]);
                }
            }
            Ok(None) if stopping => break,
            Ok(None) => {}
            Err(error) => return Err(error).context("reading the wire"),
        }
    }
    let dropped = dropped_frames(socket)?;
    if dropped > 0 {
        bail!("the kernel dropped {dropped} frames of the capture: an absence in it would prove nothing");
    }
    Ok(recording)
}

/// One frame: its length, the kernel's time, and whether the bridge itself (not a port) took it in. `None` when nothing
/// came for a while.
fn receive(socket: &OwnedFd, frame: &mut [u8]) -> io::Result<Option<(usize, Duration, bool)>> {
    let mut control = [0u64; 16];
    // SAFETY: plain data, all zeroes are valid.
    let (mut address, mut message): (libc::sockaddr_ll, libc::msghdr) = unsafe { std::mem::zeroed() };
    let mut parts = [IoSliceMut::new(frame)];
    message.msg_name = (&raw mut address).cast();
    message.msg_namelen = std::mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    message.msg_iov = parts.as_mut_ptr().cast();
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = std::mem::size_of_val(&control);
    // SAFETY: every pointer in the message refers to a local that outlives the call, with its true size.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_TRUNC) };
    if length < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
            _ => Err(error),
        };
    }
    let mut time = Duration::ZERO;
    // SAFETY: the kernel filled the control buffer; CMSG_* walk it within msg_controllen.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_TIMESTAMPNS {
                let stamp: libc::timespec = std::ptr::read_unaligned(libc::CMSG_DATA(header).cast());
                time = Duration::new(stamp.tv_sec as u64, stamp.tv_nsec as u32);
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
    }
    Ok(Some((length as usize, time, address.sll_ifindex == crate::topology::BRIDGE_INDEX)))
}

fn dropped_frames(socket: &OwnedFd) -> Result<u32> {
    // SAFETY: plain data, all zeroes are valid.
    let mut statistics: libc::tpacket_stats = unsafe { std::mem::zeroed() };
    let mut size = std::mem::size_of::<libc::tpacket_stats>() as libc::socklen_t;
    // SAFETY: the buffer and its size are locals that outlive the call.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &mut size,
        )
    };
    if got != 0 {
        return Err(io::Error::last_os_error()).context("PACKET_STATISTICS");
    }
    Ok(statistics.tp_drops)
}
