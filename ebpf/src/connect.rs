//! cgroup/connect4 and cgroup/connect6, attached once a node at the root of cgroup2: decide, when an application
//! connects, whether the agent carries that connection, and mark it so that the policy route turns it to `lo`.
//!
//! A mark is never trusted here. In an enrolled network namespace this hook writes it on every connection that it
//! captures and clears ours from those that it lets pass; only sockets registered in `OWN` are left alone.
//!
//! Programs that were attached to the root before run before this one and may have put another destination into the
//! context. What the application dialled is known from `save.rs`, and counts first: if that is to be captured it is
//! written back, and the agent hears of the Service and not of the backend that the other program chose for it. If not,
//! the other's destination stays, since nobody else may know the way to the Service, and is judged for itself.

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

/// Writes one word of a context field. Volatile, so that no two stores are merged.
macro_rules! store {
    ($field:expr, $value:expr) => {
        // SAFETY: a field that programs of this kind may write, of a context that the kernel passed to this program.
        unsafe { core::ptr::write_volatile(&raw mut $field, $value) }
    };
}

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    let Some(pod) = enrolled(&ctx) else { return PASS };
    let destination = destination4(&ctx);
    let Some((dialled, port)) = hidden(&ctx, pod, &destination) else {
        return decide(&ctx, pod, destination);
    };
    let [.., word] = dialled.words();
    store!((*ctx.sock_addr).user_ip4, word);
    store!((*ctx.sock_addr).user_port, port);
    capture(&ctx, pod, dialled)
}

/// Also sees v4-mapped destinations of dual-stack sockets, for which connect4 is not called.
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    let Some(pod) = enrolled(&ctx) else { return PASS };
    let destination = destination6(&ctx);
    let Some((dialled, port)) = hidden(&ctx, pod, &destination) else {
        return decide(&ctx, pod, destination);
    };
    let [a, b, c, d] = dialled.words();
    store!((*ctx.sock_addr).user_ip6[0], a);
    store!((*ctx.sock_addr).user_ip6[1], b);
    store!((*ctx.sock_addr).user_ip6[2], c);
    store!((*ctx.sock_addr).user_ip6[3], d);
    store!((*ctx.sock_addr).user_port, port);
    capture(&ctx, pod, dialled)
}

/// The destination in the context of connect4.
#[inline(always)]
pub fn destination4(ctx: &SockAddrContext) -> Address {
    Address::from_v4_word(load!((*ctx.sock_addr).user_ip4))
}

/// The destination in the context of connect6.
#[inline(always)]
pub fn destination6(ctx: &SockAddrContext) -> Address {
    Address::from_words([
        load!((*ctx.sock_addr).user_ip6[0]),
        load!((*ctx.sock_addr).user_ip6[1]),
        load!((*ctx.sock_addr).user_ip6[2]),
        load!((*ctx.sock_addr).user_ip6[3]),
    ])
}

/// The port in the context, in network order.
#[inline(always)]
pub fn port(ctx: &SockAddrContext) -> u32 {
    load!((*ctx.sock_addr).user_port)
}

/// The pod behind a TCP socket that is not the agent's own. The path of every other process on the node ends here,
/// after one hash lookup.
#[inline(always)]
pub fn enrolled(ctx: &SockAddrContext) -> Option<&'static PodEntry> {
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

/// Address and port that the application dialled, where another program has changed them and they are to be captured.
#[inline(always)]
fn hidden(ctx: &SockAddrContext, pod: &PodEntry, destination: &Address) -> Option<(Address, u32)> {
    let (dialled, dialled_port) = maps::take_dialled(ctx)?;
    let changed = !dialled.is(destination) || dialled_port != port(ctx);
    (changed && is_captured(pod, &dialled, dialled_port)).then_some((dialled, dialled_port))
}

#[inline(always)]
fn decide(ctx: &SockAddrContext, pod: &PodEntry, destination: Address) -> i32 {
    match is_captured(pod, &destination, port(ctx)) {
        true => capture(ctx, pod, destination),
        false => let_pass(ctx, socket(ctx)),
    }
}

#[inline(always)]
fn is_captured(pod: &PodEntry, destination: &Address, port: u32) -> bool {
    if destination.is_loopback() || destination.is_unspecified() || pod.owns(destination) {
        return false;
    }
    // The lower half of the word, whose bytes lie in memory as they do in the packet.
    let verdict = maps::verdict(*destination, (port as u16).to_ne_bytes());
    verdict == Verdict::Capture as u32 || (verdict == Verdict::LetGo as u32 && pod.on_hold())
}

#[inline(always)]
fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: the context's socket, which the kernel never leaves null in a connect hook.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}

/// Hands the connection to the agent, or refuses it; never lets it pass as it is.
#[inline(always)]
fn capture(ctx: &SockAddrContext, pod: &PodEntry, destination: Address) -> i32 {
    let socket = socket(ctx);
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
