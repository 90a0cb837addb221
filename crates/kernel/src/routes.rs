//! The policy rule and route of one pod, over rtnetlink:
//!
//! ```text
//! ip rule  add fwmark 0x111/0xfff lookup 100 pref 32764
//! ip route add local default dev lo src POD table 100
//! ```
//!
//! rtnetlink is asynchronous, and a socket belongs to the namespace it was made in: so each call has a thread of its
//! own, which lives in the pod's namespace and ends with the call.

use crate::{Error, Netns, PodAddresses};
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        route::{RouteMessage, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};
use std::net::{Ipv4Addr, Ipv6Addr};
use weft_ebpf_common::{LOOPBACK_IFINDEX, MARK_CAPTURED, MARK_MASK};

const TABLE: u8 = 100;
/// Just above the main table's rule (32766), below whatever a CNI may have put in front.
const PRIORITY: u32 = 32764;

/// Adds what is missing and corrects the source address; nothing changes if all is there. A family that the pod has no
/// address of gets nothing: the connect hook refuses captured connections of that family.
pub fn install(netns: &Netns, addresses: PodAddresses) -> Result<(), Error> {
    in_netns(netns, async |handle| {
        if let Some(address) = addresses.v4 {
            add(&handle, AddressFamily::Inet, route_v4(Some(address))).await?;
        }
        if let Some(address) = addresses.v6 {
            add(&handle, AddressFamily::Inet6, route_v6(Some(address))).await?;
        }
        Ok(())
    })
}

/// Removes both families' rule and route; what is not there is no error. Connections that are still captured break.
pub fn remove(netns: &Netns) -> Result<(), Error> {
    in_netns(netns, async |handle| {
        for (family, route) in [(AddressFamily::Inet, route_v4(None)), (AddressFamily::Inet6, route_v6(None))]
        {
            absent_is_fine(handle.rule().del(rule(family)).execute().await)
                .map_err(netlink("the rule for captured connections could not be removed"))?;
            absent_is_fine(handle.route().del(route).execute().await)
                .map_err(netlink("the route for captured connections could not be removed"))?;
        }
        Ok(())
    })
}

async fn add(handle: &Handle, family: AddressFamily, route: RouteMessage) -> Result<(), Error> {
    // The route first: a rule without one would send captured connections on to the main table, in the clear.
    handle.route().add(route).replace().execute().await.map_err(netlink(
        "the route for captured connections could not be set (has the pod that address?)",
    ))?;
    let mut request = handle.rule().add();
    *request.message_mut() = rule(family);
    match request.execute().await {
        Err(error) if errno(&error) == Some(libc::EEXIST) => Ok(()),
        result => result.map_err(netlink("the rule for captured connections could not be set")),
    }
}

fn rule(family: AddressFamily) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family;
    rule.header.table = TABLE;
    rule.header.action = RuleAction::ToTable;
    rule.attributes.extend([
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::FwMark(MARK_CAPTURED),
        RuleAttribute::FwMask(MARK_MASK),
    ]);
    rule
}

fn route_v4(source: Option<Ipv4Addr>) -> RouteMessage {
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .table_id(TABLE.into())
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .output_interface(LOOPBACK_IFINDEX);
    // Without a source the kernel takes the destination's address for it.
    match source {
        Some(source) => route.pref_source(source).build(),
        None => route.build(),
    }
}

fn route_v6(source: Option<Ipv6Addr>) -> RouteMessage {
    let route = RouteMessageBuilder::<Ipv6Addr>::new()
        .table_id(TABLE.into())
        .kind(RouteType::Local)
        .output_interface(LOOPBACK_IFINDEX);
    match source {
        Some(source) => route.pref_source(source).build(),
        None => route.build(),
    }
}

fn in_netns(netns: &Netns, f: impl AsyncFnOnce(Handle) -> Result<(), Error> + Send) -> Result<(), Error> {
    let run = || {
        netns.enter().map_err(Error::io(format!("{} could not be entered", netns.path().display())))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(Error::io("a runtime for netlink could not be made"))?;
        runtime.block_on(async {
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(Error::io("netlink could not be opened"))?;
            let connection = tokio::spawn(connection);
            let result = f(handle).await;
            connection.abort();
            result
        })
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("weft-netns".into()).spawn_scoped(scope, run);
        let thread = thread.map_err(Error::io("a thread for netlink could not be started"))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|code| -code.get()),
        _ => None,
    }
}

fn absent_is_fine(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match result {
        // ESRCH: no such route. EAFNOSUPPORT, EOPNOTSUPP: no such family, so nothing of it either.
        Err(error)
            if matches!(
                errno(&error),
                Some(libc::ENOENT | libc::ESRCH | libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::ENODEV)
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}

fn netlink(what: &str) -> impl FnOnce(rtnetlink::Error) -> Error {
    let what = what.to_owned();
    move |source| Error::Netlink { what, source: Box::new(source) }
}
