//! sk_lookup, one instance for each enrolled pod's network namespace: turns new connections to the agent's listener
//! in that pod. Established connections never come here.
//!
//! The pod is known from constants set when the instance is loaded: this hook may not ask for the namespace's
//! cookie, and a pod picked by the packet's addresses could be forged.

use crate::maps;
use aya_ebpf::{Global, macros::sk_lookup, programs::SkLookupContext};
use aya_log_ebpf::info;
use weft_ebpf_common::{Address, Counter, LOOPBACK_IFINDEX, ProbeKey, TUNNEL_PORT};

const DROP: u32 = 0;
const PASS: u32 = 1;

const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;

/// The pod's slot in `SLOTS`.
#[unsafe(no_mangle)]
static SLOT: Global<u32> = Global::new(0);
/// The pod's key in `PODS`.
#[unsafe(no_mangle)]
static COOKIE: Global<u64> = Global::new(0);
/// The pod's addresses, as words of [`Address`]; zero for none.
#[unsafe(no_mangle)]
static POD_V4: Global<[u32; 4]> = Global::new([0; 4]);
#[unsafe(no_mangle)]
static POD_V6: Global<[u32; 4]> = Global::new([0; 4]);

/// The port that the pod's listener is bound to.
#[unsafe(no_mangle)]
static LISTENER_PORT: Global<u32> = Global::new(0);

#[sk_lookup]
pub fn lookup(ctx: SkLookupContext) -> u32 {
    if load!((*ctx.lookup).protocol) != IPPROTO_TCP {
        return PASS;
    }
    if load!((*ctx.lookup).family) == AF_INET {
        let local = Address::from_v4_word(load!((*ctx.lookup).local_ip4));
        let remote = Address::from_v4_word(load!((*ctx.lookup).remote_ip4));
        return steer(&ctx, &local, &remote, &Address::from_words(POD_V4.load()));
    }
    let local = Address::from_words([
        load!((*ctx.lookup).local_ip6[0]),
        load!((*ctx.lookup).local_ip6[1]),
        load!((*ctx.lookup).local_ip6[2]),
        load!((*ctx.lookup).local_ip6[3]),
    ]);
    let remote = Address::from_words([
        load!((*ctx.lookup).remote_ip6[0]),
        load!((*ctx.lookup).remote_ip6[1]),
        load!((*ctx.lookup).remote_ip6[2]),
        load!((*ctx.lookup).remote_ip6[3]),
    ]);
    steer(&ctx, &local, &remote, &Address::from_words(POD_V6.load()))
}

#[inline(always)]
fn steer(ctx: &SkLookupContext, local: &Address, remote: &Address, own: &Address) -> u32 {
    // local_port is in host byte order here, unlike remote_port.
    let port = load!((*ctx.lookup).local_port);
    let to_pod = local.is_loopback() || local.is(own);
    if to_pod && port == LISTENER_PORT.load() {
        // Nobody has business at the listener's own port: the agent would relay the connection to itself, forever.
        return DROP;
    }
    if load!((*ctx.lookup).ingress_ifindex) == LOOPBACK_IFINDEX {
        // The application's own loopback traffic and the agent's leg to it go where they are going; anything else
        // on lo was turned there by the policy route.
        if to_pod {
            return PASS;
        }
        return to_agent(ctx, remote);
    }
    // What a pod sends to its own address arrives as if from its device, not from lo.
    if remote.is(own) || remote.is_loopback() {
        return PASS;
    }
    let Some(pod) = maps::pod(COOKIE.load()) else {
        // Not enrolled yet, or not any more: an enrolment that failed half way must not cut the pod off.
        return PASS;
    };
    if port == TUNNEL_PORT as u32 {
        return to_agent(ctx, remote);
    }
    let remote_port = u16::from_be(load!((*ctx.lookup).remote_port));
    if maps::is_probe(&ProbeKey::new(*remote, remote_port, *local, port as u16)) {
        maps::count(Counter::Probes);
        info!(ctx, "passed the kubelet's connection from {:i}", remote.octets());
        return PASS;
    }
    // Before its own agent has seen it published, a pod still takes plaintext from everyone, through the agent.
    if !pod.on_hold() && maps::is_refused_source(remote) {
        // A drop is answered with a reset: the caller learns at once.
        maps::count(Counter::RefusedPlaintext);
        info!(ctx, "refused plaintext from {:i}", remote.octets());
        return DROP;
    }
    to_agent(ctx, remote)
}

#[inline(always)]
fn to_agent(ctx: &SkLookupContext, remote: &Address) -> u32 {
    if maps::assign(ctx, SLOT.load()) {
        return PASS;
    }
    maps::count(Counter::RefusedNoAgent);
    info!(ctx, "refused connection from {:i}: no agent listens", remote.octets());
    DROP
}
