//! How much of the controller's source a state holds: the newest resourceVersion of each kind of object, as Kubernetes
//! numbers them. Numbers of one kind are in the order of its history; those of different kinds are not compared. So of two
//! states one may be older, newer, or neither.
//!
//! A server labels every response with the vector of its snapshot ([`crate::Snapshot::seen`]), a client sends what it has
//! seen with every call ([`METADATA_KEY`]), and a server that has not seen as much says nothing to it ([`Progress`]).
//! Kinds are opaque here, and a source without such numbers has an empty vector.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tonic::Status;
use tonic::metadata::MetadataMap;

/// Under this name a client says what it has seen.
pub const METADATA_KEY: &str = "weft-seen";
/// A client that has seen more than this server waits this long for it to catch up, and is then sent away.
pub(crate) const HOLD: Duration = Duration::from_secs(5);
/// A peer could make up any number of kinds.
const MAX_KINDS: usize = 64;

/// The newest version of each kind; in text `pods=17,services=4`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VersionVector(BTreeMap<Arc<str>, u64>);

impl VersionVector {
    /// Whether it says nothing of any kind.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The version of a kind.
    pub fn get(&self, kind: &str) -> Option<u64> {
        self.0.get(kind).copied()
    }

    /// Kinds with their versions.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(kind, version)| (&**kind, *version))
    }

    /// Raises one kind to at least `version`. Returns whether it was lower.
    pub fn raise(&mut self, kind: &str, version: u64) -> bool {
        match self.0.get_mut(kind) {
            Some(known) if *known >= version => false,
            Some(known) => {
                *known = version;
                true
            }
            None => self.0.insert(kind.into(), version).is_none(),
        }
    }

    /// Raises every kind to at least what `other` says. Returns whether any was lower.
    pub fn merge(&mut self, other: &VersionVector) -> bool {
        other.iter().fold(false, |raised, (kind, version)| self.raise(kind, version) || raised)
    }

    /// Lowers one kind to at most `version`.
    pub fn lower(&mut self, kind: &str, version: u64) {
        if let Some(known) = self.0.get_mut(kind) {
            *known = version.min(*known);
        }
    }

    /// Only what is said of `kinds`.
    pub fn only(&self, kinds: &[&str]) -> VersionVector {
        let kept = self.0.iter().filter(|(kind, _)| kinds.contains(&&***kind));
        VersionVector(kept.map(|(kind, version)| (kind.clone(), *version)).collect())
    }

    /// Whether it is at least as new as `other` in every kind that `other` speaks of.
    pub fn covers(&self, other: &VersionVector) -> bool {
        self.behind(other).next().is_none()
    }

    /// The kinds of which `other` has seen more, with that version.
    pub fn behind<'a>(&'a self, other: &'a VersionVector) -> impl Iterator<Item = (&'a str, u64)> {
        other.iter().filter(|(kind, version)| self.get(kind).is_none_or(|known| known < *version))
    }
}

impl fmt::Display for VersionVector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (kind, version)) in self.iter().enumerate() {
            write!(f, "{}{kind}={version}", if index > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

/// Why a text is no vector.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} does not say which versions of which kinds: KIND=NUMBER,...")]
pub struct NotAVector(String);

impl FromStr for VersionVector {
    type Err = NotAVector;

    fn from_str(text: &str) -> Result<VersionVector, NotAVector> {
        let not = || NotAVector(text.chars().take(100).collect());
        let mut vector = VersionVector::default();
        for pair in text.split(',').filter(|_| !text.is_empty()) {
            let (kind, version) = pair.split_once('=').ok_or_else(not)?;
            let named = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-');
            if kind.is_empty() || !kind.bytes().all(named) || vector.0.len() == MAX_KINDS {
                return Err(not());
            }
            let version = version.parse().map_err(|_| not())?;
            if vector.0.insert(kind.into(), version).is_some() {
                return Err(not());
            }
        }
        Ok(vector)
    }
}

/// What a server knows by now, and what it is asked to know. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Progress {
    known: watch::Receiver<VersionVector>,
    wanted: mpsc::Sender<VersionVector>,
}

impl Progress {
    /// `known` is raised when the snapshot that is served holds as much. `wanted` is told of what clients have seen and
    /// this server has not, for whoever can hurry; what does not fit in is not told.
    pub fn new(known: watch::Receiver<VersionVector>, wanted: mpsc::Sender<VersionVector>) -> Progress {
        Progress { known, wanted }
    }

    /// What the server knows by now: raised when the snapshot that is served holds as much.
    pub fn known(&self) -> watch::Receiver<VersionVector> {
        self.known.clone()
    }

    /// Returns when the server has seen at least as much as the caller with this metadata. An error if that takes too
    /// long: the caller should ask another server, and go on with what it knows until then.
    pub async fn reach(&self, metadata: &MetadataMap) -> Result<(), Status> {
        let Some(seen) = metadata.get(METADATA_KEY) else { return Ok(()) };
        let seen =
            seen.to_str().map_err(|_| Status::invalid_argument(format!("{METADATA_KEY} is no text")))?;
        let seen: VersionVector =
            seen.parse().map_err(|error: NotAVector| Status::invalid_argument(error.to_string()))?;
        let mut known = self.known.clone();
        if known.borrow().covers(&seen) {
            return Ok(());
        }
        let _ = self.wanted.try_send(seen.clone());
        let reached = tokio::time::timeout(HOLD, known.wait_for(|known| known.covers(&seen))).await;
        match reached {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Status::unavailable("the controller is shutting down")),
            Err(_) => Err(Status::unavailable(self.words(&seen))),
        }
    }

    fn words(&self, seen: &VersionVector) -> String {
        let known = self.known.borrow();
        let behind = known.behind(seen).map(|(kind, version)| match known.get(kind) {
            Some(known) => format!("{kind} {known} of {version}"),
            None => format!("{kind} of which nothing is known, of {version}"),
        });
        let behind: Vec<_> = behind.collect();
        format!("this replica of the controller is behind what this node has seen: {}", behind.join(", "))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn vector(text: &str) -> VersionVector {
        text.parse().unwrap()
    }

    #[test]
    fn is_read_as_it_is_written() {
        for text in ["", "pods=1", "nodeenrollments.mesh.weft.dev=18446744073709551615,pods=0"] {
            assert_eq!(vector(text).to_string(), text);
        }
        let many: Vec<_> = (0..=MAX_KINDS).map(|n| format!("k{n}=1")).collect();
        for wrong in
            ["7", "pods", "pods=", "=1", "pods=-1", "Pods=1", "pods=1,", "pods=1,pods=2", &many.join(",")]
        {
            assert!(wrong.parse::<VersionVector>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn is_compared_kind_by_kind() {
        for (one, other, covers) in [
            ("", "", true),
            ("pods=1", "", true),
            ("", "pods=1", false),
            ("pods=2,services=1", "pods=2", true),
            ("pods=2,services=1", "pods=1,services=2", false),
            ("pods=9", "services=1", false),
        ] {
            assert_eq!(vector(one).covers(&vector(other)), covers, "{one} of {other}");
        }
        let mut merged = vector("pods=2,services=1");
        assert!(merged.merge(&vector("nodes=3,pods=1,services=4")));
        assert_eq!(merged.to_string(), "nodes=3,pods=2,services=4");
        assert!(!merged.merge(&vector("nodes=3")));
        merged.lower("pods", 1);
        merged.lower("nodes", 9);
        assert_eq!(merged.only(&["nodes", "pods", "other"]).to_string(), "nodes=3,pods=1");
    }
}
