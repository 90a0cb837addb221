//! `discovery.k8s.io/v1/EndpointSlice`.

use std::{net::IpAddr, num::NonZeroU16};

use serde::Deserialize;

use crate::{
    field::{self, Protocol},
    labels,
    meta::ObjectMeta,
    object::FieldError,
};

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    pub metadata: ObjectMeta,
    pub address_type: AddressType,
    #[serde(default, deserialize_with = "field::nullable")]
    pub endpoints: Vec<Endpoint>,
    #[serde(default, deserialize_with = "field::nullable")]
    pub ports: Vec<EndpointPort>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum AddressType {
    IPv4,
    IPv6,
    #[serde(rename = "FQDN")]
    Fqdn,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Only the first counts: Kubernetes defines no meaning for others, and kube-proxy does not look at them.
    #[serde(default, deserialize_with = "field::nullable")]
    pub addresses: Vec<String>,
    #[serde(default, deserialize_with = "field::nullable")]
    pub conditions: EndpointConditions,
    #[serde(default)]
    pub target_ref: Option<ObjectReference>,
    #[serde(default, deserialize_with = "field::optional_name")]
    pub node_name: Option<String>,
    /// The failure domain it is in.
    #[serde(default)]
    pub zone: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct EndpointConditions {
    /// Absent means ready.
    #[serde(default)]
    pub ready: Option<bool>,
    /// As `ready`, but regardless of whether it is ending. Absent means that it serves.
    #[serde(default)]
    pub serving: Option<bool>,
    #[serde(default)]
    pub terminating: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ObjectReference {
    #[serde(default, deserialize_with = "field::nullable")]
    pub kind: String,
    #[serde(default, deserialize_with = "field::optional_name")]
    pub namespace: Option<String>,
    #[serde(default, deserialize_with = "field::nullable")]
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct EndpointPort {
    /// Matches the name of the Service's port, also where both are empty.
    #[serde(default, deserialize_with = "field::nullable")]
    pub name: String,
    /// Absent means that the Service's own target port applies.
    #[serde(default)]
    pub port: Option<NonZeroU16>,
    #[serde(default, deserialize_with = "field::nullable")]
    pub protocol: Protocol,
}

impl EndpointSlice {
    /// The Service of the same namespace that this slice belongs to.
    pub fn service_name(&self) -> Option<&str> {
        self.metadata.labels.get(labels::SERVICE_NAME).map(String::as_str)
    }

    /// Checks what a single field cannot show: that addresses are of the family the slice claims.
    pub(crate) fn validate(&self) -> Result<(), FieldError> {
        for (i, endpoint) in self.endpoints.iter().enumerate() {
            for (j, address) in endpoint.addresses.iter().enumerate() {
                let parsed = address.parse::<IpAddr>();
                let fits = match self.address_type {
                    AddressType::IPv4 => matches!(parsed, Ok(IpAddr::V4(_))),
                    AddressType::IPv6 => matches!(parsed, Ok(IpAddr::V6(_))),
                    AddressType::Fqdn => true,
                };
                if !fits {
                    return Err(FieldError {
                        path: format!("endpoints[{i}].addresses[{j}]"),
                        message: format!("{address:?} is not an address of type {:?}", self.address_type),
                    });
                }
            }
        }
        Ok(())
    }
}

impl Endpoint {
    /// The address, unless the slice is one of DNS names.
    pub fn address(&self) -> Option<IpAddr> {
        let address: IpAddr = self.addresses.first()?.parse().ok()?;
        Some(address.to_canonical())
    }

    pub fn is_ready(&self) -> bool {
        self.conditions.ready.unwrap_or(true)
    }

    /// Whether it is ending, and serves until it has.
    pub fn is_draining(&self) -> bool {
        self.conditions.terminating.unwrap_or(false) && self.conditions.serving.unwrap_or(true)
    }
}
