//! One byte stream inside a tunnel, the same on both sides. Made by `pool` and `server`, used up by `relay`, or directly
//! by callers with bytes of their own.

use crate::pool::Lease;
use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use std::future::poll_fn;

/// Why a stream ended early.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StreamError {
    #[error("the far side reset the stream ({0})")]
    Reset(Reason),
    #[error("the tunnel broke: {0}")]
    Tunnel(String),
}

impl StreamError {
    /// A short constant label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Reset(_) => "reset_by_peer",
            Self::Tunnel(_) => "tunnel_broke",
        }
    }
}

impl From<h2::Error> for StreamError {
    fn from(e: h2::Error) -> Self {
        match e.reason() {
            Some(reason) if e.is_reset() => Self::Reset(reason),
            _ => Self::Tunnel(e.to_string()),
        }
    }
}

/// A tunnelled byte stream. Dropping it before both directions have ended resets it.
#[derive(Debug)]
pub struct Stream {
    pub(crate) send: SendStream<Bytes>,
    pub(crate) recv: RecvStream,
    pub(crate) chunks: (usize, usize),
    /// A client's place in its tunnel.
    pub(crate) _lease: Option<Lease>,
}

impl Stream {
    /// Sends all of `bytes`, as fast as the far side takes them.
    pub async fn send(&mut self, mut bytes: Bytes) -> Result<(), StreamError> {
        while !bytes.is_empty() {
            let capacity = capacity(&mut self.send, bytes.len()).await?;
            self.send.send_data(bytes.split_to(capacity.min(bytes.len())), false)?;
        }
        Ok(())
    }

    /// Ends this direction; the other goes on.
    pub fn finish(&mut self) -> Result<(), StreamError> {
        Ok(self.send.send_data(Bytes::new(), true)?)
    }

    /// The next bytes, or `None` at the end of the far side's direction.
    pub async fn recv(&mut self) -> Option<Result<Bytes, StreamError>> {
        let data = self.recv.data().await?;
        Some(data.map_err(StreamError::from).inspect(|data| {
            // Fails only for more than was received.
            let _ = self.recv.flow_control().release_capacity(data.len());
        }))
    }

    /// Ends both directions as a TCP reset would.
    pub fn reset(mut self) {
        self.send.send_reset(Reason::CONNECT_ERROR);
    }
}

/// Waits until up to `want` bytes, and at least one, may be sent.
pub(crate) async fn capacity(send: &mut SendStream<Bytes>, want: usize) -> Result<usize, StreamError> {
    send.reserve_capacity(want);
    loop {
        let ready = send.capacity();
        if ready > 0 {
            return Ok(ready.min(want));
        }
        match poll_fn(|cx| send.poll_capacity(cx)).await {
            Some(Ok(_)) => {}
            Some(Err(e)) => return Err(e.into()),
            // The stream's sending side is over: reset by the far side, or the tunnel is gone.
            None => {
                return match poll_fn(|cx| send.poll_reset(cx)).await {
                    Ok(reason) => Err(StreamError::Reset(reason)),
                    Err(e) => Err(e.into()),
                };
            }
        }
    }
}
