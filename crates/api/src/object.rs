//! Any of the objects Weft reads, and the key it is stored under.

use std::{fmt, sync::Arc};

use crate::{AuthorizationPolicy, EndpointSlice, Namespace, Node, ObjectMeta, Pod, Service, ServiceCidr};

/// Kinds in the order they are named to people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Namespace,
    Pod,
    Service,
    EndpointSlice,
    Node,
    ServiceCidr,
    AuthorizationPolicy,
}

impl Kind {
    pub const ALL: [Self; 7] = [
        Self::Namespace,
        Self::Pod,
        Self::Service,
        Self::EndpointSlice,
        Self::Node,
        Self::ServiceCidr,
        Self::AuthorizationPolicy,
    ];

    /// The kind of that API version and name; None for what Weft does not read.
    pub fn find(api_version: &str, kind: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.api_version() == api_version && k.as_str() == kind)
    }

    pub fn api_version(self) -> &'static str {
        match self {
            Self::Namespace | Self::Pod | Self::Service | Self::Node => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::ServiceCidr => "networking.k8s.io/v1",
            Self::AuthorizationPolicy => "policy.weft.dev/v1alpha1",
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
        }
    }

    /// The name in the API's paths, and in rules of who may read it.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Namespace => "namespaces",
            Self::Pod => "pods",
            Self::Service => "services",
            Self::EndpointSlice => "endpointslices",
            Self::Node => "nodes",
            Self::ServiceCidr => "servicecidrs",
            Self::AuthorizationPolicy => "authorizationpolicies",
        }
    }

    /// Whether a cluster may do without: its API server is too old, or the definition is not installed.
    pub fn is_optional(self) -> bool {
        matches!(self, Self::ServiceCidr)
    }

    fn is_cluster_scoped(self) -> bool {
        matches!(self, Self::Namespace | Self::Node | Self::ServiceCidr)
    }
}

/// One object, shared between the source that read it and the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    Namespace(Arc<Namespace>),
    Pod(Arc<Pod>),
    Service(Arc<Service>),
    EndpointSlice(Arc<EndpointSlice>),
    Node(Arc<Node>),
    ServiceCidr(Arc<ServiceCidr>),
    AuthorizationPolicy(Arc<AuthorizationPolicy>),
}

/// What makes two objects the same one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    pub kind: Kind,
    /// Empty for what is in none, such as a Namespace.
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{} {}", self.kind.as_str(), self.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind.as_str(), self.name),
        }
    }
}

/// Why an object whose fields have the right types is still no valid object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// As in `endpoints[1].addresses[0]`.
    pub path: String,
    pub message: String,
}

impl Object {
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Self::Namespace(o) => &o.metadata,
            Self::Pod(o) => &o.metadata,
            Self::Service(o) => &o.metadata,
            Self::EndpointSlice(o) => &o.metadata,
            Self::Node(o) => &o.metadata,
            Self::ServiceCidr(o) => &o.metadata,
            Self::AuthorizationPolicy(o) => &o.metadata,
        }
    }

    pub fn kind(&self) -> Kind {
        match self {
            Self::Namespace(_) => Kind::Namespace,
            Self::Pod(_) => Kind::Pod,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::Node(_) => Kind::Node,
            Self::ServiceCidr(_) => Kind::ServiceCidr,
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
        }
    }

    /// An object without a namespace is in `default`, as kubectl reads a manifest.
    pub fn key(&self) -> ObjectKey {
        let metadata = self.metadata();
        let kind = self.kind();
        let namespace = match kind.is_cluster_scoped() {
            true => "",
            false => metadata.namespace.as_deref().unwrap_or("default"),
        };
        ObjectKey { kind, namespace: namespace.to_owned(), name: metadata.name.clone() }
    }

    /// Whether the mesh follows the same from both: what Weft itself writes there counts for nothing.
    pub fn is_same_to_mesh(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Pod(one), Self::Pod(other)) => one.is_same_to_mesh(other),
            (Self::AuthorizationPolicy(one), Self::AuthorizationPolicy(other)) => one.is_same_to_mesh(other),
            (one, other) => one == other,
        }
    }

    /// Checks what the fields' types cannot show.
    pub fn validate(&self) -> Result<(), FieldError> {
        match self {
            Self::EndpointSlice(slice) => slice.validate(),
            _ => Ok(()),
        }
    }
}
