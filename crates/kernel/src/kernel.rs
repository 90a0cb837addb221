//! One instance of the kernel's part: opening it, the capture set, and enrolling pods.

use crate::{
    Error, Kubelet, Netns, Options, Pod, PodAddresses, Target, Verdict, debug_log, link,
    maps::Maps,
    object::{self, Object},
    pins::{self, Pins, PodPin},
    routes,
    save::Save,
    sockets,
    sys::AttachType,
    sysctl,
};
use std::{
    collections::HashSet,
    fmt,
    fs::File,
    net::{IpAddr, TcpListener},
    os::{fd::AsFd, unix::fs::MetadataExt},
    sync::{Arc, Mutex, PoisonError},
};
use weft_ebpf_common::{Counter, MAX_PODS, PodEntry};

/// An open instance. Dropping it changes nothing in the kernel.
#[derive(Debug)]
pub struct Kernel {
    shared: Arc<Shared>,
}

/// What pods need of the kernel's part.
pub struct Shared {
    pub maps: Maps,
    pins: Pins,
    object: Object,
    save: Save,
    /// Held while slots and pins change: picking a slot and taking it are two steps.
    enrolling: Mutex<()>,
}

/// A pod as it is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodRecord {
    /// The cookie of its network namespace.
    pub cookie: u64,
    pub slot: u32,
    /// Empty if the pod was never completely enrolled.
    pub addresses: PodAddresses,
    /// Not on hold.
    pub published: bool,
}

/// What the hooks counted since the instance was first opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Outbound connections handed to the agent.
    pub captured: u64,
    /// Refused in either direction because no agent listened.
    pub refused_no_agent: u64,
    /// Outbound connections refused because their socket is bound to a device.
    pub refused_bound_device: u64,
    /// Plaintext refused at the SYN because its source is enrolled.
    pub refused_plaintext: u64,
    /// Outbound connections refused because the pod has no address of that family.
    pub refused_no_address: u64,
    /// The kubelet's connections that went straight to the application.
    pub probes: u64,
    /// The kubelet's connections that could not be remembered, and went to the agent.
    pub probes_unrecorded: u64,
}

impl Counters {
    /// Every refusal with the name of its reason, as metrics label it.
    pub fn refusals(&self) -> [(&'static str, u64); 4] {
        [
            ("no_agent", self.refused_no_agent),
            ("bound_device", self.refused_bound_device),
            ("plaintext", self.refused_plaintext),
            ("no_address", self.refused_no_address),
        ]
    }
}

impl Kernel {
    /// Opens the instance, taking over what a predecessor pinned: its maps as they are, its hooks with this build's
    /// programs. Changes nothing if a predecessor's layout is another. Blocks for some tens of milliseconds.
    pub fn open(options: Options) -> Result<Kernel, Error> {
        let object = Object::open(&options)?;
        let cgroup_root = options.cgroup()?;
        let failed = || format!("the cgroup {} could not be opened", cgroup_root.display());
        let cgroup = File::open(&cgroup_root).map_err(Error::io(failed()))?;
        // The id of a cgroup is its inode number.
        let cgroup_id = cgroup.metadata().map_err(Error::io(failed()))?.ino();
        let pins = Pins::open(&options)?;

        let mut ebpf = object.load(&pins)?;
        // New maps came from the object's own declarations, which must say what the table says.
        pins.check_maps()?;
        let hooks = [
            // Before those that note whom they are to hear of.
            ("release", AttachType::SockRelease, object::load_sock_release(&mut ebpf, "release")?),
            ("probe", AttachType::SockOps, object::load_sock_ops(&mut ebpf, "probe")?),
            ("connect4", AttachType::Connect4, object::load_connect(&mut ebpf, "connect4")?),
            ("connect6", AttachType::Connect6, object::load_connect(&mut ebpf, "connect6")?),
        ];
        for (name, attach_type, program) in hooks {
            link::attach_or_update(&pins.hook(name), program.as_fd(), cgroup.as_fd(), attach_type, |info| {
                info.cgroup_id() == cgroup_id
            })?;
        }
        // After those, so that nothing is ever saved that they do not take.
        let save = Save::load(&mut ebpf, cgroup_root, options.pods_cgroup)?;
        save.open(&pins);
        let maps = Maps::take(&mut ebpf)?;
        let shared = Arc::new(Shared { maps, pins, object, save, enrolling: Mutex::new(()) });
        if options.debug_log {
            debug_log::start(&mut ebpf, Arc::downgrade(&shared))?;
        }
        Ok(Kernel { shared })
    }

    /// What to do with TCP connections of enrolled pods to `target`.
    pub fn set_capture(&self, target: impl Into<Target>, verdict: Verdict) -> Result<(), Error> {
        self.shared.maps.set_capture(target.into(), verdict)
    }

    /// Forgets exactly this target; none is no error.
    pub fn clear_capture(&self, target: impl Into<Target>) -> Result<(), Error> {
        self.shared.maps.clear_capture(target.into())
    }

    /// The whole capture set, as this or a predecessor left it.
    pub fn capture_entries(&self) -> Result<Vec<(Target, Verdict)>, Error> {
        self.shared.maps.capture_entries()
    }

    /// Published pods refuse plaintext from `ip` at the SYN from now on.
    pub fn refuse_source(&self, ip: IpAddr) -> Result<(), Error> {
        self.shared.maps.refuse_source(ip)
    }

    /// Takes that back; an address that was not refused is no error.
    pub fn allow_source(&self, ip: IpAddr) -> Result<(), Error> {
        self.shared.maps.allow_source(ip)
    }

    /// Every address whose plaintext is refused, as this or a predecessor left it.
    pub fn refused_sources(&self) -> Result<Vec<IpAddr>, Error> {
        self.shared.maps.refused_sources()
    }

    /// Every pod that is pinned, as this or a predecessor left it.
    pub fn pods(&self) -> Result<Vec<PodRecord>, Error> {
        let entries = self.shared.maps.pods()?;
        let mut records: Vec<_> = entries
            .into_iter()
            .map(|(cookie, entry)| PodRecord {
                cookie,
                slot: entry.slot(),
                addresses: addresses_of(&entry),
                published: !entry.on_hold(),
            })
            .collect();
        for PodPin { cookie, slot } in self.shared.pins.pods()? {
            if !records.iter().any(|record| record.cookie == cookie) {
                let addresses = PodAddresses::default();
                records.push(PodRecord { cookie, slot, addresses, published: false });
            }
        }
        Ok(records)
    }

    /// Begins the hold of the pods with these addresses again, before their own agent does ([`crate::Pod::set_published`]).
    pub fn hold_pods_at(&self, addresses: &HashSet<IpAddr>) -> Result<(), Error> {
        for (cookie, entry) in self.shared.maps.pods()? {
            if !entry.on_hold() && addresses.iter().any(|ip| addresses_of(&entry).contains(*ip)) {
                self.shared.maps.set_hold(cookie, true)?;
            }
        }
        Ok(())
    }

    /// Connections of root's processes in that cgroup go straight to the applications of enrolled pods from now on; without
    /// one nobody's do. What a predecessor said holds until this is called.
    pub fn recognise_kubelet(&self, kubelet: Option<&Kubelet>) -> Result<(), Error> {
        self.shared.maps.set_kubelet(kubelet.map_or(0, Kubelet::cgroup_id))
    }

    /// Brings a pod under capture, on hold: what comes and goes is the agent's from here on. A pod that a predecessor
    /// enrolled keeps its slot and, if the addresses are the same, whether it is published. If this fails, a new pod
    /// is left as it was and a predecessor's stays captured. Blocks for some tens of milliseconds.
    pub fn enroll(&self, netns: Netns, addresses: PodAddresses) -> Result<Pod, Error> {
        addresses.check()?;
        // The kernel itself looks only at the first route it is given, and connections would fail much later.
        let found = netns.addresses()?;
        if let Some(address) = addresses.iter().find(|address| !found.contains(address)) {
            return Err(Error::NotInPod { address, netns: netns.path().to_owned() });
        }
        let shared = &self.shared;
        let _enrolling = shared.enrolling.lock().unwrap_or_else(PoisonError::into_inner);
        let cookie = netns.cookie();
        let predecessor = shared.maps.pod(cookie)?;
        let pin = PodPin { cookie, slot: shared.pick_slot(cookie, predecessor.as_ref())? };
        let result = shared.install(&netns, addresses, pin, predecessor);
        match result {
            Ok((listener, listener_port)) => {
                let shared = Arc::clone(shared);
                Ok(Pod { shared, netns, addresses, slot: pin.slot, listener: Some(listener), listener_port })
            }
            Err(error) => {
                if predecessor.is_none() {
                    // Best effort: the first error is the one to tell.
                    let _ = shared.stop_capture(cookie, Some(pin.slot));
                    let _ = routes::remove(&netns);
                }
                Err(error)
            }
        }
    }

    /// Un-enrols a pod that a predecessor left and that is not wanted any more: captures nothing, and removes rule and
    /// route. For a pod that this process enrolled use [`Pod::stop_capture`] and [`Pod::remove_routes`].
    pub fn release(&self, netns: &Netns) -> Result<(), Error> {
        let shared = &self.shared;
        let _enrolling = shared.enrolling.lock().unwrap_or_else(PoisonError::into_inner);
        shared.stop_capture(netns.cookie(), None)?;
        routes::remove(netns)
    }

    /// What the hooks counted, over all CPUs.
    pub fn counters(&self) -> Result<Counters, Error> {
        let count = |counter| self.shared.maps.count(counter);
        Ok(Counters {
            captured: count(Counter::Captured)?,
            refused_no_agent: count(Counter::RefusedNoAgent)?,
            refused_bound_device: count(Counter::RefusedBoundDevice)?,
            refused_plaintext: count(Counter::RefusedPlaintext)?,
            refused_no_address: count(Counter::RefusedNoAddress)?,
            probes: count(Counter::Probes)?,
            probes_unrecorded: count(Counter::ProbesUnrecorded)?,
        })
    }

    /// Removes what is pinned for pods whose cookie is not in `keep` and whose network namespace has ended, and says
    /// which. One whose namespace is still there stays captured: it may run, and would talk in the clear.
    pub fn remove_stale(&self, keep: &HashSet<u64>) -> Result<Vec<u64>, Error> {
        let _enrolling = self.shared.enrolling.lock().unwrap_or_else(PoisonError::into_inner);
        let mut removed = Vec::new();
        for pod in self.pods()? {
            if !keep.contains(&pod.cookie) && !self.shared.has_live_namespace(pod.cookie)? {
                self.shared.stop_capture(pod.cookie, Some(pod.slot))?;
                removed.push(pod.cookie);
            }
        }
        Ok(removed)
    }

    /// Removes every pin of the instance, of whatever layout, without needing an object: every pod of the node is free
    /// at once, and talks in the clear. Rules and routes stay in the pods, and do nothing.
    pub fn break_glass(options: &Options) -> Result<(), Error> {
        pins::remove_all(options)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("pins", &self.pins).finish_non_exhaustive()
    }
}

impl Shared {
    /// The slot this pod has, or the lowest free one.
    fn pick_slot(&self, cookie: u64, predecessor: Option<&PodEntry>) -> Result<u32, Error> {
        let pins = self.pins.pods()?;
        if let Some(slot) = predecessor.map(PodEntry::slot) {
            return Ok(slot);
        }
        if let Some(pin) = pins.iter().find(|pin| pin.cookie == cookie) {
            return Ok(pin.slot);
        }
        let mut taken: HashSet<u32> = pins.iter().map(|pin| pin.slot).collect();
        taken.extend(self.maps.pods()?.iter().map(|(_, entry)| entry.slot()));
        (0..MAX_PODS).find(|slot| !taken.contains(slot)).ok_or(Error::TooMany(MAX_PODS))
    }

    /// Everything a pod needs, in an order in which no connection finds half of it.
    fn install(
        &self,
        netns: &Netns,
        addresses: PodAddresses,
        pin: PodPin,
        predecessor: Option<PodEntry>,
    ) -> Result<(TcpListener, u16), Error> {
        self.save.attach(&self.pins);
        routes::install(netns, addresses)?;
        sysctl::apply(netns, addresses.v6.is_some())?;
        let (listener, port) = sockets::listener(netns)?;
        let program = self.object.load_sk_lookup(&self.pins, pin, port, &addresses)?;
        // The slot before the link: with the link, inbound connections come to the slot.
        self.maps.fill_slot(pin.slot, &listener)?;
        let inode = netns.inode();
        link::attach_or_update(
            &self.pins.pod(pin),
            program.as_fd(),
            netns.as_fd(),
            AttachType::SkLookup,
            |info| u64::from(info.netns_inode()) == inode,
        )?;
        // Last of all: with the entry, outbound connections are captured.
        let [v4, v6] = addresses.as_map_addresses();
        let entry = match predecessor {
            Some(entry) if addresses_of(&entry) == addresses => entry,
            _ => PodEntry::new(pin.slot, true, v4, v6),
        };
        self.maps.put_pod(pin.cookie, entry)?;
        Ok((listener, port))
    }

    /// Whether a link pinned for the pod is still attached: the kernel detaches it when the namespace ends.
    fn has_live_namespace(&self, cookie: u64) -> Result<bool, Error> {
        for pin in self.pins.pods()?.into_iter().filter(|pin| pin.cookie == cookie) {
            if link::is_attached(&self.pins.pod(pin))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes the pod out of both hooks; the reverse order of `install`. All of its pins, whatever their slot.
    pub fn stop_capture(&self, cookie: u64, slot: Option<u32>) -> Result<(), Error> {
        self.maps.remove_pod(cookie)?;
        let mut slots: HashSet<u32> = slot.into_iter().collect();
        for pin in self.pins.pods()?.into_iter().filter(|pin| pin.cookie == cookie) {
            link::remove(&self.pins.pod(pin))?;
            slots.insert(pin.slot);
        }
        slots.into_iter().try_for_each(|slot| self.maps.clear_slot(slot))
    }
}

fn addresses_of(entry: &PodEntry) -> PodAddresses {
    PodAddresses::from_ips(
        [*entry.v4(), *entry.v6()].map(IpAddr::from).into_iter().filter(|ip| !ip.is_unspecified()),
    )
}
