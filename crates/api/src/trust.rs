//! How a rotation of the mesh's root of trust goes on, as the controller shows it beside the roots' certificates: in
//! `status.json` of the ConfigMap `weft-root`, or in `trust-status.json` of its state directory.

use serde::{Deserialize, Serialize};

/// Annotation of the ConfigMap `weft-root`. Another value than before asks for a rotation.
pub const ROTATE_ROOT: &str = "weft.dev/rotate-root";

/// Before a bundle of roots in PEM: its serial. Of two such files the one with the higher number is newer.
pub const SERIAL_LINE: &str = "# weft-trust-serial: ";

/// Where a rotation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// There is one root.
    Steady,
    /// Another one is believed beside it, and signs nothing yet.
    Announced,
    /// The other one signs, and the old one is still believed.
    Retiring,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrustStatus {
    /// Grows with every change.
    pub serial: u64,
    pub phase: Phase,
    /// Unix time of the last change, in seconds.
    pub changed_at: u64,
    /// The last request for a rotation that was obeyed, in its words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub obeyed: Option<String>,
    /// Nodes that have not followed the last change yet.
    pub waiting_for: Vec<String>,
    /// The controller does not make roots itself: another one comes from whoever gives it.
    #[serde(default)]
    pub given: bool,
    /// Why what was given is not taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Somebody who waits for the rotation that was asked for in these words.
#[derive(Debug)]
pub struct Waiting<'a> {
    request: &'a str,
    last: Option<TrustStatus>,
}

/// What there is to say to them.
#[derive(Debug)]
pub enum Progress<'a> {
    Done,
    /// It has not begun.
    Idle,
    News(&'a TrustStatus),
    Nothing,
}

impl<'a> Waiting<'a> {
    pub fn new(request: &'a str) -> Self {
        Self { request, last: None }
    }

    pub fn look(&mut self, status: TrustStatus) -> Progress<'_> {
        if status.phase == Phase::Steady {
            return if status.obeyed.as_deref() == Some(self.request) {
                Progress::Done
            } else {
                Progress::Idle
            };
        }
        if self.last.as_ref() == Some(&status) {
            return Progress::Nothing;
        }
        Progress::News(self.last.insert(status))
    }
}

/// In one line, for people.
impl std::fmt::Display for TrustStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.phase {
            Phase::Steady => "there is one root",
            Phase::Announced => "a new root is announced to the nodes",
            Phase::Retiring => "the new root signs, and the old one is still believed",
        })?;
        if !self.waiting_for.is_empty() {
            write!(f, "; waiting for {}", self.waiting_for.join(", "))?;
        }
        match &self.problem {
            None => Ok(()),
            Some(problem) => write!(f, "; what was given is not taken: {problem}"),
        }
    }
}
