//! TLS over TCP as h2 sees it: rustls driven by hand, so that one system call moves many records.
//!
//! Reading takes up to a scratch buffer's worth from the socket and feeds rustls, which by itself reads 4 KiB at a time.
//! Writing only queues: h2 flushes after every frame, which would make each frame a record and a system call. Whoever
//! polls the h2 connection calls [`TlsIo::flush`] when h2 has nothing more to say in this turn ([`Flushed`] does), and
//! then everything leaves in one vectored write.

use crate::scratch::Scratch;
use crate::verify::PeerRefused;
use rustls::Connection;
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io::{self, BufRead, IoSlice, Write};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Queued bytes from which on writing waits for the socket.
const HIGH_WATER: usize = 256 << 10;

/// Pieces smaller than this are gathered into one record; larger ones are encrypted where they are.
const GATHER: usize = 4 << 10;

/// Plaintext handed to h2 in one turn. After that the streams' tasks get theirs written and their windows opened again,
/// while the sender works on: a whole window at a time would make the two ends take turns.
const TURN: usize = 256 << 10;

/// The plaintext of one TLS record (RFC 8446, 5.1).
const RECORD: usize = 16 << 10;

/// A TLS connection. Clones are the same connection: h2 holds one, the task that flushes another.
#[derive(Clone)]
pub(crate) struct TlsIo(Rc<RefCell<Inner>>);

struct Inner {
    tcp: TcpStream,
    tls: Connection,
    /// Ciphertext read from the socket and not yet given to rustls.
    inbox: Option<Inbox>,
    /// Small writes that wait to share a record.
    gathered: Vec<u8>,
    /// About how much ciphertext waits in rustls.
    queued: usize,
    closing: bool,
    /// Bytes left to read in this turn.
    turn: usize,
    failed: Option<(io::ErrorKind, String)>,
    /// What TLS itself found wrong; h2 keeps only the text of errors.
    refused: Option<PeerRefused>,
}

struct Inbox {
    buffer: Scratch,
    at: usize,
    end: usize,
}

impl TlsIo {
    /// Runs the handshake. The caller bounds its time.
    pub async fn handshake(tcp: TcpStream, mut tls: Connection) -> Result<Self, PeerRefused> {
        // What waits to be sent is bounded by HIGH_WATER here.
        tls.set_buffer_limit(None);
        let mut inner = Inner {
            tcp,
            tls,
            inbox: None,
            gathered: Vec::new(),
            queued: 0,
            closing: false,
            turn: TURN,
            failed: None,
            refused: None,
        };
        poll_fn(|cx| inner.poll_handshake(cx)).await?;
        Ok(Self(Rc::new(RefCell::new(inner))))
    }

    /// Looks at the session, for instance at the peer's certificate.
    pub fn with_session<R>(&self, look: impl FnOnce(&rustls::CommonState) -> R) -> R {
        look(&self.0.borrow().tls)
    }

    /// What TLS found wrong after the handshake, for instance the peer's alert.
    pub fn refused(&self) -> Option<PeerRefused> {
        self.0.borrow().refused.clone()
    }

    /// Ends a turn: sends what is queued, as far as the socket takes it, and arranges to be woken for the rest.
    pub fn flush(&self, cx: &mut Context<'_>) {
        let inner = &mut *self.0.borrow_mut();
        inner.turn = TURN;
        if let Poll::Ready(Err(e)) = inner.poll_drain(cx) {
            // h2 learns of it from its next read or write.
            inner.fail(&e);
            cx.waker().wake_by_ref();
        }
    }
}

impl Inner {
    fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), PeerRefused>> {
        let lost = |e: io::Error| match e.get_ref().and_then(|e| e.downcast_ref::<PeerRefused>()) {
            Some(refused) => refused.clone(),
            None if e.kind() == io::ErrorKind::UnexpectedEof => PeerRefused::Closed,
            None => PeerRefused::Tls(e.to_string()),
        };
        loop {
            let sent = self.poll_drain(cx).map_err(lost)?;
            if !self.tls.is_handshaking() {
                return sent.map(Ok);
            }
            if !ready!(self.poll_feed(cx)).map_err(lost)? {
                return Poll::Ready(Err(PeerRefused::Closed));
            }
        }
    }

    /// Gives rustls the next ciphertext, from the inbox or else the socket. False at the end of the TCP stream.
    fn poll_feed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if self.inbox.is_none() {
            ready!(self.tcp.poll_read_ready(cx))?;
            let mut buffer = Scratch::take();
            let mut space = ReadBuf::new(&mut buffer);
            ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut space))?;
            let end = space.filled().len();
            if end == 0 {
                self.tls.read_tls(&mut io::empty())?;
                return Poll::Ready(Ok(false));
            }
            self.inbox = Some(Inbox { buffer, at: 0, end });
        }
        let Some(inbox) = &mut self.inbox else { return Poll::Ready(Ok(true)) };
        inbox.at += self.tls.read_tls(&mut &inbox.buffer[inbox.at..inbox.end])?;
        if inbox.at == inbox.end {
            self.inbox = None;
        }
        if let Err(e) = self.tls.process_new_packets() {
            // The alert that tells the peer why.
            let _ = self.poll_drain(cx);
            let refused = PeerRefused::from(e);
            self.refused = Some(refused.clone());
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, refused)));
        }
        Poll::Ready(Ok(true))
    }

    /// Encrypts what was gathered followed by `more`, in as few records as they fit.
    fn encrypt(&mut self, more: &[IoSlice<'_>]) -> io::Result<()> {
        let total = self.gathered.len() + more.iter().map(|b| b.len()).sum::<usize>();
        if total == 0 {
            return Ok(());
        }
        let gathered = std::mem::take(&mut self.gathered);
        let mut pieces = Vec::with_capacity(more.len() + 1);
        if !gathered.is_empty() {
            pieces.push(IoSlice::new(&gathered));
        }
        pieces.extend(more.iter().map(|b| IoSlice::new(b)));
        let taken = self.tls.writer().write_vectored(&pieces)?;
        debug_assert_eq!(taken, total, "rustls has no buffer limit here");
        self.queued += total;
        Ok(())
    }

    /// Writes ciphertext until none is left.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.encrypt(&[])?;
        while self.tls.wants_write() {
            let mut socket = Socket { tcp: &mut self.tcp, cx };
            match self.tls.write_tls(&mut socket) {
                Ok(sent) => self.queued = self.queued.saturating_sub(sent),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
        self.queued = 0;
        Poll::Ready(Ok(()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, pieces: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.check()?;
        if self.queued + self.gathered.len() >= HIGH_WATER {
            // Partial progress is enough to go on with.
            if let Poll::Ready(Err(e)) = self.poll_drain(cx) {
                return Poll::Ready(Err(e));
            }
            if self.queued >= HIGH_WATER {
                return Poll::Pending;
            }
        }
        // Full records at once; a small rest waits for what follows it, or for the end of the turn.
        let total: usize = pieces.iter().map(|b| b.len()).sum();
        let sum = self.gathered.len() + total;
        let now = match sum % RECORD {
            _ if total < GATHER && sum <= RECORD => 0,
            rest if rest < GATHER => total.saturating_sub(rest),
            _ => total,
        };
        let mut skip = now;
        if now > 0 || sum > RECORD {
            let mut left = now;
            let head: Vec<_> = pieces
                .iter()
                .map(|piece| {
                    let part = &piece[..piece.len().min(left)];
                    left -= part.len();
                    IoSlice::new(part)
                })
                .collect();
            self.encrypt(&head)?;
        }
        for piece in pieces {
            let done = skip.min(piece.len());
            skip -= done;
            self.gathered.extend_from_slice(&piece[done..]);
        }
        Poll::Ready(Ok(total))
    }

    fn fail(&mut self, e: &io::Error) {
        self.failed.get_or_insert_with(|| (e.kind(), e.to_string()));
    }

    fn check(&self) -> io::Result<()> {
        match &self.failed {
            Some((kind, why)) => Err(io::Error::new(*kind, why.clone())),
            None => Ok(()),
        }
    }
}

/// The socket as rustls writes to it: does not wait, but leaves the waker behind.
struct Socket<'a, 'b, 'c> {
    tcp: &'a mut TcpStream,
    cx: &'b mut Context<'c>,
}

impl Write for Socket<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match Pin::new(&mut *self.tcp).poll_write_vectored(self.cx, pieces) {
            Poll::Ready(result) => result,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsyncRead for TlsIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let inner = &mut *self.0.borrow_mut();
        if inner.turn == 0 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = out.filled().len();
        loop {
            let mut reader = inner.tls.reader();
            match reader.fill_buf() {
                // The peer's close_notify.
                Ok([]) => return Poll::Ready(Ok(())),
                Ok(plain) => {
                    let n = plain.len().min(out.remaining());
                    out.put_slice(&plain[..n]);
                    reader.consume(n);
                    inner.turn = inner.turn.saturating_sub(n);
                    if out.remaining() == 0 || inner.turn == 0 {
                        return Poll::Ready(Ok(()));
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let got_some = out.filled().len() > before;
                    // Do not ask the socket again while the caller could work on what it has.
                    if got_some && inner.inbox.is_none() {
                        return Poll::Ready(Ok(()));
                    }
                    if !got_some {
                        inner.check()?;
                    }
                    match inner.poll_feed(cx) {
                        Poll::Ready(Ok(_)) => {}
                        Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                        Poll::Pending => return Poll::Pending,
                    }
                }
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }
}

impl AsyncWrite for TlsIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Nothing: see the top of this file.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.borrow().check())
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let inner = &mut *self.0.borrow_mut();
        inner.check()?;
        inner.encrypt(&[])?;
        if !std::mem::replace(&mut inner.closing, true) {
            inner.tls.send_close_notify();
        }
        ready!(inner.poll_drain(cx))?;
        Pin::new(&mut inner.tcp).poll_shutdown(cx)
    }
}

/// A future over an h2 connection, with its output flushed at the end of each turn.
pub(crate) struct Flushed<F> {
    pub io: TlsIo,
    pub work: F,
}

impl<F: Future + Unpin> Future for Flushed<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let result = Pin::new(&mut self.work).poll(cx);
        self.io.flush(cx);
        result
    }
}
