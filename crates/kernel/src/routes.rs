//! The policy rule and route of one pod, over rtnetlink:
//!
//! ```text
//! ip rule  add fwmark 0x111/0xfff lookup 100 pref 32764
//! ip route add local default dev lo src POD table 100 metric 1
//! ip route add local default dev EACH_OTHER_DEVICE src POD table 100 metric 1+INDEX
//! ```
//!
//! The second kind of route is for a socket that is bound to a device after it was captured, which takes no privilege:
//! the route by lo is not for it then, and without another its data would leave by that device, in the clear. A local
//! route leads to lo whatever device it names, where such a socket's packets find nobody.
//!
//! rtnetlink is asynchronous, and a socket belongs to the namespace it was made in: so each call has a thread of its
//! own, which lives in the pod's namespace and ends with the call.

use crate::{Error, Netns, PodAddresses};
use futures_util::TryStreamExt;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        link::LinkFlags,
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
        let devices = devices(&handle).await?;
        if let Some(address) = addresses.v4 {
            let routes = devices.iter().map(|device| route_v4(*device, Some(address)));
            add(&handle, AddressFamily::Inet, routes).await?;
        }
        if let Some(address) = addresses.v6 {
            let routes = devices.iter().map(|device| route_v6(*device, Some(address)));
            add(&handle, AddressFamily::Inet6, routes).await?;
        }
        Ok(())
    })
}

/// Removes both families' rule and route; what is not there is no error. Connections that are still captured break.
pub fn remove(netns: &Netns) -> Result<(), Error> {
    in_netns(netns, async |handle| {
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            absent_is_fine(handle.rule().del(rule(family)).execute().await)
                .map_err(netlink("the rule for captured connections could not be removed"))?;
        }
        for device in devices(&handle).await? {
            for route in [route_v4(device, None), route_v6(device, None)] {
                absent_is_fine(handle.route().del(route).execute().await)
                    .map_err(netlink("a route for captured connections could not be removed"))?;
            }
        }
        Ok(())
    })
}

async fn add(
    handle: &Handle,
    family: AddressFamily,
    routes: impl Iterator<Item = RouteMessage>,
) -> Result<(), Error> {
    // The routes first: a rule without them would send captured connections on to the main table, in the clear.
    for route in routes {
        handle.route().add(route).replace().execute().await.map_err(netlink(
            "the route for captured connections could not be set (has the pod that address?)",
        ))?;
    }
    let mut request = handle.rule().add();
    *request.message_mut() = rule(family);
    match request.execute().await {
        Err(error) if errno(&error) == Some(libc::EEXIST) => Ok(()),
        result => result.map_err(netlink("the rule for captured connections could not be set")),
    }
}

/// The index of every device that is up, lo first. One that comes up later has no route until the pod is enrolled again.
async fn devices(handle: &Handle) -> Result<Vec<u32>, Error> {
    let listed = handle.link().get().execute().try_collect::<Vec<_>>().await;
    let links = listed.map_err(netlink("the pod's devices could not be listed"))?;
    let up =
        links.iter().filter(|link| link.header.flags.contains(LinkFlags::Up)).map(|link| link.header.index);
    let mut devices: Vec<u32> = up.collect();
    devices.sort_unstable();
    Ok(devices)
}

/// lo is preferred; the others are for sockets that cannot use it.
fn metric(device: u32) -> u32 {
    if device == LOOPBACK_IFINDEX { 1 } else { 1 + device }
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

fn route_v4(device: u32, source: Option<Ipv4Addr>) -> RouteMessage {
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .table_id(TABLE.into())
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .output_interface(device)
        .priority(metric(device));
    // Without a source the kernel takes the destination's address for it.
    match source {
        Some(source) => route.pref_source(source).build(),
        None => route.build(),
    }
}

fn route_v6(device: u32, source: Option<Ipv6Addr>) -> RouteMessage {
    let route = RouteMessageBuilder::<Ipv6Addr>::new()
        .table_id(TABLE.into())
        .kind(RouteType::Local)
        .output_interface(device)
        .priority(metric(device));
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
