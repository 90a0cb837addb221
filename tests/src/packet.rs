//! Reading captured Ethernet frames as far as the checks need it: addresses, TCP ports, flags and payload. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

/// What a frame turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// A TCP segment.
    Tcp(Segment),
    /// IP, but not TCP (or a fragment that hides it): protocol number and the two addresses.
    OtherIp { protocol: u8, source: IpAddr, destination: IpAddr },
    /// ARP and the like.
    NotIp,
    /// Shorter than its headers say.
    Truncated,
}

/// The parts of a TCP segment that checks ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub source: IpAddr,
    pub source_port: u16,
    pub destination: IpAddr,
    pub destination_port: u16,
    pub sequence: u32,
    pub syn: bool,
    pub ack: bool,
    pub fin: bool,
    pub rst: bool,
    /// Where the payload lies in the frame.
    pub payload: Range<usize>,
}

impl Segment {
    /// Whether either end uses `port`.
    pub fn uses_port(&self, port: u16) -> bool {
        self.source_port == port || self.destination_port == port
    }
}

const TCP: u8 = 6;

/// Reads one frame, Ethernet header first.
pub fn parse(frame: &[u8]) -> Parsed {
    parse_ip(frame).unwrap_or(Parsed::Truncated)
}

fn parse_ip(frame: &[u8]) -> Option<Parsed> {
    let (header, rest) = frame.split_at_checked(14)?;
    match u16::from_be_bytes([header[12], header[13]]) {
        0x0800 => {
            let header_length = usize::from(rest.first()? & 0x0f) * 4;
            let total = usize::from(u16::from_be_bytes([*rest.get(2)?, *rest.get(3)?]));
            let source = IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(rest.get(12..16)?).ok()?));
            let destination = IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(rest.get(16..20)?).ok()?));
            let protocol = *rest.get(9)?;
            let fragment = u16::from_be_bytes([*rest.get(6)?, *rest.get(7)?]) & 0x3fff != 0;
            if protocol != TCP || fragment {
                return Some(Parsed::OtherIp { protocol, source, destination });
            }
            // A super-packet too large for the field has length 0: then the frame's own end counts.
            let end = if total == 0 { frame.len() } else { 14 + total };
            parse_tcp(frame, 14 + header_length, end, source, destination)
        }
        0x86dd => {
            let length = usize::from(u16::from_be_bytes([*rest.get(4)?, *rest.get(5)?]));
            let source = IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(rest.get(8..24)?).ok()?));
            let destination = IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(rest.get(24..40)?).ok()?));
            let protocol = *rest.get(6)?;
            if protocol != TCP {
                return Some(Parsed::OtherIp { protocol, source, destination });
            }
            let end = if length == 0 { frame.len() } else { 14 + 40 + length };
            parse_tcp(frame, 14 + 40, end, source, destination)
        }
        _ => Some(Parsed::NotIp),
    }
}

fn parse_tcp(frame: &[u8], start: usize, end: usize, source: IpAddr, destination: IpAddr) -> Option<Parsed> {
    let tcp = frame.get(start..end)?;
    let word = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    let payload = start + usize::from(tcp.get(12)? >> 4) * 4;
    let flags = *tcp.get(13)?;
    if payload > end {
        return None;
    }
    Some(Parsed::Tcp(Segment {
        source,
        source_port: word(0)?,
        destination,
        destination_port: word(2)?,
        sequence: u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?),
        syn: flags & 0x02 != 0,
        ack: flags & 0x10 != 0,
        fin: flags & 0x01 != 0,
        rst: flags & 0x04 != 0,
        payload: payload..end,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame_v4(protocol: u8, flags: u8, payload: &[u8], padding: usize) -> Vec<u8> {
        let mut frame = vec![0u8; 12];
        frame.extend([0x08, 0x00]);
        let total = 20 + 20 + payload.len() as u16;
        frame.extend([0x45, 0, (total >> 8) as u8, total as u8, 0, 0, 0x40, 0, 64, protocol, 0, 0]);
        frame.extend([10, 42, 1, 2, 10, 42, 2, 2]);
        frame.extend([0x9c, 0x40, 0, 80, 0, 0, 0, 7, 0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame.extend(std::iter::repeat_n(0, padding));
        frame
    }

    #[test]
    fn a_segment_is_read_without_the_padding_of_a_short_frame() {
        let frame = frame_v4(6, 0x18, b"GET", 6);
        let Parsed::Tcp(segment) = parse(&frame) else { panic!("not TCP") };
        assert_eq!(&frame[segment.payload.clone()], b"GET");
        assert_eq!((segment.source_port, segment.destination_port, segment.sequence), (40000, 80, 7));
        assert!(segment.ack && !segment.syn);
        assert!(segment.uses_port(80) && !segment.uses_port(15008));
    }

    #[test]
    fn what_is_not_tcp_is_named_and_what_is_cut_is_not_guessed() {
        assert!(matches!(parse(&frame_v4(17, 0, b"", 0)), Parsed::OtherIp { protocol: 17, .. }));
        let frame = frame_v4(6, 0x02, b"data", 0);
        for length in 14..frame.len() {
            assert_eq!(parse(&frame[..length]), Parsed::Truncated, "cut at {length}");
        }
        assert_eq!(parse(&[0; 60]), Parsed::NotIp);
    }

    #[test]
    fn a_fragment_is_not_taken_for_a_segment() {
        let mut frame = frame_v4(6, 0x18, b"GET", 0);
        frame[14 + 6] = 0x20;
        assert!(matches!(parse(&frame), Parsed::OtherIp { protocol: 6, .. }));
    }
}
