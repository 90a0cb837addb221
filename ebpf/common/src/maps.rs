//! The shape of every pinned map, checked before a predecessor's map is used.

use crate::{Address, Dialled, LpmKey, MAX_CAPTURE, MAX_COUNTERS, MAX_PODS, MAX_SOURCES, PodEntry};

/// `enum bpf_map_type` of the kernel, as far as we use it.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapType {
    Hash = 1,
    PerCpuArray = 6,
    LpmTrie = 11,
    SockMap = 15,
    SkStorage = 24,
}

/// What the kernel says of a map, which must be what the programs were compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapShape {
    pub name: &'static str,
    pub map_type: MapType,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
}

const fn shape(
    name: &'static str,
    map_type: MapType,
    key: usize,
    value: usize,
    max_entries: u32,
) -> MapShape {
    MapShape { name, map_type, key_size: key as u32, value_size: value as u32, max_entries }
}

/// Every map that is pinned, in the order in which they are checked. The declarations in `ebpf/src/maps.rs` must
/// say the same: `Kernel::open` compares both with what the kernel has.
pub const MAPS: [MapShape; 7] = [
    // cookie of the network namespace -> pod
    shape("PODS", MapType::Hash, size_of::<u64>(), size_of::<PodEntry>(), MAX_PODS),
    // slot -> the agent's listener in that pod
    shape("SLOTS", MapType::SockMap, size_of::<u32>(), size_of::<u32>(), MAX_PODS),
    // (protocol, port or none, destination) -> Verdict
    shape("CAPTURE", MapType::LpmTrie, size_of::<LpmKey>(), size_of::<u32>(), MAX_CAPTURE),
    // source address -> 1: its plaintext is refused
    shape("SOURCES", MapType::Hash, size_of::<Address>(), size_of::<u32>(), MAX_SOURCES),
    // the agent's own sockets
    shape("OWN", MapType::SkStorage, size_of::<u32>(), size_of::<u32>(), 0),
    // what is being dialled by a socket
    shape("DIALLED", MapType::SkStorage, size_of::<u32>(), size_of::<Dialled>(), 0),
    // Counter -> u64 a CPU
    shape("COUNTERS", MapType::PerCpuArray, size_of::<u32>(), size_of::<u64>(), MAX_COUNTERS),
];

/// Only the names, for loaders.
pub const PINNED: [&str; MAPS.len()] = {
    let mut names = [""; MAPS.len()];
    let mut i = 0;
    while i < MAPS.len() {
        names[i] = MAPS[i].name;
        i += 1;
    }
    names
};
