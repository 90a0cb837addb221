//! `networking.k8s.io/v1/ServiceCIDR`: a range that Services get their addresses from. Kubernetes has them since 1.33.

use ipnet::IpNet;
use serde::Deserialize;

use crate::{field, meta::ObjectMeta};

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ServiceCidr {
    pub metadata: ObjectMeta,
    #[serde(default, deserialize_with = "field::nullable")]
    pub spec: ServiceCidrSpec,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct ServiceCidrSpec {
    #[serde(default, deserialize_with = "field::networks")]
    pub cidrs: Vec<IpNet>,
}
