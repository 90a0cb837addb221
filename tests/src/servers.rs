//! Small TCP servers for what third-party programs cannot show: who the server thinks is calling, and streams that end
//! in unusual ways. One thread a connection; a test bed has few.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::Result;

use crate::place::Place;
use crate::sockets::{IO_TIMEOUT, canonical, receive_bulk, send_bulk};

/// A listening server. Dropping it stops accepting; open connections go on until their handler ends.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    accepted: Arc<Mutex<Vec<SocketAddr>>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on `port` of `place`, both address families, and gives every connection to `handler` on a thread of its
    /// own. A handler's error ends only its connection.
    pub fn start<F>(place: &Place, port: u16, handler: F) -> Result<Server>
    where
        F: Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
    {
        let listener = place.listen(port)?;
        let accepted = Arc::new(Mutex::new(Vec::new()));
        let handler = Arc::new(handler);
        let thread = std::thread::spawn({
            let (listener, accepted) = (listener.try_clone()?, accepted.clone());
            move || {
                while let Ok((stream, peer)) = listener.accept() {
                    accepted.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(canonical(peer));
                    let handler = handler.clone();
                    std::thread::spawn(move || {
                        let _ = stream.set_read_timeout(Some(4 * IO_TIMEOUT));
                        let _ = stream.set_write_timeout(Some(4 * IO_TIMEOUT));
                        let _ = handler(stream);
                    });
                }
            }
        });
        Ok(Server { listener, accepted, thread: Some(thread) })
    }

    /// Whom the server has seen calling so far, oldest first.
    pub fn callers(&self) -> Vec<SocketAddr> {
        self.accepted.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if crate::bed::keeping() {
            return;
        }
        // SAFETY: shutdown on a listening socket we own; it makes the blocked accept return.
        unsafe { libc::shutdown(self.listener.as_raw_fd(), libc::SHUT_RDWR) };
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sends back what comes, and ends its direction when the caller does.
pub fn echo(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0u8; 16 << 10];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return stream.shutdown(Shutdown::Write);
        }
        stream.write_all(&buffer[..length])?;
    }
}

/// Speaks first: one line `PEER LOCAL` with the two addresses as the server sees them. Then echoes.
pub fn greet(mut stream: TcpStream) -> io::Result<()> {
    let (peer, local) = (canonical(stream.peer_addr()?), canonical(stream.local_addr()?));
    stream.write_all(format!("{peer} {local}\n").as_bytes())?;
    echo(stream)
}

/// Reads to the end and answers with one line: the checksum of what came.
pub fn checksum(mut stream: TcpStream) -> io::Result<()> {
    let sum = receive_bulk(&stream)?;
    stream.write_all(format!("{sum:?}\n").as_bytes())
}

/// A handler that sends `bytes` bytes holding `marker`, then ends its direction and waits for the caller's end.
pub fn source(marker: &[u8], bytes: u64) -> impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static {
    let marker = marker.to_vec();
    move |stream| {
        send_bulk(&stream, &marker, bytes)?;
        stream.shutdown(Shutdown::Write)?;
        receive_bulk(&stream).map(drop)
    }
}
