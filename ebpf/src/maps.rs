//! The maps, all pinned by user space and shared by every instance of the programs. `weft_ebpf_common::MAPS` says
//! the same shapes again, for checking what a predecessor left.

use aya_ebpf::{
    EbpfContext,
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::SkStorage,
    helpers::generated::{bpf_map_lookup_elem, bpf_sk_assign, bpf_sk_release},
    macros::{btf_map, map},
    maps::{HashMap, LpmTrie, PerCpuArray, SockMap},
    programs::{SkLookupContext, SockAddrContext},
};
use weft_ebpf_common::{
    Address, CaptureKey, Counter, Dialled, LpmKey, MAX_CAPTURE, MAX_COUNTERS, MAX_PODS, MAX_SOURCES,
    PodEntry, Verdict,
};

#[map]
static PODS: HashMap<u64, PodEntry> = HashMap::with_max_entries(MAX_PODS, 0);
#[map]
static SLOTS: SockMap = SockMap::with_max_entries(MAX_PODS, 0);
#[map]
static CAPTURE: LpmTrie<CaptureKey, u32> = LpmTrie::with_max_entries(MAX_CAPTURE, 0);
#[map]
static SOURCES: HashMap<Address, u32> = HashMap::with_max_entries(MAX_SOURCES, BPF_F_NO_PREALLOC);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(MAX_COUNTERS, 0);
/// Sockets that user space registered as the agent's. Nobody else can write it: a mark can be set by anyone with
/// CAP_NET_RAW, an entry here only through the map's descriptor.
#[btf_map]
pub static OWN: SkStorage<u32> = SkStorage::new();
/// What a socket is dialling, from `save.rs` to `connect.rs`. Ends with the socket.
#[btf_map]
static DIALLED: SkStorage<Dialled> = SkStorage::new();

/// The pod whose network namespace has this cookie.
#[inline(always)]
pub fn pod(cookie: u64) -> Option<&'static PodEntry> {
    // SAFETY: entries are replaced whole by user space and freed only after a grace period; a program that reads
    // half of an old and half of a new entry sees two valid ones.
    unsafe { PODS.get(cookie) }
}

/// What the capture set says of a TCP destination, zero if nothing; never `ByPort` or `Node`. The port is in network
/// order.
#[inline(always)]
pub fn verdict(destination: Address, port: [u8; 2]) -> u32 {
    let verdict = capture(CaptureKey::tcp(destination));
    let node = verdict == Verdict::Node as u32;
    // Nearly every destination ends here.
    if !node && verdict != Verdict::ByPort as u32 {
        return verdict;
    }
    let captured = Verdict::Capture as u32;
    if capture(CaptureKey::tcp_port(destination, port)) == captured
        || (node && capture(CaptureKey::node_port(port)) == captured)
    {
        return captured;
    }
    Verdict::LetGo as u32
}

#[inline(always)]
fn capture(key: CaptureKey) -> u32 {
    // Our own key type, not aya's packed one, whose bytes would be copied one by one.
    let key = LpmKey::lookup(key);
    // SAFETY: map and key have the types that the map was declared with; the helper copies the key.
    let value =
        unsafe { bpf_map_lookup_elem((&raw const CAPTURE).cast_mut().cast(), (&raw const key).cast()) };
    // SAFETY: not null, so it points to a value of this map, a u32.
    if value.is_null() { 0 } else { unsafe { value.cast::<u32>().read() } }
}

/// Remembers what the context's socket is dialling, in the place of what an earlier call left. Where the kernel has no
/// memory for it, no earlier call left anything either.
#[inline(always)]
pub fn save_dialled(ctx: &SockAddrContext, dialled: Dialled) {
    // SAFETY: the helper takes the context's socket. A new value begins as zeroes.
    let value = unsafe { DIALLED.get_or_insert_ptr_mut(ctx, None) };
    if !value.is_null() {
        // SAFETY: not null, so it points to a value of this map; only one call of connect() runs on a socket at a time.
        unsafe { value.write(dialled) };
    }
}

/// What was remembered, once.
#[inline(always)]
pub fn take_dialled(ctx: &SockAddrContext) -> Option<(Address, u32)> {
    // SAFETY: as above; nothing is made where there is nothing.
    let value = unsafe { DIALLED.get_ptr_mut(ctx) };
    // SAFETY: as above.
    unsafe { value.as_mut() }?.take()
}

/// Whether plaintext from this address is refused.
#[inline(always)]
pub fn is_refused_source(address: &Address) -> bool {
    // SAFETY: only whether there is an entry counts.
    unsafe { SOURCES.get(address) }.is_some()
}

/// Whether an agent listens in the slot.
#[inline(always)]
pub fn slot_is_filled(slot: u32) -> bool {
    // SAFETY: map and key have the declared types.
    let listener =
        unsafe { bpf_map_lookup_elem((&raw const SLOTS).cast_mut().cast(), (&raw const slot).cast()) };
    if listener.is_null() {
        return false;
    }
    // SAFETY: a lookup in a SOCKMAP takes a reference, which must be given back.
    unsafe { bpf_sk_release(listener) };
    true
}

/// Hands the packet to the listener in the slot; false if there is none.
#[inline(always)]
pub fn assign(ctx: &SkLookupContext, slot: u32) -> bool {
    // SAFETY: map and key have the declared types.
    let listener =
        unsafe { bpf_map_lookup_elem((&raw const SLOTS).cast_mut().cast(), (&raw const slot).cast()) };
    if listener.is_null() {
        return false;
    }
    // SAFETY: the context is the program's, the socket was looked up above and is released exactly once.
    unsafe {
        let result = bpf_sk_assign(ctx.as_ptr(), listener, 0);
        bpf_sk_release(listener);
        result == 0
    }
}

/// Counts on this CPU only; user space sums.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the pointer is this CPU's own value. A program that preempts this one may cost a count, no more.
        unsafe { *value += 1 };
    }
}
