//! Whom the mesh believes: its root of trust, and how one root takes the place of another without anybody noticing.
//!
//! All of it is one [`Record`], in the cluster's Secret `weft-ca` or the state directory, which changes as a whole and is
//! followed by every replica ([`keeper`]). Others see an [`Authorities`], made of the record: the root that signs ([`ca`],
//! [`tls`]) and the bundle of roots to believe, which goes to agents over xDS.
//!
//! A rotation is three changes of the record, and each waits until all have followed the one before:
//!
//! 1. *announced*: a new root is believed beside the one that signs. Until every node believes both, nothing is signed by it.
//! 2. *retiring*: the new one signs, and the key of the old one is gone. Every node renews its certificates.
//! 3. the old one is gone from the bundle, and what it signed is refused.
//!
//! "Every node" is each with enrolled pods, by what its agent reports. One that is silent holds a rotation up, since its pods
//! would be cut off: for as long as certificates last, after which it has none. Whoever is no agent is not heard of, and
//! learns of new roots with its next certificate; so each change lasts at least as long as the certificates of such callers
//! ([`Rotation::overlap`]).
//!
//! [`ca`]: crate::ca
//! [`tls`]: crate::tls

pub mod given;
pub mod keeper;
pub mod root;

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::digest::{SHA256, digest};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde::{Deserialize, Serialize};
use weft_api::trust::{Phase, SERIAL_LINE, TrustStatus};
use weft_proto::node::TrustBundle;

use self::root::Root;
use crate::ca::MAX_TTL;

const VERSION: u32 = 1;
/// How long after a change every replica follows it, or signs nothing any more; and connections that were being made by
/// what was before are made.
const SETTLE: Duration = Duration::from_secs(20);
/// After that a silent node has no valid certificate any more.
const SILENCE: Duration = Duration::from_secs(MAX_TTL.as_secs() + 3600);

/// How roots rotate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotation {
    /// The age at which a root is replaced. None: only by command.
    pub after: Option<Duration>,
    /// How long two roots are believed at least before the new one signs, and again before the old one is let go; and how
    /// long certificates of callers that are no agents are valid at most.
    pub overlap: Duration,
}

/// A root's certificate and the key that signs, in PEM.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    certificate: String,
    key: String,
    /// The certificates between what is signed and the root, that of the key first; empty where it is the root's own.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    chain: String,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pair")
    }
}

/// What is kept. Contains keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Record {
    version: u32,
    /// Grows with every change. Not less than the Unix time of the change, so that a record that was restored from a
    /// back-up and changes then is newer than what anybody saw before.
    serial: u64,
    /// Unix time.
    changed_at: u64,
    /// The last request for a rotation that was obeyed, in its words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    obeyed: Option<String>,
    signer: Pair,
    /// Believed, and to sign next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    next: Option<Pair>,
    /// The certificate of the one that signed before, and is still believed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    previous: Option<String>,
}

/// The newest bundle that each node with enrolled pods has in force, by its serial; 0 where none is known.
pub type Settled = BTreeMap<String, u64>;

/// By what it is decided whether a rotation goes on.
#[derive(Debug)]
pub struct Circumstances<'a> {
    pub rotation: &'a Rotation,
    pub request: Option<&'a str>,
    /// What is to sign, where that is not of our own making.
    given: Option<&'a Pair>,
    pub settled: &'a Settled,
    pub since: Duration,
}

/// Why a record is no good, or none could be made. Continues a sentence about it.
pub type Unfit = String;

impl Record {
    /// With a new root of its own.
    pub fn new(organization: &str, now: SystemTime) -> Result<Self, Unfit> {
        Ok(Self::of(Pair::generate(organization)?, now))
    }

    fn of(signer: Pair, now: SystemTime) -> Self {
        let at = unix(now);
        Self {
            version: VERSION,
            serial: at,
            changed_at: at,
            obeyed: None,
            signer,
            next: None,
            previous: None,
        }
    }

    pub fn parse(text: &[u8]) -> Result<Self, Unfit> {
        let record: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        match record.version {
            VERSION => Ok(record),
            other => Err(format!("has version {other}, this program reads {VERSION}")),
        }
    }

    pub fn to_json(&self) -> Result<Vec<u8>, Unfit> {
        serde_json::to_vec_pretty(self).map_err(|error| error.to_string())
    }

    pub fn serial(&self) -> u64 {
        self.serial
    }

    pub fn phase(&self) -> Phase {
        match (&self.next, &self.previous) {
            (None, None) => Phase::Steady,
            (Some(_), _) => Phase::Announced,
            (None, Some(_)) => Phase::Retiring,
        }
    }

    /// For people.
    pub fn status(&self, settled: &Settled) -> TrustStatus {
        TrustStatus {
            serial: self.serial,
            phase: self.phase(),
            changed_at: self.changed_at,
            obeyed: self.obeyed.clone(),
            waiting_for: self.waiting(settled).map(str::to_owned).collect(),
            given: false,
            problem: None,
        }
    }

    /// The nodes that a rotation waits for.
    pub fn waiting<'a>(&self, settled: &'a Settled) -> impl Iterator<Item = &'a str> {
        let (serial, rotating) = (self.serial, self.phase() != Phase::Steady);
        let late = settled.iter().filter(move |(_, at)| rotating && **at < serial);
        late.map(|(node, _)| node.as_str())
    }

    /// The record that comes next and what that means, if it is time. `request` is what somebody has written who wants a
    /// rotation; each is obeyed once. The record has been there for `since`, by a clock that nobody sets.
    pub fn step(
        &self,
        Circumstances { rotation, request, given, settled, since }: &Circumstances<'_>,
        organization: &str,
        now: SystemTime,
    ) -> Result<Option<(Record, &'static str)>, Unfit> {
        let followed = self.waiting(settled).next().is_none() || *since >= SILENCE;
        let late = *since >= rotation.overlap + SETTLE;
        let mut next = self.clone();
        let what = match self.phase() {
            Phase::Steady => match given {
                Some(given) if **given == self.signer => return Ok(None),
                Some(given) if given.certificate == self.signer.certificate => {
                    next.signer = (*given).clone();
                    "another intermediate signs, under the same root"
                }
                Some(given) => {
                    next.next = Some((*given).clone());
                    "the root that was given is announced to the nodes"
                }
                None => {
                    let asked = request.is_some() && *request != self.obeyed.as_deref();
                    let age = Root::try_from(&self.signer)?.age(now);
                    if !asked && rotation.after.is_none_or(|after| age < after) {
                        return Ok(None);
                    }
                    next.obeyed = request.map(str::to_owned);
                    next.next = Some(Pair::generate(organization)?);
                    "a new root is announced to the nodes"
                }
            },
            Phase::Announced if followed && late => {
                let new = next.next.take().ok_or("has no next root")?;
                next.previous = Some(std::mem::replace(&mut next.signer, new).certificate);
                "every node believes the new root, which signs from now on"
            }
            Phase::Retiring if followed && late => {
                next.previous = None;
                "the old root is believed no more"
            }
            Phase::Announced | Phase::Retiring => return Ok(None),
        };
        next.changed_at = unix(now);
        next.serial = next.changed_at.max(self.serial + 1);
        Ok(Some((next, what)))
    }
}

impl Pair {
    fn generate(organization: &str) -> Result<Self, Unfit> {
        let (certificate, key) = Root::generate(organization).map_err(|error| error.to_string())?;
        Ok(Self { certificate, key, chain: String::new() })
    }
}

/// A record, ready for use.
pub struct Authorities {
    pub serial: u64,
    /// Signs.
    pub signer: Root,
    /// Who is believed: the one that signs first.
    roots: Vec<CertificateDer<'static>>,
    pem: String,
}

impl std::fmt::Debug for Authorities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Authorities({}, {} roots)", self.serial, self.roots.len())
    }
}

impl TryFrom<&Record> for Authorities {
    type Error = Unfit;

    fn try_from(record: &Record) -> Result<Self, Unfit> {
        let signer = Root::try_from(&record.signer)?;
        // So that what is announced can sign when its time comes.
        if let Some(next) = &record.next {
            Root::try_from(next)?;
        }
        let others = record.next.iter().map(|next| &next.certificate).chain(&record.previous);
        let mut roots = vec![signer.der().clone()];
        let mut pem = format!("{SERIAL_LINE}{}\n{}", record.serial, ending_in_newline(signer.pem()));
        for other in others {
            roots.push(CertificateDer::from_pem_slice(other.as_bytes()).map_err(|error| error.to_string())?);
            pem.push_str(&ending_in_newline(other));
        }
        Ok(Self { serial: record.serial, signer, roots, pem })
    }
}

impl Authorities {
    /// All roots to believe, in PEM, after a line with the serial: of two such files the one with the higher serial is to be
    /// believed.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// As agents hear of it.
    pub fn bundle(&self) -> TrustBundle {
        TrustBundle {
            serial: self.serial,
            roots: self.roots.iter().map(|root| root.to_vec()).collect(),
            signer: digest(&SHA256, self.signer.der()).as_ref().to_vec(),
        }
    }
}

fn ending_in_newline(pem: &str) -> String {
    format!("{}\n", pem.trim_end())
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests;
