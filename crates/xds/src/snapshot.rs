//! What the server serves: an immutable state of the world that the controller replaces as a whole.

use std::collections::HashMap;

use bytes::Bytes;

use crate::{Version, VersionVector};

/// All resources of one type by name, each with its version and its encoded message. Copies share their structure, so
/// the difference between a map and a changed copy of it costs as much as the change.
pub type Resources = imbl::OrdMap<String, (Version, Bytes)>;

/// Content with the version that belongs to it, ready to be put into [`Resources`].
pub fn resource(content: impl Into<Bytes>) -> (Version, Bytes) {
    let content = content.into();
    (Version::of(&content), content)
}

/// One state of the world.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Number of this state in the controller's own history, for its log.
    pub version: u64,
    /// What of the source this state holds, at most: it goes with every response (`system_version_info`).
    pub seen: VersionVector,
    /// By type URL, what every node is sent.
    pub shared: HashMap<&'static str, Resources>,
    /// By node and type URL, what only that node is sent. It replaces shared resources of the same type. Copies of a
    /// snapshot share it, since nodes are many.
    pub per_node: imbl::OrdMap<String, HashMap<&'static str, Resources>>,
}

impl Snapshot {
    /// Resources of `type_url` as `node` is to see them; none for a type this snapshot does not know.
    pub fn view(&self, node: &str, type_url: &str) -> Resources {
        let own = self.per_node.get(node).and_then(|types| types.get(type_url));
        own.or_else(|| self.shared.get(type_url)).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_sees_what_is_shared_and_its_own() {
        let map = |name: &str| Resources::unit(name.to_owned(), resource(name.to_owned()));
        let snapshot = Snapshot {
            version: 1,
            seen: VersionVector::default(),
            shared: HashMap::from([("address", map("everyone"))]),
            per_node: imbl::OrdMap::unit("n1".to_owned(), HashMap::from([("local", map("mine"))])),
        };
        let names = |node, kind| snapshot.view(node, kind).keys().cloned().collect::<Vec<_>>();
        assert_eq!(names("n1", "address"), ["everyone"]);
        assert_eq!(names("n2", "address"), ["everyone"]);
        assert_eq!(names("n1", "local"), ["mine"]);
        assert!(names("n2", "local").is_empty());
        assert!(names("n1", "unheard-of").is_empty());
    }
}
