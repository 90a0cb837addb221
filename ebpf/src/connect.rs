//! cgroup/connect4 and cgroup/connect6, attached once a node at the root of cgroup2: decide, when an application
//! connects, whether the agent carries that connection, and mark it so that the policy route turns it to `lo`.
//!
//! A mark is never trusted here. In an enrolled network namespace this hook writes it on every connection that it
//! captures and clears ours from those that it lets pass; only sockets registered in `OWN` are left alone.

use crate::maps::{self, OWN};
use aya_ebpf::{
    Global,
    bindings::bpf_sock,
    helpers::generated::{bpf_get_netns_cookie, bpf_set_retval, bpf_setsockopt},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use aya_log_ebpf::info;
use weft_ebpf_common::{Address, Counter, MARK_CAPTURED, MARK_MASK, PodEntry, Verdict};

const REFUSE: i32 = 0;
const PASS: i32 = 1;

const IPPROTO_TCP: u32 = 6;
const IPPROTO_MPTCP: u32 = 262;
const SOL_SOCKET: i32 = 1;
const SO_MARK: i32 = 36;
const EPERM: i32 = 1;
const ENETUNREACH: i32 = 101;
const ECONNREFUSED: i32 = 111;

/// Set by the loader where the kernel has bpf_set_retval (5.18). A constant, so that elsewhere the verifier never
/// sees the call; connect then says EPERM.
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: Global<u8> = Global::new(0);

/// Reads one word of a context field. Volatile, so that the compiler neither merges nor narrows loads, which the
/// verifier refuses for context fields.
macro_rules! load {
    ($field:expr) => {
        // SAFETY: a field of a context that the kernel passed to this program.
        unsafe { core::ptr::read_volatile(&raw const $field) }
    };
}

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    match enrolled(&ctx) {
        Some(pod) => decide(&ctx, pod, Address::from_v4_word(load!((*ctx.sock_addr).user_ip4))),
        None => PASS,
    }
}

/// Also sees v4-mapped destinations of dual-stack sockets, for which connect4 is not called.
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    match enrolled(&ctx) {
        Some(pod) => decide(
            &ctx,
            pod,
            Address::from_words([
                load!((*ctx.sock_addr).user_ip6[0]),
                load!((*ctx.sock_addr).user_ip6[1]),
                load!((*ctx.sock_addr).user_ip6[2]),
                load!((*ctx.sock_addr).user_ip6[3]),
            ]),
        ),
        None => PASS,
    }
}

/// The pod behind a TCP socket that is not the agent's own. The path of every other process on the node ends here,
/// after one hash lookup.
#[inline(always)]
fn enrolled(ctx: &SockAddrContext) -> Option<&'static PodEntry> {
    let protocol = load!((*ctx.sock_addr).protocol);
    if protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP {
        return None;
    }
    // SAFETY: the context is the program's own.
    let pod = maps::pod(unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) })?;
    // SAFETY: the helper takes the context's socket; the value is not read.
    let own = unsafe { OWN.get_ptr_mut(ctx) };
    own.is_null().then_some(pod)
}

#[inline(always)]
fn decide(ctx: &SockAddrContext, pod: &PodEntry, destination: Address) -> i32 {
    // SAFETY: the context's socket, which the kernel never leaves null in a connect hook.
    let socket = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    if destination.is_loopback() || destination.is_unspecified() || pod.owns(&destination) {
        return let_pass(ctx, socket);
    }
    let verdict = maps::verdict(destination, port(ctx));
    if verdict != Verdict::Capture as u32 && !(verdict == Verdict::LetGo as u32 && pod.on_hold()) {
        return let_pass(ctx, socket);
    }
    if load!((*socket).bound_dev_if) != 0 {
        // The policy route leads to lo, which such a socket cannot use: it would leave by its device, in the clear.
        return refuse(ctx, &destination, Counter::RefusedBoundDevice, EPERM);
    }
    if !pod.has_family_of(&destination) {
        // No route turns this family to lo.
        return refuse(ctx, &destination, Counter::RefusedNoAddress, ENETUNREACH);
    }
    if !maps::slot_is_filled(pod.slot()) {
        // Said here because nothing else can: the reset for a SYN to a foreign address on lo does not arrive.
        return refuse(ctx, &destination, Counter::RefusedNoAgent, ECONNREFUSED);
    }
    if !set_mark(ctx, MARK_CAPTURED) {
        return refuse(ctx, &destination, Counter::RefusedNoAgent, EPERM);
    }
    maps::count(Counter::Captured);
    info!(ctx, "captured connection to {:i}", destination.octets());
    PASS
}

/// The port that is dialled, in network order.
#[inline(always)]
fn port(ctx: &SockAddrContext) -> [u8; 2] {
    // The lower half of the word, whose bytes lie in memory as they do in the packet.
    (load!((*ctx.sock_addr).user_port) as u16).to_ne_bytes()
}

/// A connection that stays plain. With our mark on it, by the application's hand or from an earlier captured
/// connection of the same socket, it would loop through lo.
#[inline(always)]
fn let_pass(ctx: &SockAddrContext, socket: *mut bpf_sock) -> i32 {
    if load!((*socket).mark) & MARK_MASK == MARK_CAPTURED && !set_mark(ctx, 0) {
        return REFUSE;
    }
    PASS
}

#[inline(always)]
fn set_mark(ctx: &SockAddrContext, mark: u32) -> bool {
    let mut mark = mark;
    // SAFETY: the option value lives until the helper returns, and its length is given.
    let result = unsafe {
        bpf_setsockopt(
            ctx.sock_addr.cast(),
            SOL_SOCKET,
            SO_MARK,
            (&raw mut mark).cast(),
            size_of::<u32>() as i32,
        )
    };
    result == 0
}

#[inline(always)]
fn refuse(ctx: &SockAddrContext, destination: &Address, counter: Counter, errno: i32) -> i32 {
    maps::count(counter);
    if HAS_SET_RETVAL.load() != 0 {
        // SAFETY: only sets what connect(2) returns.
        unsafe { bpf_set_retval(-errno) };
    }
    info!(ctx, "refused connection to {:i}, errno {}", destination.octets(), errno);
    REFUSE
}
