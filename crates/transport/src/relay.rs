//! Copies bytes between an application's socket and a tunnelled stream (or another socket), each direction at its own
//! pace: half-close passes in either direction, a reset on one side resets the other, and what a reader does not take
//! stays with its sender but for one window.
//!
//! Application sockets linger for zero seconds until both directions have ended well. So an agent that is killed, or a
//! relay that is dropped, resets its applications; an orderly end would make them believe they had received everything.

use crate::scratch::{self, Scratch};
use crate::stream::{self, Stream, StreamError};
use bytes::{Buf, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use socket2::SockRef;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::Notify;

/// Bytes gathered for one write to an application that keeps up.
const BATCH: usize = 256 << 10;

/// Pieces smaller than this are copied together while an application does not take them: each would hold the whole frame
/// buffer it is part of.
const SMALL: usize = 4 << 10;

/// Most pieces in one write.
const PIECES: usize = 32;

/// What one connection has carried so far. Live while it is open, and readable from any thread; written by one only.
#[derive(Debug, Default)]
pub struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Counters {
    /// Bytes read from the application (the first socket, for [`relay_plain`]) and handed on.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes written to the application (the first socket, for [`relay_plain`]).
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

/// With a single writer a plain addition will do, which costs no bus lock.
fn add(counter: &AtomicU64, n: usize) {
    counter.store(counter.load(Ordering::Relaxed) + n as u64, Ordering::Relaxed);
}

/// Why a relay ended before both sides had finished.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    #[error("the application's connection failed: {0}")]
    App(#[source] io::Error),
    #[error("the other connection failed: {0}")]
    Other(#[source] io::Error),
    #[error(transparent)]
    Tunnel(#[from] StreamError),
}

impl RelayError {
    /// A short constant label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::App(_) => "application_reset",
            Self::Other(_) => "other_reset",
            Self::Tunnel(e) => e.reason(),
        }
    }
}

/// Copies both ways until both sides have ended or one failed. Counters are seen from the application.
pub async fn relay(mut app: TcpStream, tunnel: Stream, counters: &Counters) -> Result<(), RelayError> {
    reset_on_close(&app, true).map_err(RelayError::App)?;
    let Stream { mut send, recv, chunks, _lease } = tunnel;
    let down_ended = Notify::new();
    let result = {
        let (reader, writer) = app.split();
        tokio::try_join!(
            up(reader, &mut send, chunks, &counters.sent, &down_ended),
            down(recv, writer, &counters.received, &down_ended),
        )
    };
    match result {
        Ok(_) => reset_on_close(&app, false).map_err(RelayError::App),
        Err(e) => {
            // RFC 9113, 8.5: a TCP error, a reset included, is a stream error of this type. Nothing happens where the
            // stream is over already.
            send.send_reset(Reason::CONNECT_ERROR);
            Err(e)
        }
    }
}

/// Copies both ways between two sockets; resets of one are passed on to the other.
pub async fn relay_plain(mut a: TcpStream, mut b: TcpStream, counters: &Counters) -> Result<(), RelayError> {
    reset_on_close(&a, true).map_err(RelayError::App)?;
    reset_on_close(&b, true).map_err(RelayError::Other)?;
    {
        let (a_ended, b_ended) = (Notify::new(), Notify::new());
        let ((from_a, to_a), (from_b, to_b)) = (a.split(), b.split());
        tokio::try_join!(
            copy(from_a, to_b, &counters.sent, (&a_ended, &b_ended), (RelayError::App, RelayError::Other)),
            copy(
                from_b,
                to_a,
                &counters.received,
                (&b_ended, &a_ended),
                (RelayError::Other, RelayError::App)
            ),
        )?;
    }
    reset_on_close(&a, false).map_err(RelayError::App)?;
    reset_on_close(&b, false).map_err(RelayError::Other)
}

fn reset_on_close(socket: &TcpStream, reset: bool) -> io::Result<()> {
    SockRef::from(socket).set_linger(reset.then_some(Duration::ZERO))
}

/// Resolves when a socket was reset, also while nobody reads from it.
async fn failure(socket: &TcpStream) -> io::Error {
    match socket.ready(Interest::ERROR).await {
        Ok(_) => socket.take_error().ok().flatten().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
        Err(e) => e,
    }
}

/// From the application into the tunnel.
async fn up(
    mut app: ReadHalf<'_>,
    send: &mut SendStream<Bytes>,
    chunks: (usize, usize),
    sent: &AtomicU64,
    down_ended: &Notify,
) -> Result<(), RelayError> {
    let mut chunk = Chunk::new(chunks);
    loop {
        // No buffer, and no share of the window, while there is nothing to send.
        poll_fn(|cx| {
            match send.poll_reset(cx) {
                Poll::Ready(Ok(reason)) => return Poll::Ready(Err(StreamError::Reset(reason).into())),
                Poll::Ready(Err(e)) => return Poll::Ready(Err(StreamError::from(e).into())),
                Poll::Pending => {}
            }
            app.as_ref().poll_read_ready(cx).map_err(RelayError::App)
        })
        .await?;
        send.reserve_capacity(chunk.size);
        let room = match send.capacity() {
            0 => tokio::select! {
                biased;
                room = stream::capacity(send, chunk.size) => room?,
                e = failure(app.as_ref()) => return Err(RelayError::App(e)),
            },
            room => room.min(chunk.size),
        };
        let read = poll_fn(|cx| {
            Poll::Ready(match chunk.poll_read(cx, &mut app, room) {
                Poll::Ready(result) => Some(result),
                Poll::Pending => None,
            })
        });
        match read.await.transpose().map_err(RelayError::App)? {
            Some(bytes) if bytes.is_empty() => break,
            Some(bytes) => {
                add(sent, bytes.len());
                send.send_data(bytes, false).map_err(StreamError::from)?;
            }
            None => {}
        }
        send.reserve_capacity(0);
    }
    send.send_data(Bytes::new(), true).map_err(StreamError::from)?;
    // Nothing is left to read, but a reset must still be noticed.
    tokio::select! {
        biased;
        () = down_ended.notified() => Ok(()),
        e = failure(app.as_ref()) => Err(RelayError::App(e)),
    }
}

/// How much to read at once, and into what.
struct Chunk {
    size: usize,
    bounds: (usize, usize),
    /// Reads in a row that left most of the chunk empty.
    sparse: u8,
}

impl Chunk {
    fn new(bounds: (usize, usize)) -> Self {
        let least = bounds.0.clamp(1, scratch::SIZE);
        Self { size: least, bounds: (least, bounds.1.clamp(least, scratch::SIZE)), sparse: 0 }
    }

    /// Reads up to `room` bytes; none at the end.
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        app: &mut ReadHalf<'_>,
        room: usize,
    ) -> Poll<io::Result<Bytes>> {
        let mut scratch = Scratch::take();
        let mut space = ReadBuf::new(&mut scratch[..room]);
        std::task::ready!(Pin::new(app).poll_read(cx, &mut space))?;
        let filled = space.filled();
        // What waits to be sent is about as large as what was read: a scratch buffer goes along only if it is well used.
        let bytes = if filled.len() < scratch::SIZE / 4 {
            Bytes::copy_from_slice(filled)
        } else {
            let length = filled.len();
            scratch.freeze(length)
        };
        self.adapt(bytes.len(), room);
        Poll::Ready(Ok(bytes))
    }

    fn adapt(&mut self, read: usize, room: usize) {
        self.sparse = if read < self.size / 4 && room == self.size { self.sparse + 1 } else { 0 };
        if read == self.size {
            self.size = (self.size * 4).min(self.bounds.1);
        } else if self.sparse == 8 {
            self.size = (self.size / 4).max(self.bounds.0);
            self.sparse = 0;
        }
    }
}

/// From the tunnel to the application.
async fn down(
    mut recv: RecvStream,
    mut app: WriteHalf<'_>,
    received: &AtomicU64,
    ended: &Notify,
) -> Result<(), RelayError> {
    let mut queue = Queue::default();
    let mut last = false;
    poll_fn(|cx| {
        let mut most = BATCH;
        loop {
            while !last && queue.bytes < most {
                match recv.poll_data(cx) {
                    Poll::Ready(Some(Ok(data))) => queue.push(data),
                    Poll::Ready(Some(Err(e))) => return Poll::Ready(Err(StreamError::from(e).into())),
                    Poll::Ready(None) => last = true,
                    Poll::Pending => break,
                }
            }
            if queue.bytes == 0 {
                return if last { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
            match queue.poll_write(cx, &mut app) {
                Poll::Ready(Ok(n)) => {
                    add(received, n);
                    // Only now may the sender send more. Fails only for more than was received.
                    let _ = recv.flow_control().release_capacity(n);
                    most = BATCH;
                }
                Poll::Ready(Err(e)) => return Poll::Ready(Err(RelayError::App(e))),
                // Small frames cost h2 far more than they hold: take them over and pack them. The window bounds it.
                Poll::Pending if most == BATCH => most = usize::MAX,
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await?;
    app.shutdown().await.map_err(RelayError::App)?;
    ended.notify_one();
    Ok(())
}

/// Received bytes that the application has not taken yet.
#[derive(Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    packed: BytesMut,
    bytes: usize,
}

impl Queue {
    fn push(&mut self, data: Bytes) {
        self.bytes += data.len();
        if data.is_empty() {
        } else if self.bytes > data.len() && data.len() < SMALL {
            self.packed.extend_from_slice(&data);
            if self.packed.len() >= SMALL {
                self.seal();
            }
        } else {
            self.seal();
            self.pieces.push_back(data);
        }
    }

    fn seal(&mut self) {
        if !self.packed.is_empty() {
            self.pieces.push_back(std::mem::take(&mut self.packed).freeze());
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, app: &mut WriteHalf<'_>) -> Poll<io::Result<usize>> {
        self.seal();
        let written = if let [only] = self.pieces.make_contiguous() {
            std::task::ready!(Pin::new(app).poll_write(cx, only))?
        } else {
            let mut slices = [IoSlice::new(&[]); PIECES];
            for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
                *slice = IoSlice::new(piece);
            }
            let count = self.pieces.len().min(PIECES);
            std::task::ready!(Pin::new(app).poll_write_vectored(cx, &slices[..count]))?
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.bytes -= written;
        let mut left = written;
        while let Some(front) = self.pieces.front_mut() {
            if front.len() > left {
                front.advance(left);
                break;
            }
            left -= front.len();
            self.pieces.pop_front();
        }
        if self.pieces.is_empty() && self.pieces.capacity() > PIECES {
            self.pieces = VecDeque::new();
        }
        Poll::Ready(Ok(written))
    }
}

/// Names the socket that failed.
type Failed = fn(io::Error) -> RelayError;

/// One direction between two sockets.
async fn copy(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    counter: &AtomicU64,
    (ended, other_ended): (&Notify, &Notify),
    (from_failed, to_failed): (Failed, Failed),
) -> Result<(), RelayError> {
    loop {
        poll_fn(|cx| from.as_ref().poll_read_ready(cx)).await.map_err(from_failed)?;
        let mut scratch = Scratch::take();
        let read = poll_fn(|cx| {
            let mut space = ReadBuf::new(&mut scratch);
            Poll::Ready(match Pin::new(&mut from).poll_read(cx, &mut space) {
                Poll::Ready(Ok(())) => Ok(Some(space.filled().len())),
                Poll::Ready(Err(e)) => Err(e),
                Poll::Pending => Ok(None),
            })
        });
        match read.await.map_err(from_failed)? {
            None => {}
            Some(0) => break,
            Some(n) => {
                let written = poll_fn(|cx| {
                    Poll::Ready(match Pin::new(&mut to).poll_write(cx, &scratch[..n]) {
                        Poll::Ready(result) => result,
                        Poll::Pending => Ok(0),
                    })
                });
                let written = written.await.map_err(to_failed)?;
                if written < n {
                    // A buffer of its own size for what must wait, and the large one back.
                    let rest = Bytes::copy_from_slice(&scratch[written..n]);
                    drop(scratch);
                    tokio::select! {
                        biased;
                        result = to.write_all(&rest) => result.map_err(to_failed)?,
                        e = failure(from.as_ref()) => return Err(from_failed(e)),
                    }
                }
                add(counter, n);
            }
        }
    }
    to.shutdown().await.map_err(to_failed)?;
    ended.notify_one();
    tokio::select! {
        biased;
        () = other_ended.notified() => Ok(()),
        e = failure(from.as_ref()) => Err(from_failed(e)),
    }
}
