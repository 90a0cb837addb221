//! Who may call a pod that no policy speaks of.

use std::str::FromStr;

use crate::{Namespace, Pod, labels::DEFAULT_INBOUND};

/// In order, the laxest first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DefaultInbound {
    #[default]
    AllUnauthenticated,
    /// Everybody, and everybody is told of as what [`Self::Deny`] would deny.
    Audit,
    /// Whoever proves an identity.
    AllAuthenticated,
    /// Whoever proves one of the mesh's own trust domain.
    ClusterAuthenticated,
    Deny,
}

impl DefaultInbound {
    pub const ALL: [Self; 5] = [
        Self::AllUnauthenticated,
        Self::Audit,
        Self::AllAuthenticated,
        Self::ClusterAuthenticated,
        Self::Deny,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::AllUnauthenticated => "all-unauthenticated",
            Self::Audit => "audit",
            Self::AllAuthenticated => "all-authenticated",
            Self::ClusterAuthenticated => "cluster-authenticated",
            Self::Deny => "deny",
        }
    }
}

impl FromStr for DefaultInbound {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|default| default.as_str() == text).ok_or_else(|| {
            let all = Self::ALL.map(Self::as_str).join(", ");
            format!("{text:?} is none of {all}")
        })
    }
}

/// What annotations say of one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InboundChoice {
    pub default: DefaultInbound,
    /// What is wrong with the annotations, for a person to act on.
    pub problem: Option<String>,
}

/// The rule: what the mesh says, unless the namespace says something else that is not laxer than `floor`; and a pod may
/// only be stricter than that. A value that is not known is read as `deny`.
pub fn inbound_choice(
    mesh: DefaultInbound,
    floor: DefaultInbound,
    namespace: Option<&Namespace>,
    pod: &Pod,
) -> InboundChoice {
    let mut problem = None;
    let mut said = |annotations: &std::collections::BTreeMap<String, String>, whose: &str| {
        let value = annotations.get(DEFAULT_INBOUND)?;
        Some(value.parse().unwrap_or_else(|why| {
            problem = Some(format!("{whose} annotation {DEFAULT_INBOUND}: {why}; read as deny"));
            DefaultInbound::Deny
        }))
    };
    let of_namespace =
        namespace.and_then(|namespace| said(&namespace.metadata.annotations, "its namespace's"));
    let of_pod = said(&pod.metadata.annotations, "the pod's");
    let outer = of_namespace.unwrap_or(mesh).max(floor);
    if let Some(laxer) = of_pod.filter(|of_pod| *of_pod < outer) {
        problem = Some(format!(
            "the pod's annotation {DEFAULT_INBOUND}: {} is laxer than what holds in its namespace, {}, and has no effect",
            laxer.as_str(),
            outer.as_str()
        ));
    }
    InboundChoice { default: of_pod.unwrap_or(outer).max(outer), problem }
}
