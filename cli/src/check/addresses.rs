//! Whether the addresses of pods and Services lie where traffic is captured. What lies outside would leave in the clear.

use std::net::IpAddr;

use ipnet::IpNet;
use weft_api::Node;

use super::{
    report::{Check, Outcome},
    view::{Installed, View},
};
use crate::chart::Values;
use crate::cluster::Part;

const HINT: &str = "say where pods have their addresses: --set mesh.podNetworks=10.0.0.0/8 (comma-separated), with \
    `weft install` or `weft upgrade`; what is in no known range is not captured";

/// The ranges that settings add to what the cluster says of itself.
#[derive(Debug, Default)]
pub struct Ranges {
    pods: Vec<IpNet>,
    external: Vec<IpNet>,
}

impl Ranges {
    pub fn of_values(values: &Values) -> Self {
        Self {
            pods: networks(values.text("mesh.podNetworks")),
            external: networks(values.text("mesh.externalNetworks")),
        }
    }

    pub fn of_installation(installed: &Installed) -> Self {
        Self {
            pods: networks(installed.setting("WEFT_POD_NETWORKS")),
            external: networks(installed.setting("WEFT_EXTERNAL_NETWORKS")),
        }
    }
}

fn networks(text: Option<&str>) -> Vec<IpNet> {
    text.unwrap_or_default().split(',').filter_map(|range| range.trim().parse().ok()).collect()
}

pub fn checks(view: &View, ranges: &Ranges) -> Vec<Check> {
    let what = "the addresses of all pods lie where traffic is captured";
    let services = "the ranges of Services are known";
    vec![
        Check::from(Outcome::Error, what, outside(view, ranges), HINT),
        match &view.service_cidrs {
            Ok(cidrs) if cidrs.iter().any(|cidr| !cidr.spec.cidrs.is_empty()) => Check::success(services),
            Ok(_) => Check::error(services, "there is no ServiceCIDR", "set mesh.serviceNetworks"),
            Err(why) => Check::unknown(services, why),
        },
    ]
}

fn outside(view: &View, ranges: &Ranges) -> Part<Vec<String>> {
    let nodes =
        view.nodes.as_ref()?.iter().filter_map(|node| serde_json::from_value::<Node>(node.clone()).ok());
    let mut captured: Vec<IpNet> = nodes.flat_map(|node| node.pod_networks().collect::<Vec<_>>()).collect();
    captured.extend(&ranges.pods);
    let known = |ip: &IpAddr| {
        captured.iter().any(|range| range.contains(ip))
            && !ranges.external.iter().any(|range| range.contains(ip))
    };
    let pods = view.pods.as_ref()?.iter().filter(|pod| !pod.spec.host_network && !pod.is_gone());
    let wrong = pods.flat_map(|pod| {
        let name = format!("{}/{}", pod.metadata.namespace.as_deref().unwrap_or_default(), pod.metadata.name);
        let addresses = pod.addresses().into_iter().filter(|ip| !known(ip));
        addresses.map(move |ip| format!("{name}: {ip}")).collect::<Vec<_>>()
    });
    Ok(wrong.collect())
}
