//! Read buffers lent to whoever has data in hand right now: one small stack of them per thread, so that an idle
//! connection or stream holds none. Used by `tls_io` and `relay`.

use bytes::Bytes;
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Bytes in one buffer: one read of a socket. Larger ones fall out of the second-level cache before they are decrypted.
pub(crate) const SIZE: usize = 128 << 10;

/// Buffers a thread keeps for later: what one busy tunnel has in flight.
const KEEP: usize = 8;

thread_local!(static FREE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) });

/// A borrowed buffer of [`SIZE`] bytes; its contents are stale bytes of earlier uses. Given back when dropped.
#[derive(Debug)]
pub(crate) struct Scratch(Box<[u8]>);

impl Scratch {
    pub fn take() -> Self {
        Self(FREE.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; SIZE].into_boxed_slice()))
    }

    /// The first `length` bytes, without copying; the buffer comes back when the last clone is dropped.
    pub fn freeze(self, length: usize) -> Bytes {
        struct Front(Scratch, usize);
        impl AsRef<[u8]> for Front {
            fn as_ref(&self) -> &[u8] {
                &self.0[..self.1]
            }
        }
        Bytes::from_owner(Front(self, length.min(SIZE)))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        // While the thread ends its list may be gone already; then the buffer is simply freed.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEEP {
                free.push(buffer);
            }
        });
    }
}

impl Deref for Scratch {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
