//! The order of types on a stream. The client asks in it and the server answers in it.

use weft_proto::type_url;

const LAST: u8 = 6;

/// Sort key of a type: whom to believe first; then the mesh's settings, because reading the others takes them; then nodes,
/// policies and addresses; a node's own workloads last, the rest between.
///
/// An agent that starts anew must not take a node's address for that of an endpoint alone: it would stop capturing the
/// node's ports until it heard better.
///
/// A workload names the policies that are in force for it, which should be there by then.
///
/// A node's own workloads make its agent install capture. By then it must know the addresses of the same snapshot, or
/// it would hold connections to peers it could have been told about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TypeKey {
    rank: u8,
    url: String,
}

impl TypeKey {
    pub(crate) fn new(url: &str) -> TypeKey {
        let rank = match url {
            type_url::TRUST_BUNDLE => 0,
            type_url::MESH_CONFIG => 1,
            type_url::NODE => 2,
            type_url::AUTHORIZATION => 3,
            type_url::ADDRESS => 4,
            type_url::LOCAL_WORKLOAD => LAST,
            _ => 5,
        };
        TypeKey { rank, url: url.to_owned() }
    }

    /// Whether an agent that asks for this type has asked for everything by then.
    pub(crate) fn is_last(&self) -> bool {
        self.rank == LAST
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }
}
