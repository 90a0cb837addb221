//! What the programs know of one enrolled pod.

use crate::Address;

/// Value of the map `PODS`, whose key is the cookie of the pod's network namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodEntry {
    slot: u32,
    flags: u32,
    v4: Address,
    v6: Address,
}

/// The pod's own agent has not yet seen it published: hold everything.
const HOLD: u32 = 1;

impl PodEntry {
    /// A pod whose listener is in `slot`. Pass [`Address::UNSPECIFIED`] for a family that it has no address of.
    pub const fn new(slot: u32, hold: bool, v4: Address, v6: Address) -> PodEntry {
        PodEntry { slot, flags: if hold { HOLD } else { 0 }, v4, v6 }
    }

    /// Index into the map `SLOTS`.
    #[inline(always)]
    pub const fn slot(&self) -> u32 {
        self.slot
    }

    /// Whether the pod waits to be published: connections that would be let go are captured, and plaintext from
    /// enrolled sources still comes in.
    #[inline(always)]
    pub const fn on_hold(&self) -> bool {
        self.flags & HOLD != 0
    }

    /// The same pod, held or not.
    pub const fn with_hold(mut self, hold: bool) -> PodEntry {
        self.flags = if hold { self.flags | HOLD } else { self.flags & !HOLD };
        self
    }

    /// The IPv4 address, unspecified if there is none.
    #[inline(always)]
    pub const fn v4(&self) -> &Address {
        &self.v4
    }

    /// The IPv6 address, unspecified if there is none.
    #[inline(always)]
    pub const fn v6(&self) -> &Address {
        &self.v6
    }

    /// Whether `address` is one of the pod's own.
    #[inline(always)]
    pub const fn owns(&self, address: &Address) -> bool {
        self.v4.is(address) || self.v6.is(address)
    }

    /// Whether the pod has an address of the family of `other`, without which a captured connection has no source.
    #[inline(always)]
    pub const fn has_family_of(&self, other: &Address) -> bool {
        let own = if other.is_v4() { &self.v4 } else { &self.v6 };
        !own.is(&Address::UNSPECIFIED)
    }
}

#[cfg(feature = "user")]
// SAFETY: words and bytes without padding (the size is checked below), any value is valid.
unsafe impl aya::Pod for PodEntry {}

const _: () = assert!(size_of::<PodEntry>() == 40);

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::Ipv4Addr;

    #[test]
    fn addresses_and_hold() {
        let own: Address = Ipv4Addr::new(10, 0, 0, 2).into();
        let other: Address = Ipv4Addr::new(10, 0, 0, 3).into();
        let v6 = Address::from(core::net::Ipv6Addr::LOCALHOST);
        let pod = PodEntry::new(7, true, own, Address::UNSPECIFIED);
        assert!(pod.owns(&own) && !pod.owns(&other));
        assert!(pod.has_family_of(&other) && !pod.has_family_of(&v6));
        assert!(
            pod.on_hold()
                && !pod.with_hold(false).on_hold()
                && pod.with_hold(false).with_hold(true).on_hold()
        );
        assert_eq!(pod.slot(), 7);
    }
}
