//! What an entry of the capture set is for, as user space names it.

use ipnet::{IpNet, Ipv4Net};
use std::net::{IpAddr, SocketAddr};
use weft_ebpf_common::{CaptureTarget, LpmKey};

/// TCP destinations that have a verdict of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// Every address and port of a network; the longest prefix counts. Host bits are ignored.
    Network(IpNet),
    /// One port, not zero, of an address that is [`Verdict::ByPort`](crate::Verdict::ByPort) or `Node`. Only `Capture`
    /// means anything there.
    Port(SocketAddr),
    /// One port, not zero, of every address that is [`Verdict::Node`](crate::Verdict::Node). Only `Capture` means
    /// anything there.
    NodePort(u16),
}

impl From<IpNet> for Target {
    fn from(net: IpNet) -> Self {
        Target::Network(net)
    }
}

impl From<IpAddr> for Target {
    fn from(ip: IpAddr) -> Self {
        Target::Network(ip.into())
    }
}

impl Target {
    pub(crate) fn key(self) -> LpmKey {
        let target = match self {
            Target::Network(net) => {
                let net = canonical(net.trunc());
                CaptureTarget::Network(net.network(), net.prefix_len())
            }
            Target::Port(at) => CaptureTarget::Port(SocketAddr::new(at.ip().to_canonical(), at.port())),
            Target::NodePort(port) => CaptureTarget::NodePort(port),
        };
        LpmKey::tcp(target).expect("an IpNet's prefix fits its address, and nobody serves port zero")
    }

    pub(crate) fn from_key(target: CaptureTarget) -> Option<Target> {
        Some(match target {
            CaptureTarget::Network(network, prefix) => Target::Network(IpNet::new(network, prefix).ok()?),
            CaptureTarget::Port(at) => Target::Port(at),
            CaptureTarget::NodePort(port) => Target::NodePort(port),
        })
    }
}

/// A v4-mapped network is the IPv4 network: no connection is ever looked up by the mapped form.
fn canonical(net: IpNet) -> IpNet {
    let IpNet::V6(v6) = net else { return net };
    let mapped = v6.network().to_ipv4_mapped().zip(v6.prefix_len().checked_sub(96));
    mapped.and_then(|(ip, prefix)| Ipv4Net::new(ip, prefix).ok()).map_or(net, IpNet::V4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_networks_are_ipv4() {
        for (given, expected) in [
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("::ffff:10.1.2.3/128", "10.1.2.3/32"),
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("::/0", "::/0"),
        ] {
            assert_eq!(canonical(given.parse().unwrap()), expected.parse::<IpNet>().unwrap(), "{given}");
        }
    }
}
