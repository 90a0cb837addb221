//! What a recording of the wire proves. Every judgement here can fail: `encrypted_since` also demands that the payload
//! was found before, and that the tunnel carried at least as much as the client received.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::ops::Range;

use anyhow::{Result, bail, ensure};

use crate::capture::Moment;
use crate::packet::{Parsed, Segment, parse};

/// The port of the tunnel (HBONE).
pub const TUNNEL_PORT: u16 = 15008;

/// The frames of a capture, oldest first.
#[derive(Debug, Default)]
pub struct Recording {
    bytes: Vec<u8>,
    frames: Vec<(Moment, Range<usize>)>,
}

/// A TCP segment in a recording.
#[derive(Clone, Debug)]
pub struct Seen<'a> {
    pub at: Moment,
    pub segment: Segment,
    pub payload: &'a [u8],
}

impl std::fmt::Display for Seen<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Segment { source, source_port, destination, destination_port, .. } = &self.segment;
        let start = String::from_utf8_lossy(&self.payload[..self.payload.len().min(40)]).into_owned();
        write!(
            f,
            "{source}:{source_port} > {destination}:{destination_port}, {} bytes {start:?}",
            self.payload.len()
        )
    }
}

impl Recording {
    pub(crate) fn push(&mut self, at: Moment, frame: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(frame);
        self.frames.push((at, start..self.bytes.len()));
    }

    /// How many frames were recorded.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Every TCP segment, oldest first.
    pub fn segments(&self) -> impl Iterator<Item = Seen<'_>> {
        self.frames.iter().filter_map(|(at, range)| {
            let frame = &self.bytes[range.clone()];
            match parse(frame) {
                Parsed::Tcp(segment) => {
                    Some(Seen { at: *at, payload: &frame[segment.payload.clone()], segment })
                }
                _ => None,
            }
        })
    }

    /// Every TCP segment between two addresses of `among`.
    pub fn between<'a>(&'a self, among: &'a [IpAddr]) -> impl Iterator<Item = Seen<'a>> {
        self.segments()
            .filter(|seen| among.contains(&seen.segment.source) && among.contains(&seen.segment.destination))
    }

    /// Where `payload` appears in what TCP carried, also where it straddles two segments of one direction.
    pub fn find<'a>(&'a self, payload: &[u8]) -> Vec<Seen<'a>> {
        let mut tails: HashMap<(IpAddr, u16, IpAddr, u16), Vec<u8>> = HashMap::new();
        let mut found = Vec::new();
        for seen in self.segments().filter(|seen| !seen.payload.is_empty()) {
            let Segment { source, source_port, destination, destination_port, .. } = seen.segment;
            let tail = tails.entry((source, source_port, destination, destination_port)).or_default();
            tail.extend_from_slice(seen.payload);
            let hit = contains(tail, payload);
            let keep = tail.len().saturating_sub(payload.len().saturating_sub(1));
            tail.drain(..keep);
            if hit {
                found.push(seen);
            }
        }
        found
    }

    /// SYNs that carry data (TCP Fast Open) since `since`.
    pub fn syns_with_data(&self, since: Moment) -> Vec<Seen<'_>> {
        self.segments()
            .filter(|seen| seen.at >= since && seen.segment.syn && !seen.payload.is_empty())
            .collect()
    }

    /// Bytes that TCP segments on the tunnel's port carried since `since`, in both directions.
    pub fn tunnel_bytes(&self, since: Moment) -> u64 {
        self.segments()
            .filter(|seen| seen.at >= since && seen.segment.uses_port(TUNNEL_PORT))
            .map(|seen| seen.payload.len() as u64)
            .sum()
    }

    /// Fails unless every data segment between `enrolled` addresses since `since` belongs to the tunnel, and no SYN
    /// carries data. Segments on the tunnel's port must be TLS records or continue one: they may not hold `payload`.
    pub fn nothing_in_the_clear(&self, since: Moment, enrolled: &[IpAddr], payload: &[u8]) -> Result<()> {
        let plain: Vec<_> = self
            .between(enrolled)
            .filter(|seen| {
                seen.at >= since && !seen.payload.is_empty() && !seen.segment.uses_port(TUNNEL_PORT)
            })
            .collect();
        if let Some(first) = plain.first() {
            bail!("{} segments in the clear between enrolled addresses, the first: {first}", plain.len());
        }
        if let Some(first) = self.find(payload).into_iter().find(|seen| seen.at >= since) {
            bail!("the payload was found on the wire: {first}");
        }
        if let Some(first) = self.syns_with_data(since).first() {
            bail!("a SYN carries data: {first}");
        }
        Ok(())
    }

    /// The whole proof that labelling at `since` encrypted the traffic: the payload is in the clear before (so the
    /// capture does see it), nothing is in the clear afterwards, and at least `at_least` bytes, those that a client
    /// received and verified since, went through the tunnel.
    pub fn encrypted_since(
        &self,
        since: Moment,
        enrolled: &[IpAddr],
        payload: &[u8],
        at_least: u64,
    ) -> Result<()> {
        let before = self.find(payload).into_iter().filter(|seen| seen.at < since).count();
        ensure!(
            before > 0,
            "the payload was not found on the wire before either: this capture proves nothing"
        );
        self.nothing_in_the_clear(since, enrolled, payload)?;
        let tunnelled = self.tunnel_bytes(since);
        ensure!(
            tunnelled >= at_least && at_least > 0,
            "{tunnelled} bytes of tunnel cannot have carried the {at_least} bytes that the client verified"
        );
        Ok(())
    }

    /// Bytes of TCP payload since `since` by the lower of the two ports, for messages to people.
    pub fn bytes_by_port(&self, since: Moment) -> BTreeMap<u16, u64> {
        let mut ports = BTreeMap::new();
        for seen in self.segments().filter(|seen| seen.at >= since && !seen.payload.is_empty()) {
            let port = seen.segment.source_port.min(seen.segment.destination_port);
            *ports.entry(port).or_default() += seen.payload.len() as u64;
        }
        ports
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    let Some((first, rest)) = needle.split_first() else { return false };
    let mut start = 0;
    while let Some(at) = haystack[start..].iter().position(|byte| byte == first) {
        let after = start + at + 1;
        if haystack[after..].starts_with(rest) {
            return true;
        }
        start = after;
    }
    false
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    type Frames = Vec<(u64, Vec<u8>)>;

    const A: [u8; 4] = [10, 42, 1, 2];
    const B: [u8; 4] = [10, 42, 2, 2];

    fn frame(ports: (u16, u16), flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0u8; 12];
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend((40 + payload.len() as u16).to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
        frame.extend(A.iter().chain(&B));
        frame.extend(ports.0.to_be_bytes());
        frame.extend(ports.1.to_be_bytes());
        frame.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    fn recording(frames: &[(u64, Vec<u8>)]) -> Recording {
        let mut recording = Recording::default();
        for (second, frame) in frames {
            recording.push(Moment(Duration::from_secs(*second)), frame);
        }
        recording
    }

    const LABEL: Moment = Moment(Duration::from_secs(10));

    fn judge(recording: &Recording, at_least: u64) -> Result<()> {
        recording.encrypted_since(LABEL, &[A.into(), B.into()], b"secret", at_least)
    }

    #[test]
    fn the_proof_holds_only_with_all_its_parts() {
        let plain = (1, frame((4000, 80), 0x18, b"a secret"));
        let tunnel = (11, frame((4001, 15008), 0x18, &[0x17; 100]));
        assert!(judge(&recording(&[plain.clone(), tunnel.clone()]), 100).is_ok());
        let broken: [(&str, Frames, u64); 6] = [
            ("payload never seen before", vec![tunnel.clone()], 100),
            ("tunnel too small", vec![plain.clone(), tunnel.clone()], 101),
            ("client verified nothing", vec![plain.clone(), tunnel.clone()], 0),
            (
                "payload after",
                vec![plain.clone(), tunnel.clone(), (12, frame((4001, 15008), 0x18, b"secret"))],
                100,
            ),
            (
                "plain data after",
                vec![plain.clone(), tunnel.clone(), (12, frame((4000, 80), 0x18, b"x"))],
                100,
            ),
            ("data in a SYN", vec![plain, tunnel, (12, frame((4001, 15008), 0x02, b"x"))], 100),
        ];
        for (what, frames, at_least) in broken {
            assert!(judge(&recording(&frames), at_least).is_err(), "{what}");
        }
    }

    #[test]
    fn a_payload_that_straddles_segments_is_found() {
        let split =
            recording(&[(1, frame((4000, 80), 0x18, b"a sec")), (1, frame((4000, 80), 0x18, b"ret"))]);
        assert_eq!(split.find(b"secret").len(), 1);
        let other_flow =
            recording(&[(1, frame((4000, 80), 0x18, b"a sec")), (1, frame((4002, 80), 0x18, b"ret"))]);
        assert!(other_flow.find(b"secret").is_empty());
        assert!(contains(b"sesecret", b"secret"));
    }
}
