//! One form for both families: sixteen bytes in network order, IPv4 mapped into IPv6.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IP address as maps hold it. Aligned like the words the kernel hands out, so that the programs compare four
/// words instead of sixteen bytes.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address([u8; 16]);

/// The third word of a v4-mapped address, as it lies in memory.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

impl Address {
    /// Stands for "none" in a [`crate::PodEntry`]; as a destination it is the unspecified address.
    pub const UNSPECIFIED: Address = Address([0; 16]);

    /// From a word in network order, as contexts hold an IPv4 address.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Address {
        Self::from_words([0, 0, MAPPED, word])
    }

    /// From four words in network order, as contexts hold an IPv6 address.
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Address {
        let [a, b, c, d] = words;
        let (a, b, c, d) = (a.to_ne_bytes(), b.to_ne_bytes(), c.to_ne_bytes(), d.to_ne_bytes());
        Address([
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3],
        ])
    }

    /// Four words in network order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        let b = &self.0;
        [
            u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
            u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
            u32::from_ne_bytes([b[8], b[9], b[10], b[11]]),
            u32::from_ne_bytes([b[12], b[13], b[14], b[15]]),
        ]
    }

    /// The bytes in network order.
    #[inline(always)]
    pub const fn octets(&self) -> [u8; 16] {
        self.0
    }

    /// Word by word: a comparison of byte arrays becomes a call, which the programs cannot make.
    #[inline(always)]
    pub const fn is(&self, other: &Address) -> bool {
        let (a, b) = (self.words(), other.words());
        a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        let w = self.words();
        w[0] == 0 && w[1] == 0 && w[2] == MAPPED
    }

    /// `0.0.0.0` or `::`, both of which a connect takes for the local host.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        let w = self.words();
        w[0] == 0 && w[1] == 0 && (w[2] == 0 || w[2] == MAPPED) && w[3] == 0
    }

    /// `127.0.0.0/8` or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        let w = self.words();
        (self.is_v4() && self.0[12] == 127)
            || (w[0] == 0 && w[1] == 0 && w[2] == 0 && w[3] == u32::from_ne_bytes([0, 0, 0, 1]))
    }
}

impl From<Ipv4Addr> for Address {
    fn from(ip: Ipv4Addr) -> Self {
        Address(ip.to_ipv6_mapped().octets())
    }
}

impl From<Ipv6Addr> for Address {
    fn from(ip: Ipv6Addr) -> Self {
        Address(ip.octets())
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => ip.into(),
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        Ipv6Addr::from(address.0).to_canonical()
    }
}

#[cfg(feature = "user")]
// SAFETY: sixteen bytes, any value is valid, no padding.
unsafe impl aya::Pod for Address {}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn words_are_the_bytes_in_memory_order() {
        let word = u32::from_ne_bytes([10, 0, 0, 1]);
        assert_eq!(Address::from_v4_word(word), address("10.0.0.1"));
        assert_eq!(address("10.0.0.1").words()[3], word);
        let v6 = address("2001:db8::5");
        assert_eq!(Address::from_words(v6.words()), v6);
        assert!(v6.is(&address("2001:db8::5")) && !v6.is(&address("2001:db8::6")));
        assert_eq!(IpAddr::from(address("::ffff:10.0.0.1")), "10.0.0.1".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn kinds() {
        for (text, v4, unspecified, loopback) in [
            ("10.0.0.1", true, false, false),
            ("::ffff:10.0.0.1", true, false, false),
            ("127.0.0.1", true, false, true),
            ("127.255.0.9", true, false, true),
            ("::ffff:127.0.0.1", true, false, true),
            ("126.0.0.1", true, false, false),
            ("0.0.0.0", true, true, false),
            ("::", false, true, false),
            ("::1", false, false, true),
            ("::2", false, false, false),
            ("::127.0.0.1", false, false, false),
            ("2001:db8::1", false, false, false),
        ] {
            let a = address(text);
            assert_eq!(
                (a.is_v4(), a.is_unspecified(), a.is_loopback()),
                (v4, unspecified, loopback),
                "{text}"
            );
        }
    }
}
