//! Any of the objects Weft reads, and the key it is stored under.

use std::{fmt, sync::Arc};

use crate::{EndpointSlice, Namespace, ObjectMeta, Pod, Service};

/// Kinds in the order they are named to people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Namespace,
    Pod,
    Service,
    EndpointSlice,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Namespace, Self::Pod, Self::Service, Self::EndpointSlice];

    /// The kind of that API version and name; None for what Weft does not read.
    pub fn find(api_version: &str, kind: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.api_version() == api_version && k.as_str() == kind)
    }

    pub fn api_version(self) -> &'static str {
        match self {
            Self::Namespace | Self::Pod | Self::Service => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
        }
    }
}

/// One object, shared between the source that read it and the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    Namespace(Arc<Namespace>),
    Pod(Arc<Pod>),
    Service(Arc<Service>),
    EndpointSlice(Arc<EndpointSlice>),
}

/// What makes two objects the same one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    pub kind: Kind,
    /// Empty for a Namespace.
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
        }
    }

    pub fn kind(&self) -> Kind {
        match self {
            Self::Namespace(_) => Kind::Namespace,
            Self::Pod(_) => Kind::Pod,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
        }
    }

    /// An object without a namespace is in `default`, as kubectl reads a manifest.
    pub fn key(&self) -> ObjectKey {
        let metadata = self.metadata();
        let namespace = match self {
            Self::Namespace(_) => "",
            _ => metadata.namespace.as_deref().unwrap_or("default"),
        };
        ObjectKey { kind: self.kind(), namespace: namespace.to_owned(), name: metadata.name.clone() }
    }

    /// Checks what the fields' types cannot show.
    pub fn validate(&self) -> Result<(), FieldError> {
        match self {
            Self::EndpointSlice(slice) => slice.validate(),
            Self::Namespace(_) | Self::Pod(_) | Self::Service(_) => Ok(()),
        }
    }
}
