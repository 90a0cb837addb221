//! The capture set: which destinations go to the agent.

use crate::Address;
use core::net::IpAddr;

/// What to do with a connection to a destination. The numbers are part of the layout.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The agent carries it, or refuses it.
    Capture = 1,
    /// Never captured: node addresses and configured external networks.
    Exempt = 2,
    /// Known not to need the mesh: plain kernel TCP, but captured while the pod is on hold.
    LetGo = 3,
}

impl Verdict {
    /// From a map value; `None` for a number that this layout does not have.
    pub const fn from_u32(number: u32) -> Option<Verdict> {
        match number {
            1 => Some(Verdict::Capture),
            2 => Some(Verdict::Exempt),
            3 => Some(Verdict::LetGo),
            _ => None,
        }
    }
}

/// What a destination is looked up by. The family is part of it so that the prefix `::/0` does not take in the
/// whole of IPv4, which is mapped into it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CaptureKey {
    /// Protocol number, family (4 or 6), two zeroes: one word, so that the address stays aligned.
    head: [u8; 4],
    address: Address,
}

/// Bits of [`CaptureKey`] before the address.
const HEAD_BITS: u32 = 32;
/// Bits of a v4-mapped address before the IPv4 one.
const MAPPED_BITS: u32 = 96;
const TCP: u8 = 6;

impl CaptureKey {
    /// The key of a TCP destination.
    #[inline(always)]
    pub const fn tcp(address: Address) -> CaptureKey {
        let family = if address.is_v4() { 4 } else { 6 };
        CaptureKey { head: [TCP, family, 0, 0], address }
    }
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

    /// The TCP destinations in `network`/`prefix`. `None` if the prefix is longer than the address.
    /// Host bits must be zero already: the kernel keeps them, and would give them back when listing.
    pub fn tcp_network(network: IpAddr, prefix: u8) -> Option<LpmKey> {
        let prefix = u32::from(prefix);
        let bits = match network {
            IpAddr::V4(_) if prefix <= 32 => HEAD_BITS + MAPPED_BITS + prefix,
            IpAddr::V6(_) if prefix <= 128 => HEAD_BITS + prefix,
            _ => return None,
        };
        let family = if network.is_ipv4() { 4 } else { 6 };
        Some(LpmKey { bits, key: CaptureKey { head: [TCP, family, 0, 0], address: network.into() } })
    }

    /// Length in bits and data, as aya's own key type wants them.
    pub const fn into_parts(self) -> (u32, CaptureKey) {
        (self.bits, self.key)
    }

    /// The reverse of [`LpmKey::into_parts`].
    pub const fn from_parts(bits: u32, key: CaptureKey) -> LpmKey {
        LpmKey { bits, key }
    }

    /// Back to network and prefix length; `None` for an entry that is not for TCP or not well-formed.
    pub fn as_tcp_network(&self) -> Option<(IpAddr, u8)> {
        let (head, octets) = (self.key.head, self.key.address.octets());
        let (network, prefix): (IpAddr, u32) = match head {
            [TCP, 4, 0, 0] => (
                [octets[12], octets[13], octets[14], octets[15]].into(),
                self.bits.checked_sub(HEAD_BITS + MAPPED_BITS)?,
            ),
            [TCP, 6, 0, 0] => (octets.into(), self.bits.checked_sub(HEAD_BITS)?),
            _ => return None,
        };
        Some((network, u8::try_from(prefix).ok()?))
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

    #[test]
    fn prefixes_match_their_own_family_only() {
        for (network, prefix, address, expected) in [
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
            let entry = LpmKey::tcp_network(ip(network), prefix).unwrap();
            let key = LpmKey::lookup(CaptureKey::tcp(ip(address).into()));
            assert_eq!(matches(&entry, &key), expected, "{address} in {network}/{prefix}");
            assert_eq!(entry.as_tcp_network(), Some((ip(network), prefix)));
        }
    }

    #[test]
    fn an_impossible_prefix_is_no_key() {
        assert_eq!(LpmKey::tcp_network(ip("10.0.0.0"), 33), None);
        assert_eq!(LpmKey::tcp_network(ip("::"), 129), None);
        let zeroes = LpmKey { bits: 0, key: CaptureKey { head: [0; 4], address: Address::UNSPECIFIED } };
        assert_eq!(zeroes.as_tcp_network(), None);
    }

    #[test]
    fn verdicts_survive_the_map() {
        for verdict in [Verdict::Capture, Verdict::Exempt, Verdict::LetGo] {
            assert_eq!(Verdict::from_u32(verdict as u32), Some(verdict));
        }
        assert_eq!(Verdict::from_u32(0), None);
    }
}
