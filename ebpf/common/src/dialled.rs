//! What an application dialled, on its way from the hook that saves it to the hook that decides.

use crate::Address;

/// Value of the map `DIALLED`, which is in the storage of a socket. Counts for the one call of connect() that wrote it:
/// a later one of the same socket, to somewhere else, must not find it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialled {
    address: Address,
    port: u32,
    taken: u32,
}

impl Dialled {
    /// The port as contexts hold it: in network order, in the first two bytes of the word.
    #[inline(always)]
    pub const fn new(address: Address, port: u32) -> Dialled {
        Dialled { address, port, taken: 0 }
    }

    /// Address and port, once.
    #[inline(always)]
    pub const fn take(&mut self) -> Option<(Address, u32)> {
        if self.taken != 0 {
            return None;
        }
        self.taken = 1;
        Some((self.address, self.port))
    }
}

const _: () = assert!(size_of::<Dialled>() == 24);

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::Ipv4Addr;

    #[test]
    fn counts_once() {
        let address = Address::from(Ipv4Addr::new(10, 96, 0, 1));
        let mut dialled = Dialled::new(address, 80);
        assert_eq!(dialled.take(), Some((address, 80)));
        assert_eq!(dialled.take(), None);
    }
}
