//! Takes in the controller's news. For every delta, in this order: how far it is gets written down ([`crate::seen`]), then
//! the kernel's maps, then the snapshot that workers read, then the acknowledgement. So whoever sees a pod published knows
//! that this node's kernel already refuses plaintext from it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use tokio::sync::{mpsc, watch};
use tracing::{info, warn};
use weft_core::{AddressKind, Mesh, Target};
use weft_kernel::{Kernel, Verdict};
use weft_proto::type_url;
use weft_xds::Update;

use crate::{
    authorization::{self, Guarded, Guards},
    convert::{self, ConvertError, LocalPod, MeshSettings},
    metrics::Metrics,
    seen::Seen,
    trust,
};

/// What the controller said, as of the newest delta.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    pub mesh: Mesh,
    /// `None` until the controller has sent it.
    pub settings: Option<Arc<MeshSettings>>,
    pub local: BTreeMap<Arc<str>, LocalPod>,
    /// What policies say of the pods in `local`.
    pub guarded: Guarded,
    /// Every type has arrived at least once.
    pub synced: bool,
}

impl Snapshot {
    /// Whether an address nobody has heard of may belong to the mesh.
    pub fn in_range(&self, ip: IpAddr) -> bool {
        self.settings.as_ref().is_some_and(|s| s.in_range(ip))
    }
}

#[derive(Debug, thiserror::Error)]
enum ApplyError {
    #[error(transparent)]
    Convert(#[from] ConvertError),
    #[error("the kernel's maps: {0}")]
    Kernel(#[from] weft_kernel::Error),
    #[error("resource type {0} was not asked for")]
    UnknownType(String),
    #[error("addresses arrived before the mesh's settings")]
    NoSettings,
    #[error("roots of trust: {0:#}")]
    Trust(anyhow::Error),
}

/// Resource types in the order in which they are asked for: whom to believe, then settings, because reading the others needs
/// them.
pub const TYPES: [&str; 6] = [
    type_url::TRUST_BUNDLE,
    type_url::MESH_CONFIG,
    type_url::NODE,
    type_url::AUTHORIZATION,
    type_url::ADDRESS,
    type_url::LOCAL_WORKLOAD,
];

/// Before writing is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Runs until the channel closes. `publish` holds what workers read.
pub async fn run(
    kernel: Arc<Kernel>,
    metrics: Arc<Metrics>,
    seen: Arc<Seen>,
    trust: Arc<trust::Keeper>,
    mut updates: mpsc::Receiver<Update>,
    publish: watch::Sender<Arc<Snapshot>>,
) {
    let mut applier = Applier {
        maps: Maps::adopt(kernel),
        guards: Guards::default(),
        seen: HashSet::new(),
        trust,
        current: Snapshot::default(),
    };
    while let Some(update) = updates.recv().await {
        // Without this a successor might be given an older state and believe it.
        while let Err(error) = seen.raise(&update.seen) {
            warn!(
                error = format!("{error:#}"),
                "news from the controller wait until it is written down how far they are"
            );
            tokio::time::sleep(RETRY).await;
        }
        match applier.apply(&update) {
            Ok(()) => {
                if applier.current.synced && !publish.borrow().synced {
                    info!(resources = applier.current.mesh.len(), "in sync with the controller");
                }
                publish.send_replace(Arc::new(applier.current.clone()));
                if update.type_url == type_url::AUTHORIZATION {
                    metrics.judged.retain(|policy| applier.guards.has(policy));
                }
                update.ack();
            }
            Err(error) => {
                metrics.xds_rejected.inc();
                warn!(r#type = update.type_url, %error, "update from the controller rejected; the last good state stays");
                update.nack(error.to_string());
            }
        }
    }
}

struct Applier {
    maps: Maps,
    guards: Guards,
    seen: HashSet<&'static str>,
    trust: Arc<trust::Keeper>,
    current: Snapshot,
}

impl Applier {
    fn apply(&mut self, update: &Update) -> Result<(), ApplyError> {
        let mut next = self.current.clone();
        let mut touched = Vec::new();
        match update.type_url {
            // One that is gone without another is no reason to believe nobody.
            type_url::TRUST_BUNDLE => {
                for resource in &update.upserts {
                    self.trust.take(&resource.value).map_err(ApplyError::Trust)?;
                }
            }
            type_url::MESH_CONFIG => {
                for resource in &update.upserts {
                    next.settings = Some(Arc::new(convert::mesh_settings(&resource.name, &resource.value)?));
                }
                if next.settings != self.current.settings {
                    touched.extend(next.mesh.targets());
                }
            }
            type_url::ADDRESS => {
                let settings = next.settings.as_ref().ok_or(ApplyError::NoSettings)?;
                let read = |r: &weft_xds::Resource| convert::entry(&r.name, &r.value, &settings.trust_domain);
                let upserts = update.upserts.iter().map(read).collect::<Result<Vec<_>, _>>()?;
                touched.extend(next.mesh.apply(upserts, update.removed.iter().map(|n| n.as_str().into())));
            }
            // None of them is refused: what cannot be understood denies.
            type_url::AUTHORIZATION => {
                let read = update.upserts.iter().map(|r| (&*r.name, authorization::read(&r.name, &r.value)));
                self.guards.apply(read, &update.removed);
            }
            type_url::NODE => {
                let read = |r: &weft_xds::Resource| convert::node(&r.name, &r.value);
                let mut nodes = update.upserts.iter().map(read).collect::<Result<Vec<_>, _>>()?;
                nodes.extend(update.removed.iter().map(|name| (name.as_str().into(), None)));
                touched.extend(next.mesh.apply_nodes(nodes));
            }
            type_url::LOCAL_WORKLOAD => {
                for resource in &update.upserts {
                    let pod = convert::local_pod(&resource.name, &resource.value)?;
                    next.local.insert(resource.name.as_str().into(), pod);
                }
                for name in &update.removed {
                    next.local.remove(name.as_str());
                }
            }
            other => return Err(ApplyError::UnknownType(other.to_owned())),
        }
        self.seen.insert(update.type_url);
        let first_sync = !next.synced && TYPES.iter().all(|t| self.seen.contains(t));
        next.synced |= first_sync;
        self.maps.program(&next, touched)?;
        if first_sync {
            self.maps.forget_unwanted(&next)?;
        }
        let new: Vec<&str> = update.upserts.iter().map(|r| r.name.as_str()).collect();
        let removed: Vec<&str> = update.removed.iter().map(String::as_str).collect();
        next.guarded = self.guards.follow(&next, update.type_url, &new, &removed);
        self.current = next;
        Ok(())
    }
}

/// The kernel's maps and what this agent has put there.
struct Maps {
    kernel: Arc<Kernel>,
    capture: HashMap<weft_kernel::Target, Verdict>,
    refused: HashSet<IpAddr>,
    settings: Option<Arc<MeshSettings>>,
    /// The entries that follow from the settings alone.
    ranges: HashMap<weft_kernel::Target, Verdict>,
}

impl Maps {
    /// Starts from what a predecessor left, so that only differences are written.
    fn adopt(kernel: Arc<Kernel>) -> Self {
        let capture = kernel.capture_entries().unwrap_or_else(|error| {
            warn!(%error, "reading the capture set that was left behind");
            Vec::new()
        });
        let refused = kernel.refused_sources().unwrap_or_else(|error| {
            warn!(%error, "reading the refused sources that were left behind");
            Vec::new()
        });
        Self {
            kernel,
            capture: capture.into_iter().collect(),
            refused: refused.into_iter().collect(),
            settings: None,
            ranges: HashMap::new(),
        }
    }

    /// Brings the maps in line with `next` for what was `touched`. A failure leaves entries of both states, which
    /// the next attempt repairs; refusals are added first, so in between nothing is let through that should not be.
    fn program(&mut self, next: &Snapshot, touched: Vec<Target>) -> Result<(), weft_kernel::Error> {
        if next.settings != self.settings {
            let new = next.settings.as_deref().map(ranges).unwrap_or_default();
            for (range, verdict) in &new {
                self.set(*range, *verdict)?;
            }
            let gone: Vec<_> = self.ranges.keys().filter(|range| !new.contains_key(range)).copied().collect();
            for range in gone {
                self.forget(range)?;
            }
            self.ranges = new;
            self.settings = next.settings.clone();
        }
        let addresses = || {
            let address = |target: &Target| if let Target::Address(ip) = target { Some(*ip) } else { None };
            touched.iter().filter_map(address)
        };
        for ip in addresses().filter(|ip| is_refused(next, *ip)) {
            if self.refused.insert(ip) {
                self.kernel.refuse_source(ip)?;
            }
        }
        // A pod of this node that leaves the mesh goes on by its agent for a while: others may not have heard of it yet, and refuse
        // what comes from it in plain.
        let leaves = |ip: &IpAddr| self.refused.contains(ip) && next.mesh.kind(*ip) == AddressKind::Unmeshed;
        let leaving: HashSet<IpAddr> = addresses().filter(leaves).collect();
        if !leaving.is_empty() {
            self.kernel.hold_pods_at(&leaving)?;
        }
        let mut verdicts: Vec<_> = touched.iter().map(|target| (*target, verdict(next, *target))).collect();
        // Ports are captured before their address is captured by port only, and let go after that.
        verdicts.sort_by_key(|(target, verdict)| match (target, verdict) {
            (Target::Port(_) | Target::NodePort(_), Some(_)) => 0,
            (Target::Address(_), _) => 1,
            (Target::Port(_) | Target::NodePort(_), None) => 2,
        });
        for (target, verdict) in verdicts {
            match verdict {
                Some(verdict) => self.set(entry(target), verdict)?,
                None => self.clear(entry(target))?,
            }
        }
        for ip in addresses().filter(|ip| !is_refused(next, *ip)) {
            if self.refused.remove(&ip) {
                self.kernel.allow_source(ip)?;
            }
        }
        Ok(())
    }

    /// Removes what a predecessor left and nobody wants any more.
    fn forget_unwanted(&mut self, next: &Snapshot) -> Result<(), weft_kernel::Error> {
        let wanted = next.mesh.targets().filter(|target| verdict(next, *target).is_some());
        let wanted: HashSet<_> = wanted.map(entry).collect();
        let stale: Vec<_> = self.capture.keys().filter(|target| !wanted.contains(target)).copied().collect();
        for target in stale {
            self.clear(target)?;
        }
        let stale: Vec<_> = self.refused.iter().filter(|ip| !is_refused(next, **ip)).copied().collect();
        for ip in stale {
            self.kernel.allow_source(ip)?;
            self.refused.remove(&ip);
        }
        Ok(())
    }

    fn set(&mut self, target: weft_kernel::Target, verdict: Verdict) -> Result<(), weft_kernel::Error> {
        if self.capture.get(&target) != Some(&verdict) {
            self.kernel.set_capture(target, verdict)?;
            self.capture.insert(target, verdict);
        }
        Ok(())
    }

    /// Takes back what was set for `target`, down to what the settings say of it.
    fn clear(&mut self, target: weft_kernel::Target) -> Result<(), weft_kernel::Error> {
        if let Some(verdict) = self.ranges.get(&target) {
            return self.set(target, *verdict);
        }
        self.forget(target)
    }

    fn forget(&mut self, target: weft_kernel::Target) -> Result<(), weft_kernel::Error> {
        if self.capture.contains_key(&target) {
            self.kernel.clear_capture(target)?;
            self.capture.remove(&target);
        }
        Ok(())
    }
}

/// The entries that hold for whole ranges.
fn ranges(settings: &MeshSettings) -> HashMap<weft_kernel::Target, Verdict> {
    let captured = settings.captured.iter().map(|n| (n.trunc().into(), Verdict::Capture));
    captured.chain(settings.external.iter().map(|n| (n.trunc().into(), Verdict::Exempt))).collect()
}

fn entry(target: Target) -> weft_kernel::Target {
    match target {
        Target::Address(ip) => ip.into(),
        Target::Port(at) => weft_kernel::Target::Port(at),
        Target::NodePort(port) => weft_kernel::Target::NodePort(port),
    }
}

/// The entry that `target` needs of its own, beside those of its range.
fn verdict(next: &Snapshot, target: Target) -> Option<Verdict> {
    let Target::Address(ip) = target else {
        return next.mesh.is_meshed(target).then_some(Verdict::Capture);
    };
    match (next.mesh.kind(ip), next.in_range(ip)) {
        // Whatever the ranges say, since only ports count.
        (AddressKind::Node, _) => Some(Verdict::Node),
        (AddressKind::External, _) => Some(Verdict::ByPort),
        (AddressKind::Unmeshed, true) => Some(Verdict::LetGo),
        // Enrolled, but outside every captured range or in an exempt one: nothing in the clear, whatever the ranges say.
        (AddressKind::Meshed | AddressKind::Enrolled, false) => Some(Verdict::Capture),
        _ => None,
    }
}

/// Whether plaintext from `ip` is refused: it is enrolled, or two workloads claim it and nobody can tell.
fn is_refused(next: &Snapshot, ip: IpAddr) -> bool {
    matches!(next.mesh.kind(ip), AddressKind::Enrolled | AddressKind::Meshed)
}
