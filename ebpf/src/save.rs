//! cgroup/connect4 and cgroup/connect6 a second time, attached to the cgroup that all pods' processes are in or below:
//! keep what an application dials for `connect.rs`.
//!
//! The kernel runs the programs of a cgroup before those of the cgroups above it. So these see the application's own
//! words even where another program at the root, attached before ours, puts something else into their place: Cilium's
//! socket load-balancing makes a backend's address of a Service's.

use crate::{
    connect::{destination4, destination6, enrolled, port},
    maps,
};
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use weft_ebpf_common::{Address, Dialled};

/// Whether to refuse is not for these programs to say.
const PASS: i32 = 1;

#[cgroup_sock_addr(connect4)]
pub fn save4(ctx: SockAddrContext) -> i32 {
    save(&ctx, destination4)
}

#[cgroup_sock_addr(connect6)]
pub fn save6(ctx: SockAddrContext) -> i32 {
    save(&ctx, destination6)
}

#[inline(always)]
fn save(ctx: &SockAddrContext, destination: impl Fn(&SockAddrContext) -> Address) -> i32 {
    if enrolled(ctx).is_some() {
        maps::save_dialled(ctx, Dialled::new(destination(ctx), port(ctx)));
    }
    PASS
}
