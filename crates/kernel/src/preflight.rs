//! What this kernel must have, tried where it can be tried: version numbers lie on distributions that backport.

use crate::{Options, save, sys};
use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};
use std::{fmt, path::Path};

/// One feature.
#[derive(Clone, Debug)]
pub struct Check {
    pub feature: &'static str,
    pub needed_by: &'static str,
    /// The first kernel that has it, or where to get it.
    pub since: &'static str,
    pub state: State,
}

/// How a check went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Ok,
    /// Weft works without it, less well.
    Absent,
    Missing(String),
}

/// The table that `weft-agent preflight` prints.
#[derive(Clone, Debug)]
pub struct Report {
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether an instance could be opened here.
    pub fn ok(&self) -> bool {
        !self.checks.iter().any(|check| matches!(check.state, State::Missing(_)))
    }
}

/// Tries every feature. Changes nothing; needs the capabilities that the agent needs.
pub fn run(options: &Options) -> Report {
    Report { checks: [files(options), programs(), namespaces()].concat() }
}

fn check(feature: &'static str, needed_by: &'static str, since: &'static str, state: State) -> Check {
    Check { feature, needed_by, since, state }
}

fn present(found: bool) -> State {
    if found { State::Ok } else { State::Missing("not there".into()) }
}

fn probed<E: fmt::Display>(result: Result<bool, E>) -> State {
    match result {
        Ok(found) => present(found),
        Err(error) => State::Missing(error.to_string()),
    }
}

fn files(options: &Options) -> Vec<Check> {
    let bpffs = nix::sys::statfs::statfs(&options.bpffs)
        .is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC);
    let bpffs_state =
        if bpffs { State::Ok } else { State::Missing(format!("{} is not one", options.bpffs.display())) };
    let root = options.cgroup();
    let pods = root.as_ref().ok().and_then(|root| save::pods_cgroup(root, options.pods_cgroup.as_deref()));
    let cgroup = match root {
        Ok(_) => State::Ok,
        Err(error) => State::Missing(error.to_string()),
    };
    let sysctl = |name: &str| present(Path::new("/proc/sys/net").join(name).exists());
    vec![
        check("cgroup2", "connect hooks", "mounted", cgroup),
        check(
            "a cgroup of all pods",
            "Services beside others' hooks",
            "a kubelet",
            pods.map_or(State::Absent, |_| State::Ok),
        ),
        check("bpffs", "pins that outlive the agent", "mounted", bpffs_state),
        check("tcp_fwmark_accept", "answers to the application", "3.16", sysctl("ipv4/tcp_fwmark_accept")),
        check("fwmark_reflect", "refusals by the application", "3.16", sysctl("ipv4/fwmark_reflect")),
    ]
}

fn programs() -> Vec<Check> {
    let program = |kind| probed(is_program_supported(kind));
    let map = |kind| probed(is_map_supported(kind));
    let connect = |helper| probed(is_helper_supported(ProgramType::CgroupSockAddr, helper));
    let set_retval = match connect(BpfHelper::BPF_FUNC_set_retval) {
        State::Ok => State::Ok,
        // Refused connections say EPERM then.
        _ => State::Absent,
    };
    vec![
        check("cgroup/connect programs", "capture", "4.17", program(ProgramType::CgroupSockAddr)),
        check("sk_lookup programs", "delivery to the agent", "5.9", program(ProgramType::SkLookup)),
        check("ingress_ifindex in sk_lookup", "telling directions apart", "5.17", ingress_ifindex()),
        check("SOCKMAP", "the agent's listeners", "4.14", map(MapType::SockMap)),
        check("LPM_TRIE", "the capture set", "4.11", map(MapType::LpmTrie)),
        check("SK_STORAGE", "the agent's own sockets", "5.2", map(MapType::SkStorage)),
        check(
            "bpf_get_netns_cookie",
            "finding the pod",
            "5.7",
            connect(BpfHelper::BPF_FUNC_get_netns_cookie),
        ),
        check("bpf_setsockopt in connect", "marking", "5.8", connect(BpfHelper::BPF_FUNC_setsockopt)),
        check(
            "bpf_sk_storage_get in connect",
            "letting the agent pass",
            "5.11",
            connect(BpfHelper::BPF_FUNC_sk_storage_get),
        ),
        check("bpf_set_retval", "saying why (EPERM without)", "5.18", set_retval),
    ]
}

fn namespaces() -> Vec<Check> {
    let socket = std::net::UdpSocket::bind(("127.0.0.1", 0));
    let cookie = match socket.and_then(|socket| sys::netns_cookie(&socket)) {
        Ok(_) => State::Ok,
        Err(error) => State::Missing(error.to_string()),
    };
    let transparent = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
        .and_then(|socket| socket.set_ip_transparent_v4(true));
    let transparent = match transparent {
        Ok(()) => State::Ok,
        Err(error) => State::Missing(error.to_string()),
    };
    vec![
        check("SO_NETNS_COOKIE", "finding the pod", "5.14", cookie),
        check("IP_TRANSPARENT", "true addresses (CAP_NET_ADMIN)", "2.6.37", transparent),
    ]
}

/// Loads a program that only reads the field.
fn ingress_ifindex() -> State {
    match sys::probe_ingress_ifindex() {
        Ok(()) => State::Ok,
        Err(error) => State::Missing(error.to_string()),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<32} {:<32} {:<9} STATE", "FEATURE", "NEEDED FOR", "KERNEL")?;
        for Check { feature, needed_by, since, state } in &self.checks {
            let state = match state {
                State::Ok => "ok",
                State::Absent => "absent (optional)",
                State::Missing(why) => &format!("MISSING: {why}"),
            };
            writeln!(f, "{feature:<32} {needed_by:<32} {since:<9} {state}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_missing_feature_is_named_and_fails_the_report() {
        let mut report = Report {
            checks: vec![check("a", "b", "5.9", State::Ok), check("c", "d", "5.18", State::Absent)],
        };
        assert!(report.ok());
        report.checks.push(check(
            "sk_lookup programs",
            "delivery",
            "5.9",
            State::Missing("not there".into()),
        ));
        assert!(!report.ok());
        assert!(report.to_string().contains("MISSING: not there"));
    }
}
