//! What the client hands to its consumer, and the checks a response passes before that.

use std::collections::HashSet;

use bytes::Bytes;
use tokio::sync::oneshot;
use weft_proto::discovery::DeltaDiscoveryResponse;

use crate::{NotAVector, Version, VersionVector};

/// One resource as the server sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Name, unique within the type.
    pub name: String,
    /// Version of the content.
    pub version: Version,
    /// The encoded message of the update's type.
    pub value: Bytes,
}

/// All that changed of one type, to be applied as a whole and then answered with [`Update::ack`] or [`Update::nack`].
/// The next update of whatever type comes only after that. Dropped unanswered, it counts as rejected.
#[derive(Debug)]
pub struct Update {
    /// One of the types the client was configured with.
    pub type_url: &'static str,
    /// New or changed.
    pub upserts: Vec<Resource>,
    /// Names of what is gone. They need not be known to the consumer.
    pub removed: Vec<String>,
    /// No update of this type was accepted before: with this one applied, the type is in sync. It is sent even where
    /// there is no resource at all.
    pub first: bool,
    /// What the state holds that this is of. To be remembered before the update is applied: no server that has seen less
    /// may be believed from then on.
    pub seen: VersionVector,
    answer: oneshot::Sender<Result<(), String>>,
}

impl Update {
    /// Applied: the client remembers it, also over reconnects, and tells the server.
    pub fn ack(self) {
        // Nobody to tell any more means the client itself was stopped.
        let _ = self.answer.send(Ok(()));
    }

    /// Rejected as a whole: the client goes on as if it had never come, and the server sends it again, with what is
    /// new, when something of this type changes.
    pub fn nack(self, why: String) {
        let _ = self.answer.send(Err(why));
    }
}

/// A response that passed the checks.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub upserts: Vec<Resource>,
    pub removed: Vec<String>,
    pub seen: VersionVector,
}

impl Change {
    pub(crate) fn into_update(
        self,
        type_url: &'static str,
        first: bool,
    ) -> (Update, oneshot::Receiver<Result<(), String>>) {
        let (answer, answered) = oneshot::channel();
        let Change { upserts, removed, seen } = self;
        (Update { type_url, upserts, removed, first, seen, answer }, answered)
    }
}

/// Checks what a consumer should not have to: every resource has a name and content of the right type, no name comes
/// twice, and the state says what it holds. The error is for the NACK.
pub(crate) fn check(response: DeltaDiscoveryResponse) -> Result<Change, String> {
    let mut names = HashSet::with_capacity(response.resources.len() + response.removed_resources.len());
    for name in response.resources.iter().map(|resource| &resource.name).chain(&response.removed_resources) {
        if name.is_empty() {
            return Err("a resource without a name".to_owned());
        }
        if !names.insert(name.as_str()) {
            return Err(format!("resource {name:?} twice in one response"));
        }
    }
    drop(names);
    // A controller of before there were vectors says the number of its state there. While it and its agents are upgraded,
    // in whatever order, it must not be one that they cannot listen to.
    let holds = response.system_version_info;
    let seen = match holds.bytes().all(|byte| byte.is_ascii_digit()) {
        true => VersionVector::default(),
        false => holds.parse().map_err(|error: NotAVector| error.to_string())?,
    };
    let type_url = response.type_url;
    let upserts = response.resources.into_iter().map(|resource| match resource.resource {
        Some(any) if any.type_url == type_url => {
            Ok(Resource { name: resource.name, version: resource.version.into(), value: any.value.into() })
        }
        Some(any) => Err(format!("resource {:?} is of type {:?}", resource.name, any.type_url)),
        None => Err(format!("resource {:?} has no content", resource.name)),
    });
    Ok(Change { upserts: upserts.collect::<Result<_, _>>()?, removed: response.removed_resources, seen })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use prost_types::Any;
    use weft_proto::discovery;

    use super::*;

    fn wire(name: &str, content: Option<(&str, &str)>) -> discovery::Resource {
        discovery::Resource {
            name: name.to_owned(),
            version: "v".to_owned(),
            resource: content.map(|(kind, value)| Any { type_url: kind.to_owned(), value: value.into() }),
            aliases: Vec::new(),
        }
    }

    fn checked(resources: Vec<discovery::Resource>, removed: &[&str]) -> Result<Change, String> {
        check(DeltaDiscoveryResponse {
            type_url: "t".to_owned(),
            resources,
            removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        })
    }

    #[test]
    fn malformed_responses_are_refused_with_words() {
        let good = || wire("a", Some(("t", "x")));
        for (resources, removed, why) in [
            (vec![wire("", Some(("t", "x")))], vec![], "without a name"),
            (vec![], vec![""], "without a name"),
            (vec![good(), good()], vec![], "twice"),
            (vec![good()], vec!["a"], "twice"),
            (vec![], vec!["b", "b"], "twice"),
            (vec![wire("a", None)], vec![], "no content"),
            (vec![wire("a", Some(("other", "x")))], vec![], "of type \"other\""),
        ] {
            let error = checked(resources, &removed).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        let unknown = DeltaDiscoveryResponse { system_version_info: "pods".to_owned(), ..Default::default() };
        assert!(check(unknown).unwrap_err().contains("which versions"));
        let without = DeltaDiscoveryResponse { system_version_info: "7".to_owned(), ..Default::default() };
        assert!(check(without).unwrap().seen.is_empty());
        let change = checked(vec![good()], &["b"]).unwrap();
        assert_eq!(change.upserts[0].value, "x");
        assert_eq!(change.removed, ["b"]);
    }
}
