//! Which pods of this node are enrolled: brings the kernel in line with what the controller wants, retries until it
//! succeeds, and reports upward what is in place.
//!
//! One task owns all of it. A pod goes Hold -> Published -> Leaving -> Gone ([`Phase`]); the workers only read the phase.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::PathBuf,
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tracing::{info, warn};
use weft_api::agent::PodStatus;
use weft_core::{SpiffeId, Tunnel, Workload};
use weft_kernel::{Kernel, Netns, PodAddresses, locate};
use weft_proto::node::{EnrollmentFailure, EnrollmentReport};

use crate::{
    cni::Asked,
    controller::Controller,
    convert::{LocalPod, NetnsHint},
    existing::Existing,
    metrics::Metrics,
    place::{candidates, locate_all, owner_of},
    pod::{Phase, PodHandle},
    prepare::Prepared,
    state::Snapshot,
    worker::Workers,
};

/// After its label is gone a pod keeps answering tunnels this long, for peers that have not heard yet.
const LEAVING_GRACE: Duration = Duration::from_secs(4);
/// How often namespaces are looked at again: one may have been replaced under the same path.
const RECHECK: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// What others may know of enrolment.
#[derive(Debug, Clone, Default)]
pub struct Enrollment {
    pub pods: Vec<PodStatus>,
    /// Every wanted pod is enrolled or has a failure that was reported.
    pub settled: bool,
}

struct Failure {
    message: String,
    next: Instant,
    retry: Duration,
}

pub struct Enroller {
    pub kernel: Arc<Kernel>,
    pub workers: Workers,
    pub metrics: Arc<Metrics>,
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    pub identities: watch::Sender<BTreeSet<SpiffeId>>,
    pub report: watch::Sender<EnrollmentReport>,
    pub status: watch::Sender<Enrollment>,
    pub max_connections_per_pod: usize,
    pub draining: watch::Receiver<bool>,
    /// From the CNI plugin; closed where there is none.
    pub asked: mpsc::Receiver<Asked>,
}

/// The task's own state.
#[derive(Default)]
struct Pods {
    enrolled: BTreeMap<Arc<str>, Arc<PodHandle>>,
    /// Also those that left but may still have connections.
    all: Vec<Weak<PodHandle>>,
    leaving: BTreeMap<Arc<str>, Instant>,
    failures: BTreeMap<Arc<str>, Failure>,
    prepared: Prepared,
    existing: Existing,
    /// When namespaces were last compared with what is enrolled.
    checked: Option<Instant>,
    stale_removed: bool,
}

impl Enroller {
    /// Runs until the agent drains, then touches nothing any more (a successor may own the pins by now) and returns when
    /// no connection is open.
    pub async fn run(mut self) {
        let mut pods = Pods::default();
        let (idle_tx, mut idle) = mpsc::unbounded_channel::<Arc<PodHandle>>();
        let mut draining = self.draining.clone();
        loop {
            if *draining.borrow() {
                return drain(pods.all).await;
            }
            let snapshot = self.snapshots.borrow_and_update().clone();
            if snapshot.synced {
                self.reconcile(&snapshot, &mut pods, &idle_tx).await;
            }
            let served = pods.enrolled.values().map(|p| p.kernel.cookie()).collect();
            pods.prepared.answer(&self, &snapshot, served).await;
            let due = pods.failures.values().map(|f| f.next).chain(pods.leaving.values().copied());
            let due = due.chain(pods.prepared.deadline()).min();
            let wake = due.unwrap_or_else(far).min(Instant::now() + RECHECK);
            tokio::select! {
                changed = self.snapshots.changed() => if changed.is_err() { return },
                Some(pod) = idle.recv() => self.remove_routes(pod, &pods).await,
                Some(asked) = self.asked.recv() => pods.prepared.announce(asked),
                _ = draining.changed() => {}
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    async fn reconcile(
        &self,
        snapshot: &Snapshot,
        pods: &mut Pods,
        idle: &mpsc::UnboundedSender<Arc<PodHandle>>,
    ) {
        self.release_unwanted(snapshot, pods, idle).await;
        self.enroll_wanted(snapshot, pods).await;
        self.follow_publication(snapshot, pods);
        pods.existing.follow(self, &pods.enrolled, snapshot).await;
        // Not while a wanted pod is missing: what is pinned for it keeps it from talking in the clear.
        if !pods.stale_removed && pods.failures.is_empty() {
            match self.remove_stale(snapshot, pods).await {
                Ok(()) => pods.stale_removed = true,
                Err(error) => warn!(%error, "removing what a predecessor left of pods that are gone"),
            }
        }
        self.tell(snapshot, pods);
    }

    /// Frees pods that lost their label, and forgets those that ceased to exist, while no agent was there.
    async fn remove_stale(&self, snapshot: &Snapshot, pods: &Pods) -> Result<(), weft_kernel::Error> {
        let keep: HashSet<u64> = pods.enrolled.values().map(|p| p.kernel.cookie()).collect();
        let unwanted: Vec<_> =
            snapshot.local.values().filter(|l| !l.enroll).map(|l| l.netns.clone()).collect();
        self.blocking(move |kernel| {
            let pinned: HashSet<u64> = kernel.pods()?.iter().map(|p| p.cookie).collect();
            if pinned.is_subset(&keep) {
                return Ok(());
            }
            let located = locate_all(unwanted.iter());
            let paths = unwanted.iter().flat_map(|hint| candidates(hint, &located));
            for netns in paths.filter_map(|path| Netns::open(&path).ok()) {
                if pinned.contains(&netns.cookie()) {
                    kernel.release(&netns)?;
                }
            }
            kernel.remove_stale(&keep).map(drop)
        })
        .await
    }

    /// Pods whose label or existence is gone.
    async fn release_unwanted(
        &self,
        snapshot: &Snapshot,
        pods: &mut Pods,
        idle: &mpsc::UnboundedSender<Arc<PodHandle>>,
    ) {
        let now = Instant::now();
        // Opening every namespace is too much to do for each piece of news.
        let check = pods.checked.is_none_or(|at| at + RECHECK <= now);
        let mut inhabited = HashSet::new();
        if check {
            pods.checked = Some(now);
            if pods.enrolled.values().any(|pod| matches!(pod.hint, NetnsHint::PodUid(_))) {
                inhabited = self.blocking(|_| locate::inhabited()).await;
            }
        }
        for (uid, pod) in pods.enrolled.clone() {
            let local = snapshot.local.get(&uid);
            let gone = match local {
                Some(local) => {
                    !same_pod(&pod, local, snapshot.mesh.workload(&uid))
                        || (check && !lives(&pod, &local.netns, &inhabited))
                }
                // Deleted, but maybe still running: it stays captured as long as its namespace is there, or it would
                // talk in the clear to the last.
                None => check && !lives(&pod, &pod.hint, &inhabited),
            };
            if gone {
                info!(uid = %uid, "pod is gone");
                pods.enrolled.remove(&uid);
                pods.leaving.remove(&uid);
                pod.phase.send_replace(Phase::Gone);
                self.workers.unlisten(&pod);
                if let Err(error) = self.on_pod(&pod, |p| p.stop_capture()).await {
                    warn!(uid = %uid, %error, "removing a pod that is gone");
                }
            } else if local.is_none_or(|l| l.enroll) {
                if pods.leaving.remove(&uid).is_some() {
                    pod.phase.send_replace(Phase::Hold);
                }
            } else if let Some(deadline) = pods.leaving.get(&uid) {
                if *deadline <= now {
                    self.stop_capture(&uid, &pod, pods, idle).await;
                }
            } else {
                info!(uid = %uid, grace = ?LEAVING_GRACE, "pod leaves the mesh");
                pods.leaving.insert(uid, now + LEAVING_GRACE);
                pod.phase.send_replace(Phase::Leaving);
                if let Err(error) = pod.kernel.set_published(false) {
                    warn!(uid = %pod.uid, %error, "letting plaintext in again");
                }
            }
        }
        pods.failures.retain(|uid, _| snapshot.local.get(uid).is_some_and(|l| l.enroll));
    }

    async fn stop_capture(
        &self,
        uid: &Arc<str>,
        pod: &Arc<PodHandle>,
        pods: &mut Pods,
        idle: &mpsc::UnboundedSender<Arc<PodHandle>>,
    ) {
        if let Err(error) = self.on_pod(pod, |p| p.stop_capture()).await {
            warn!(uid = %uid, %error, "ending capture; trying again");
            pods.leaving.insert(uid.clone(), Instant::now() + FIRST_RETRY);
            return;
        }
        pods.enrolled.remove(uid);
        pods.leaving.remove(uid);
        self.workers.unlisten(pod);
        info!(uid = %uid, open_connections = pod.open_connections(), "pod left the mesh");
        // The route must outlive the connections that use it: without it their packets would leave the pod in the clear.
        let (pod, idle) = (pod.clone(), idle.clone());
        tokio::spawn(async move {
            pod.until_idle().await;
            let _ = idle.send(pod);
        });
    }

    /// The last connection of a pod that left has ended.
    async fn remove_routes(&self, pod: Arc<PodHandle>, pods: &Pods) {
        let again = pods.enrolled.values().any(|p| p.kernel.cookie() == pod.kernel.cookie());
        if !again && let Err(error) = self.on_pod(&pod, |p| p.remove_routes()).await {
            warn!(uid = %pod.uid, %error, "removing the policy route");
        }
    }

    async fn enroll_wanted(&self, snapshot: &Snapshot, pods: &mut Pods) {
        let now = Instant::now();
        let due = |(uid, local): &(&Arc<str>, &LocalPod)| {
            let waiting = pods.failures.get(*uid).is_some_and(|f| f.next > now);
            // A pod of a cluster has a workload once it has an address: until then it is about to be made.
            let unborn = matches!(local.netns, NetnsHint::PodUid(_)) && snapshot.mesh.workload(uid).is_none();
            local.enroll && !pods.enrolled.contains_key(*uid) && !waiting && !unborn
        };
        let due: Vec<_> = snapshot.local.iter().filter(due).collect();
        if due.is_empty() {
            return;
        }
        let hints: Vec<_> = due.iter().map(|(_, local)| local.netns.clone()).collect();
        let located = self.blocking(move |_| locate_all(hints.iter())).await;
        for (uid, local) in due {
            let result = match snapshot.mesh.workload(uid) {
                Some(workload) => match pods.prepared.take(&local.netns, workload) {
                    Some(prepared) => self.begin(workload.clone(), local.netns.clone(), prepared),
                    None => {
                        let paths = candidates(&local.netns, &located);
                        self.enroll(workload.clone(), local.netns.clone(), paths, pods).await
                    }
                },
                None => Err("the controller wants it enrolled but has not said who it is".to_owned()),
            };
            match result {
                Ok(pod) => {
                    info!(uid = %uid, identity = %pod.identity(), "pod enrolled");
                    pods.failures.remove(uid);
                    pods.all.retain(|p| p.strong_count() > 0);
                    pods.all.push(Arc::downgrade(&pod));
                    pods.enrolled.insert(uid.clone(), pod);
                }
                Err(message) => {
                    self.metrics.enrollment_failures.inc();
                    let retry = pods.failures.get(uid).map_or(FIRST_RETRY, |f| (f.retry * 2).min(LAST_RETRY));
                    warn!(uid = %uid, error = message, retry_in = ?retry, "pod not enrolled");
                    pods.failures
                        .insert(uid.clone(), Failure { message, next: Instant::now() + retry, retry });
                }
            }
        }
    }

    async fn enroll(
        &self,
        workload: Arc<Workload>,
        hint: NetnsHint,
        paths: Vec<PathBuf>,
        pods: &Pods,
    ) -> Result<Arc<PodHandle>, String> {
        if paths.is_empty() {
            return Err(match hint {
                NetnsHint::PodUid(uid) => {
                    format!("no process of the pod with UID {uid} runs on this node yet")
                }
                _ => "its network namespace is not known: no annotation weft.dev/netns".to_owned(),
            });
        }
        let addresses = PodAddresses::from_ips(workload.addresses.iter().copied());
        let claimed = workload.addresses.clone();
        let others: Vec<_> = pods.enrolled.values().map(|p| (p.kernel.cookie(), p.uid.clone())).collect();
        let enrolled = self.blocking(move |kernel| {
            let netns = owner_of(&claimed, &paths)?;
            if let Some((_, other)) = others.iter().find(|(cookie, _)| *cookie == netns.cookie()) {
                return Err(format!("{} is the network namespace of {other}", netns.path().display()));
            }
            kernel.enroll(netns, addresses).map_err(|e| e.to_string())
        });
        let pod = enrolled.await?;
        self.begin(workload, hint, pod)
    }

    /// Serves a pod that is in place in the kernel.
    fn begin(
        &self,
        workload: Arc<Workload>,
        hint: NetnsHint,
        mut pod: weft_kernel::Pod,
    ) -> Result<Arc<PodHandle>, String> {
        let listener = pod.take_listener().ok_or("its listener was already taken")?;
        let pod = Arc::new(PodHandle::new(workload, hint, pod, self.max_connections_per_pod));
        self.workers.listen(&pod, listener);
        Ok(pod)
    }

    /// A pod counts as enrolled once this agent has seen it published: from then on peers that are later than it know it.
    fn follow_publication(&self, snapshot: &Snapshot, pods: &Pods) {
        for (uid, pod) in &pods.enrolled {
            let workload = snapshot.mesh.workload(uid);
            let published = workload.is_some_and(|w| w.tunnel == Tunnel::Hbone);
            // One that is withdrawn may still run, and goes on as it was.
            if !published && workload.is_some() && pod.phase() == Phase::Published {
                // Whether it leaves or comes back will be heard next; the kernel holds it already (`state.rs`).
                pod.phase.send_replace(Phase::Hold);
            }
            if published && pod.phase() == Phase::Hold {
                match pod.kernel.set_published(true) {
                    Ok(()) => {
                        info!(uid = %uid, "pod is in the mesh");
                        pod.phase.send_replace(Phase::Published);
                    }
                    Err(error) => warn!(uid = %uid, %error, "pod stays on hold"),
                }
            }
        }
    }

    fn tell(&self, snapshot: &Snapshot, pods: &Pods) {
        self.metrics.enrolled.set(pods.enrolled.len() as i64);
        let wanted: BTreeSet<_> = pods.enrolled.values().map(|p| p.identity().clone()).collect();
        self.identities.send_if_modified(|current| replace_if_changed(current, wanted));
        let staying = pods.enrolled.keys().filter(|uid| !pods.leaving.contains_key(*uid));
        let report = EnrollmentReport {
            enrolled_uids: staying.map(|uid| uid.to_string()).collect(),
            failures: pods
                .failures
                .iter()
                .map(|(uid, f)| EnrollmentFailure { uid: uid.to_string(), message: f.message.clone() })
                .collect(),
            trust_serial: 0,
        };
        // A label that came back too fast for this agent to see it go leaves a pod that has to be reported again.
        let published = |uid: &String| snapshot.mesh.workload(uid).is_none_or(|w| w.tunnel == Tunnel::Hbone);
        let again = !report.enrolled_uids.iter().all(published);
        self.report.send_if_modified(|current| replace_if_changed(current, report) || again);
        let enrolled = pods.enrolled.values().map(|pod| PodStatus {
            uid: pod.uid.to_string(),
            identity: Some(pod.identity().to_string()),
            phase: Some(format!("{:?}", pod.phase()).to_ascii_lowercase()),
            open_connections: pod.open_connections(),
            failure: None,
            connections_before_enrollment: pods.existing.of(&pod.uid).0,
            connections_problem: pods.existing.of(&pod.uid).1,
        });
        let failed = pods.failures.iter().map(|(uid, f)| PodStatus {
            uid: uid.to_string(),
            failure: Some(f.message.clone()),
            ..PodStatus::default()
        });
        self.status.send_replace(Enrollment { pods: enrolled.chain(failed).collect(), settled: true });
    }

    /// Kernel work enters namespaces and talks netlink: not on the runtime's thread.
    pub async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Kernel) -> T + Send + 'static) -> T {
        let kernel = self.kernel.clone();
        match tokio::task::spawn_blocking(move || work(&kernel)).await {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }

    async fn on_pod<E: Send + 'static>(
        &self,
        pod: &Arc<PodHandle>,
        work: impl FnOnce(&weft_kernel::Pod) -> Result<(), E> + Send + 'static,
    ) -> Result<(), E> {
        let pod = pod.clone();
        self.blocking(move |_| work(&pod.kernel)).await
    }
}

async fn drain(pods: Vec<Weak<PodHandle>>) {
    for pod in pods {
        if let Some(pod) = pod.upgrade() {
            pod.until_idle().await;
        }
    }
}

/// Whether the controller still means the same pod: same account, same addresses, and not made anew under its name. A
/// pod of a cluster whose workload is withdrawn may still run, and then must not talk in the clear to the last.
fn same_pod(pod: &PodHandle, local: &LocalPod, workload: Option<&Arc<Workload>>) -> bool {
    let anew = matches!((&pod.hint, &local.netns), (NetnsHint::PodUid(a), NetnsHint::PodUid(b)) if a != b);
    let same =
        |w: &Arc<Workload>| w.identity == pod.workload.identity && w.addresses == pod.workload.addresses;
    let withdrawn = matches!(local.netns, NetnsHint::PodUid(_));
    !anew && workload.map_or(withdrawn, same)
}

/// Whether the namespace that was enrolled is still the pod's: under its path, or with a process in it.
fn lives(pod: &PodHandle, hint: &NetnsHint, inhabited: &HashSet<u64>) -> bool {
    match hint {
        NetnsHint::Path(path) => Netns::open(path).is_ok_and(|n| n.cookie() == pod.kernel.cookie()),
        NetnsHint::PodUid(_) | NetnsHint::Unknown => inhabited.contains(&pod.kernel.netns().inode()),
    }
}

fn replace_if_changed<T: PartialEq>(current: &mut T, new: T) -> bool {
    let changed = *current != new;
    *current = new;
    changed
}

fn far() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

/// Sends every report upward, with whom this node believes as `settled` says, and the newest again after each reconnect, until
/// the controller has it. Ends when the agent drains: the next one knows better.
pub async fn report_upward(
    controller: Controller,
    mut reports: watch::Receiver<EnrollmentReport>,
    mut settled: watch::Receiver<u64>,
    mut connected: watch::Receiver<bool>,
    mut draining: watch::Receiver<bool>,
) {
    while !*draining.borrow_and_update() {
        let mut report = reports.borrow_and_update().clone();
        report.trust_serial = *settled.borrow_and_update();
        connected.mark_unchanged();
        let nothing = report.enrolled_uids.is_empty() && report.failures.is_empty();
        let up = *connected.borrow();
        let retry = if nothing || !up {
            far()
        } else if let Err(status) = controller.report_enrollment(report).await {
            warn!(
                error = status.message(),
                "the controller has not taken the enrolment report; trying again"
            );
            Instant::now() + Duration::from_millis(500)
        } else {
            far()
        };
        tokio::select! {
            changed = reports.changed() => if changed.is_err() { return },
            changed = connected.changed() => if changed.is_err() { return },
            Ok(()) = settled.changed() => {}
            Ok(()) = draining.changed() => {}
            () = tokio::time::sleep_until(retry) => {}
        }
    }
}
