//! What can go wrong between the agent and the kernel, in an operator's words.

use std::{io, net::IpAddr, path::PathBuf};

/// Why the kernel's part could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(
        "this build has no eBPF object: run `cargo xtask build-ebpf` and build again, or name one in the options"
    )]
    NoObject,
    #[error("{} is not a bpffs: mount one with `mount -t bpf bpf {}`", .0.display(), .0.display())]
    NotBpffs(PathBuf),
    #[error("no cgroup2 file system is mounted where this process could see it")]
    NoCgroup,
    #[error("{0:?} is no instance name: use letters, digits, `-` and `_`, at most 64")]
    InstanceName(String),
    #[error(
        "{} was left by a version of weft with another layout: un-enrol the pods with that version, or free them with `weft-agent break-glass`",
        .0.display()
    )]
    Layout(PathBuf),
    #[error("the pinned map {} has another shape ({found}) than this build needs ({needed}): it is not ours", path.display())]
    MapShape { path: PathBuf, found: String, needed: String },
    #[error("the eBPF object lacks {0}: it is not the one of this build")]
    ObjectLacks(&'static str),
    #[error("the kernel refused the eBPF object; `weft-agent preflight` shows what it lacks")]
    Load(#[source] Box<aya::EbpfError>),
    #[error("the kernel refused the program {program}; `weft-agent preflight` shows what it lacks")]
    Program { program: &'static str, source: Box<aya::programs::ProgramError> },
    #[error("the map {map} could not be used")]
    Map { map: &'static str, source: Box<aya::maps::MapError> },
    #[error("{what}")]
    Io { what: String, source: io::Error },
    #[error("{} is not a network namespace", .0.display())]
    NotNetns(PathBuf),
    #[error("{} is the network namespace of the agent or of the host, which is never enrolled", .0.display())]
    OwnNetns(PathBuf),
    #[error("a network namespace was to be entered from inside another")]
    Nested,
    #[error("a pod needs an address that others can reach it by, not {0}")]
    PodAddress(String),
    #[error("{address} is not an address in {}: is that the pod's network namespace?", netns.display())]
    NotInPod { address: IpAddr, netns: PathBuf },
    #[error("{0} pods are enrolled on this node already, which is the limit")]
    TooMany(u32),
    #[error("{what} in the pod's network namespace")]
    Netlink { what: String, source: Box<rtnetlink::Error> },
    #[error("the pod {0} is not enrolled any more")]
    NotEnrolled(u64),
}

impl Error {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let what = what.into();
        move |source| Error::Io { what, source }
    }

    pub(crate) fn map<E: Into<aya::maps::MapError>>(map: &'static str) -> impl FnOnce(E) -> Error {
        move |source| Error::Map { map, source: Box::new(source.into()) }
    }

    pub(crate) fn program(program: &'static str) -> impl FnOnce(aya::programs::ProgramError) -> Error {
        move |source| Error::Program { program, source: Box::new(source) }
    }
}
