//! How a connection is named by both of its ends: by the socket that makes it and by the lookup in the pod it goes to.

use crate::Address;

/// Key of the map `PROBES`: a connection that the kubelet is making. Ports are in host order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeKey {
    client: Address,
    pod: Address,
    client_port: u16,
    pod_port: u16,
}

impl ProbeKey {
    /// No connection: what a socket has until it makes one, and after.
    pub const NONE: ProbeKey = ProbeKey::new(Address::UNSPECIFIED, 0, Address::UNSPECIFIED, 0);

    #[inline(always)]
    pub const fn new(client: Address, client_port: u16, pod: Address, pod_port: u16) -> ProbeKey {
        ProbeKey { client, pod, client_port, pod_port }
    }

    /// Nothing connects to port zero.
    #[inline(always)]
    pub const fn is_none(&self) -> bool {
        self.pod_port == 0
    }
}

#[cfg(feature = "user")]
// SAFETY: bytes and two short words without padding (the size is checked below), any value is valid.
unsafe impl aya::Pod for ProbeKey {}

const _: () = assert!(size_of::<ProbeKey>() == 36);

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::Ipv4Addr;

    #[test]
    fn none_is_no_connection() {
        let [client, pod]: [Address; 2] =
            [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)].map(Into::into);
        assert!(ProbeKey::NONE.is_none());
        assert!(!ProbeKey::new(client, 40000, pod, 80).is_none());
    }
}
