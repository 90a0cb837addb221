//! One enrolled pod: what the agent holds of it, and the steps by which it leaves the mesh.

use crate::{Connection, Error, Netns, diag, kernel::Shared, routes, sockets};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
};

/// The addresses a pod is reached by: at least one, at most one of a family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PodAddresses {
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
}

impl PodAddresses {
    /// The first address of each family.
    pub fn from_ips(ips: impl IntoIterator<Item = IpAddr>) -> PodAddresses {
        let mut addresses = PodAddresses::default();
        for ip in ips {
            match ip.to_canonical() {
                IpAddr::V4(ip) => addresses.v4 = addresses.v4.or(Some(ip)),
                IpAddr::V6(ip) => addresses.v6 = addresses.v6.or(Some(ip)),
            }
        }
        addresses
    }

    /// One or two addresses.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }

    /// Whether `ip` is one of them; a v4-mapped address counts as IPv4.
    pub fn contains(&self, ip: IpAddr) -> bool {
        match ip.to_canonical() {
            IpAddr::V4(ip) => self.v4 == Some(ip),
            IpAddr::V6(ip) => self.v6 == Some(ip),
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if *self == PodAddresses::default() {
            return Err(Error::PodAddress("none at all".into()));
        }
        let unfit = |ip: &IpAddr| {
            let mapped = ip.to_canonical() != *ip;
            ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || mapped
        };
        match self.iter().find(unfit) {
            Some(ip) => Err(Error::PodAddress(ip.to_string())),
            None => Ok(()),
        }
    }
}

/// An enrolled pod. Dropping it changes nothing in the kernel, except that a listener that was not taken closes, and
/// the pod's connections are refused from then on.
#[derive(Debug)]
pub struct Pod {
    pub(crate) shared: Arc<Shared>,
    pub(crate) netns: Netns,
    pub(crate) addresses: PodAddresses,
    pub(crate) slot: u32,
    pub(crate) listener: Option<TcpListener>,
    pub(crate) listener_port: u16,
}

impl Pod {
    pub fn cookie(&self) -> u64 {
        self.netns.cookie()
    }

    pub fn addresses(&self) -> PodAddresses {
        self.addresses
    }

    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The pod's listener, once. Both directions arrive here: the local address of an accepted connection is what the
    /// caller dialled, the peer its own (v4-mapped for IPv4). While no process holds it, the pod is refused.
    pub fn take_listener(&mut self) -> Option<TcpListener> {
        self.listener.take()
    }

    /// The port that the listener is bound to. The kernel refuses connections to it, and so does
    /// [`Pod::inbound_socket`].
    pub fn listener_port(&self) -> u16 {
        self.listener_port
    }

    /// Whether the kernel treats the pod as published. True right after [`crate::Kernel::enroll`] only if a
    /// predecessor had published it.
    pub fn published(&self) -> Result<bool, Error> {
        let entry = self.shared.maps.pod(self.cookie())?.ok_or(Error::NotEnrolled(self.cookie()))?;
        Ok(!entry.on_hold())
    }

    /// Ends the hold, or begins it again: see [`crate::Verdict::LetGo`] and [`crate::Kernel::refuse_source`].
    pub fn set_published(&self, published: bool) -> Result<(), Error> {
        self.shared.maps.set_hold(self.cookie(), !published)
    }

    /// New connections in both directions are plain TCP from here on. Open ones live on, through the rule and route,
    /// which stay. The listener serves nobody any more. Nothing to stop is no error.
    pub fn stop_capture(&self) -> Result<(), Error> {
        self.shared.stop_capture(self.cookie(), Some(self.slot))
    }

    /// The last step, when no connection is left: those that were captured would break.
    pub fn remove_routes(&self) -> Result<(), Error> {
        routes::remove(&self.netns)
    }

    /// The pod's open connections with others in which no agent has a part: those that are older than its enrolment, and
    /// what is let go. Takes some milliseconds.
    pub fn direct_connections(&self) -> Result<Vec<Connection>, Error> {
        diag::direct(&self.netns, self.addresses)
    }

    /// Ends one of them, at both ends. One that has ended is no error.
    pub fn destroy(&self, connection: &Connection) -> Result<(), Error> {
        diag::destroy(&self.netns, connection)
    }

    /// A connection from the pod to the network, started but not established: wait until it is writable, then ask
    /// for its error. Mark 0x539, from the pod's address, never captured.
    pub fn outbound_socket(&self, to: SocketAddr) -> io::Result<TcpStream> {
        sockets::outbound(&self.netns, self.shared.maps.own(), to)
    }

    /// A connection to the pod's application that appears to come from `client`, at a port of our choice; started but
    /// not established. Refuses an address that is not the pod's, and the listener's own port: those would come back
    /// to the agent, or go where the application is not.
    pub fn inbound_socket(&self, client: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
        if !self.addresses.contains(to.ip()) || to.port() == self.listener_port {
            let message = format!("{to} is not the application's");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        sockets::inbound(&self.netns, self.shared.maps.own(), client, to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_cannot_be_a_pods() {
        for (ips, ok) in [
            (&["10.0.0.2"][..], true),
            (&["10.0.0.2", "fd00::2"], true),
            (&[], false),
            (&["127.0.0.1"], false),
            (&["10.0.0.2", "::1"], false),
            (&["0.0.0.0"], false),
            (&["224.0.0.1"], false),
        ] {
            let addresses = PodAddresses::from_ips(ips.iter().map(|ip| ip.parse().unwrap()));
            assert_eq!(addresses.check().is_ok(), ok, "{ips:?}");
        }
        let addresses = PodAddresses::from_ips(["::ffff:10.0.0.2".parse().unwrap()]);
        assert!(
            addresses.contains("10.0.0.2".parse().unwrap())
                && addresses.contains("::ffff:10.0.0.2".parse().unwrap())
        );
        assert!(!addresses.contains("10.0.0.3".parse().unwrap()));
    }
}
