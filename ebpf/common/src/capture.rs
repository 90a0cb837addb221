//! The capture set: which destinations go to the agent.

use crate::Address;
use core::net::{IpAddr, SocketAddr};

/// What to do with a connection to a destination. The numbers are part of the layout. One that programs do not know is
/// no reason for them to capture.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// The agent carries it, or refuses it.
    Capture = 1,
    /// Never captured: configured external networks.
    Exempt = 2,
    /// Known not to need the mesh: plain kernel TCP, but captured while the pod is on hold.
    LetGo = 3,
    /// As `LetGo`, but for the ports of this address that have an entry of their own.
    ByPort = 4,
    /// As `ByPort`, and but for the ports that have an entry for every node's address.
    Node = 5,
}

impl Verdict {
    /// From a map value; `None` for a number that this layout does not have.
    pub const fn from_u32(number: u32) -> Option<Verdict> {
        match number {
            1 => Some(Verdict::Capture),
            2 => Some(Verdict::Exempt),
            3 => Some(Verdict::LetGo),
            4 => Some(Verdict::ByPort),
            5 => Some(Verdict::Node),
            _ => None,
        }
    }
}

/// What a destination is looked up by. The family is part of it so that the prefix `::/0` does not take in the
/// whole of IPv4, which is mapped into it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CaptureKey {
    /// Protocol number, family, port in network order: one word, so that the address stays aligned. A port of zero
    /// stands for all of them; a family of zero for a port of every node, whatever its address.
    head: [u8; 4],
    address: Address,
}

/// Bits of [`CaptureKey`] before the address.
const HEAD_BITS: u32 = 32;
/// Bits of a v4-mapped address before the IPv4 one.
const MAPPED_BITS: u32 = 96;
const TCP: u8 = 6;
const ANY_FAMILY: u8 = 0;

impl CaptureKey {
    /// The key of a TCP destination, whatever its port.
    #[inline(always)]
    pub const fn tcp(address: Address) -> CaptureKey {
        CaptureKey::tcp_port(address, [0, 0])
    }

    /// The key of one port, in network order, of a TCP destination.
    #[inline(always)]
    pub const fn tcp_port(address: Address, [high, low]: [u8; 2]) -> CaptureKey {
        let family = if address.is_v4() { 4 } else { 6 };
        CaptureKey { head: [TCP, family, high, low], address }
    }

    /// The key of one port, in network order, of every node.
    #[inline(always)]
    pub const fn node_port([high, low]: [u8; 2]) -> CaptureKey {
        CaptureKey { head: [TCP, ANY_FAMILY, high, low], address: Address::UNSPECIFIED }
    }
}

/// What an entry is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CaptureTarget {
    /// Every port of every address in a network, by its prefix length.
    Network(IpAddr, u8),
    /// One port of an address.
    Port(SocketAddr),
    /// One port of every node.
    NodePort(u16),
}

/// A key of the longest-prefix map: the kernel wants the length in bits, in host order, before the data.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LpmKey {
    bits: u32,
    key: CaptureKey,
}

impl LpmKey {
    /// To look an address up: all bits count.
    #[inline(always)]
    pub const fn lookup(key: CaptureKey) -> LpmKey {
        LpmKey { bits: HEAD_BITS + 128, key }
    }

    /// The entry for TCP to `target`. `None` if a prefix is longer than its address, or a port is zero.
    /// Host bits must be zero already: the kernel keeps them, and would give them back when listing.
    pub fn tcp(target: CaptureTarget) -> Option<LpmKey> {
        Some(match target {
            CaptureTarget::Network(network, prefix) => {
                let prefix = u32::from(prefix);
                let bits = match network {
                    IpAddr::V4(_) if prefix <= 32 => HEAD_BITS + MAPPED_BITS + prefix,
                    IpAddr::V6(_) if prefix <= 128 => HEAD_BITS + prefix,
                    _ => return None,
                };
                let family = if network.is_ipv4() { 4 } else { 6 };
                LpmKey { bits, key: CaptureKey { head: [TCP, family, 0, 0], address: network.into() } }
            }
            CaptureTarget::Port(at) if at.port() != 0 => {
                LpmKey::lookup(CaptureKey::tcp_port(at.ip().into(), at.port().to_be_bytes()))
            }
            CaptureTarget::NodePort(port) if port != 0 => {
                LpmKey::lookup(CaptureKey::node_port(port.to_be_bytes()))
            }
            CaptureTarget::Port(_) | CaptureTarget::NodePort(_) => return None,
        })
    }

    /// Length in bits and data, as aya's own key type wants them.
    pub const fn into_parts(self) -> (u32, CaptureKey) {
        (self.bits, self.key)
    }

    /// The reverse of [`LpmKey::into_parts`].
    pub const fn from_parts(bits: u32, key: CaptureKey) -> LpmKey {
        LpmKey { bits, key }
    }

    /// What the entry is for; `None` if it is not for TCP or not well-formed.
    pub fn target(&self) -> Option<CaptureTarget> {
        let octets = self.key.address.octets();
        let [protocol, family, high, low] = self.key.head;
        let port = u16::from_be_bytes([high, low]);
        let whole = HEAD_BITS + 128;
        let network = |network: IpAddr, prefix: Option<u32>| {
            Some(CaptureTarget::Network(network, u8::try_from(prefix?).ok()?))
        };
        match (protocol, family, port) {
            (TCP, 4, 0) => network(
                [octets[12], octets[13], octets[14], octets[15]].into(),
                self.bits.checked_sub(HEAD_BITS + MAPPED_BITS),
            ),
            (TCP, 6, 0) => network(octets.into(), self.bits.checked_sub(HEAD_BITS)),
            (TCP, 4 | 6, _) if self.bits == whole => {
                Some(CaptureTarget::Port(SocketAddr::new(self.key.address.into(), port)))
            }
            (TCP, ANY_FAMILY, 1..) if self.bits == whole => Some(CaptureTarget::NodePort(port)),
            _ => None,
        }
    }
}

#[cfg(feature = "user")]
// SAFETY: words and bytes without padding (the sizes are checked below), any value is valid.
unsafe impl aya::Pod for CaptureKey {}
#[cfg(feature = "user")]
// SAFETY: as above.
unsafe impl aya::Pod for LpmKey {}

const _: () = assert!(size_of::<CaptureKey>() == 20 && size_of::<LpmKey>() == 24);

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// What the kernel's map does: the first `bits` bits of the data are equal.
    fn matches(entry: &LpmKey, looked_up: &LpmKey) -> bool {
        let data = |k: &LpmKey| -> u128 { u128::from_be_bytes(k.key.address.octets()) };
        let bits = entry.bits - HEAD_BITS;
        let mask = if bits == 0 { 0 } else { u128::MAX << (128 - bits) };
        entry.key.head == looked_up.key.head && data(entry) & mask == data(looked_up) & mask
    }

    fn network(network: &str, prefix: u8) -> CaptureTarget {
        CaptureTarget::Network(ip(network), prefix)
    }

    #[test]
    fn prefixes_match_their_own_family_only() {
        for (of, prefix, address, expected) in [
            ("10.0.0.0", 8, "10.9.8.7", true),
            ("10.0.0.0", 8, "11.0.0.1", false),
            ("10.0.0.5", 32, "10.0.0.5", true),
            ("10.0.0.5", 32, "10.0.0.6", false),
            ("0.0.0.0", 0, "1.2.3.4", true),
            ("0.0.0.0", 0, "2001:db8::1", false),
            ("::", 0, "2001:db8::1", true),
            ("::", 0, "1.2.3.4", false),
            ("2001:db8::", 32, "2001:db8:1::1", true),
            ("2001:db8::", 32, "2001:db9::1", false),
        ] {
            let entry = LpmKey::tcp(network(of, prefix)).unwrap();
            let key = LpmKey::lookup(CaptureKey::tcp(ip(address).into()));
            assert_eq!(matches(&entry, &key), expected, "{address} in {of}/{prefix}");
            assert_eq!(entry.target(), Some(network(of, prefix)));
        }
    }

    #[test]
    fn a_port_is_looked_up_by_entries_for_ports_only() {
        let port = 0x1f90_u16;
        for (address, everywhere) in [("192.0.2.1", "0.0.0.0"), ("2001:db8::1", "::")] {
            let at = CaptureTarget::Port(SocketAddr::new(ip(address), port));
            let (entry, range) = (LpmKey::tcp(at).unwrap(), LpmKey::tcp(network(everywhere, 0)).unwrap());
            let node = LpmKey::tcp(CaptureTarget::NodePort(port)).unwrap();
            assert_eq!((entry.target(), node.target()), (Some(at), Some(CaptureTarget::NodePort(port))));
            let key =
                |port: u16| LpmKey::lookup(CaptureKey::tcp_port(ip(address).into(), port.to_be_bytes()));
            assert!(matches(&entry, &key(port)) && !matches(&entry, &key(0x901f)));
            // Neither takes the other's connections, nor a range that of either.
            let whole = LpmKey::lookup(CaptureKey::tcp(ip(address).into()));
            let node_key = |port: u16| LpmKey::lookup(CaptureKey::node_port(port.to_be_bytes()));
            for wrong in [&whole, &node_key(port)] {
                assert!(!matches(&entry, wrong));
            }
            assert!(
                matches(&range, &whole) && !matches(&range, &key(port)) && !matches(&range, &node_key(port))
            );
            assert!(matches(&node, &node_key(port)) && !matches(&node, &node_key(0x901f)));
        }
    }

    #[test]
    fn an_impossible_target_is_no_key() {
        let nowhere = CaptureTarget::Port(SocketAddr::new(ip("192.0.2.1"), 0));
        for target in [network("10.0.0.0", 33), network("::", 129), nowhere, CaptureTarget::NodePort(0)] {
            assert_eq!(LpmKey::tcp(target), None, "{target:?}");
        }
        for head in [[0; 4], [TCP, ANY_FAMILY, 0, 0], [TCP, 5, 0, 0], [TCP, 4, 0, 1]] {
            let odd =
                LpmKey { bits: HEAD_BITS + 64, key: CaptureKey { head, address: Address::UNSPECIFIED } };
            assert_eq!(odd.target(), None, "{head:?}");
        }
    }

    #[test]
    fn verdicts_survive_the_map() {
        for verdict in [Verdict::Capture, Verdict::Exempt, Verdict::LetGo, Verdict::ByPort, Verdict::Node] {
            assert_eq!(Verdict::from_u32(verdict as u32), Some(verdict));
        }
        assert_eq!(Verdict::from_u32(0), None);
    }
}
