//! The kubelet's own connections, by which its probes go straight to the application: which they are is known here, at
//! the end that makes them, and `sk_lookup.rs` lets exactly those pass in the pod.
//!
//! Whether a connect() is the kubelet's is asked in the connect hooks, of the cgroup and the user of the process that calls
//! it. (Programs of the kind sockops can ask for a cgroup only since 6.4, and in their context there may be no process.)
//! The source port does not exist yet there. It does at BPF_SOCK_OPS_TCP_CONNECT_CB, before the SYN leaves; so the socket
//! carries the answer from one to the other, in its storage, and the connection is recorded there.
//!
//! A record is needed for the SYN alone, and is dangerous longer than that: whoever uses the port after the kubelet would
//! be taken for it. So it ends with the first change of the socket's state, which is either that the connection is
//! established (then the pod's kernel has it, and does not look it up any more) or that it is not to be (refused, timed out,
//! closed, the kubelet killed); the kernel says so before it gives the port free. Should another program of this kind have
//! taken the flag away by which we hear of that, then the connection's establishment is heard without it, and the end of one
//! that failed when its socket is closed.
//!
//! What is not recorded goes to the agent as anybody's connection does: that of a process in the kubelet's cgroup that is
//! not root's, one made while the map is full, one by Multipath TCP.

use crate::maps;
use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock,
    },
    helpers::generated::{bpf_get_current_cgroup_id, bpf_get_current_uid_gid, bpf_sock_ops_cb_flags_set},
    macros::{cgroup_sock, sock_ops},
    programs::{SockAddrContext, SockContext, SockOpsContext},
};
use weft_ebpf_common::{Address, Counter, ProbeKey};

const AF_INET: u32 = 2;
const ROOT: u32 = 0;
/// Nothing else is for these programs to say.
const PASS: i32 = 1;

/// Called by the connect hooks: notes with the socket whether it is the kubelet who calls connect() this time.
#[inline(always)]
pub fn note(_: &SockAddrContext, socket: *mut bpf_sock) {
    let before = maps::probing(socket);
    if !is_kubelet() {
        if let Some(before) = before {
            forget(before);
            maps::end_probing(socket);
        }
        return;
    }
    match before {
        Some(before) => forget(before),
        None => maps::begin_probing(socket),
    }
}

/// Whether the process that runs is the kubelet. Root's alone: what the kubelet's cgroup is was decided up to a second ago,
/// and nobody without privilege gets in by that.
#[inline(always)]
fn is_kubelet() -> bool {
    let cgroup = maps::kubelet();
    // SAFETY: the helpers take nothing. The user is in the lower half, as the first user namespace numbers it.
    cgroup != 0
        && unsafe { bpf_get_current_cgroup_id() == cgroup && bpf_get_current_uid_gid() as u32 == ROOT }
}

/// Attached once a node at the root of cgroup2; hears of every TCP connection.
#[sock_ops]
pub fn probe(ctx: SockOpsContext) -> u32 {
    let op = load!((*ctx.ops).op);
    if op != BPF_SOCK_OPS_TCP_CONNECT_CB
        && op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB
        && op != BPF_SOCK_OPS_STATE_CB
    {
        return PASS as u32;
    }
    // SAFETY: a field of the context; null where there is no full socket.
    let socket = unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).__bindgen_anon_2.sk) };
    if socket.is_null() {
        return PASS as u32;
    }
    if let Some(probing) = maps::probing(socket) {
        match op {
            BPF_SOCK_OPS_TCP_CONNECT_CB => record(&ctx, probing),
            _ => forget(probing),
        }
    }
    PASS as u32
}

/// At the root of cgroup2, too: a socket's last descriptor is closed.
#[cgroup_sock(sock_release)]
pub fn release(ctx: SockContext) -> i32 {
    if let Some(probing) = maps::probing(ctx.sock) {
        forget(probing);
    }
    PASS
}

#[inline(always)]
fn record(ctx: &SockOpsContext, probing: &mut ProbeKey) {
    // Whatever others want to hear of stays.
    let flags = load!((*ctx.ops).bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
    // SAFETY: the program's own context. Not zero are the flags that this kernel does not know.
    if unsafe { bpf_sock_ops_cb_flags_set(ctx.ops, flags as i32) } != 0 {
        return maps::count(Counter::ProbesUnrecorded);
    }
    let key = key(ctx);
    if !maps::add_probe(&key) {
        return maps::count(Counter::ProbesUnrecorded);
    }
    *probing = key;
}

#[inline(always)]
fn forget(probing: &mut ProbeKey) {
    if !probing.is_none() {
        let key = core::mem::replace(probing, ProbeKey::NONE);
        maps::remove_probe(&key);
    }
}

#[inline(always)]
fn key(ctx: &SockOpsContext) -> ProbeKey {
    // All of them, whatever the family: of two branches that read the context the compiler makes one, with an offset that
    // the verifier does not follow.
    let (local_v4, remote_v4) = (load!((*ctx.ops).local_ip4), load!((*ctx.ops).remote_ip4));
    let local_v6 = [
        load!((*ctx.ops).local_ip6[0]),
        load!((*ctx.ops).local_ip6[1]),
        load!((*ctx.ops).local_ip6[2]),
        load!((*ctx.ops).local_ip6[3]),
    ];
    let remote_v6 = [
        load!((*ctx.ops).remote_ip6[0]),
        load!((*ctx.ops).remote_ip6[1]),
        load!((*ctx.ops).remote_ip6[2]),
        load!((*ctx.ops).remote_ip6[3]),
    ];
    // An IPv6 socket that dials IPv4 has both mapped, which is our own form.
    let (local, remote) = if load!((*ctx.ops).family) == AF_INET {
        (Address::from_v4_word(local_v4), Address::from_v4_word(remote_v4))
    } else {
        (Address::from_words(local_v6), Address::from_words(remote_v6))
    };
    // The local port is in host order in this context, the remote one in network order.
    let local_port = load!((*ctx.ops).local_port) as u16;
    let remote_port = u32::from_be(load!((*ctx.ops).remote_port)) as u16;
    ProbeKey::new(local, local_port, remote, remote_port)
}
