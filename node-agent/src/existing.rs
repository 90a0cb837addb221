//! Connections that are older than the enrolment of their pod. They live on, past the agent and in the clear, since nobody can
//! take a connection over; so they are counted, and cut where an annotation says so, once both ends are in the mesh: then the
//! client's next attempt takes the tunnel.
//!
//! What a pod has is written down once, when it is enrolled. From then on only what is written down is looked at, and the kernel is
//! asked only about pods of which something would count. The enroller calls in here; nobody else reads or writes.

use std::{
    collections::{BTreeMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use tracing::{info, warn};
use weft_core::{AddressKind, Target};
use weft_kernel::{Connection, Error};

use crate::{
    enroll::Enroller,
    metrics::{Text, WorkloadLabels},
    pod::{Phase, PodHandle},
    state::Snapshot,
};

/// How often those that are left are counted again.
const RECOUNT: Duration = Duration::from_secs(5);

#[derive(Default)]
pub struct Existing {
    pods: BTreeMap<Arc<str>, OfPod>,
    counted: Option<Instant>,
}

struct OfPod {
    pod: Arc<PodHandle>,
    /// `None`: they could not be listed yet.
    connections: Option<Vec<Connection>>,
    /// How many of them are with the mesh.
    count: usize,
    problem: Option<String>,
}

impl Existing {
    /// Looks at pods that are new here, and from time to time at what is left of the others. `enrolled` is every pod that is.
    pub async fn follow(
        &mut self,
        enroller: &Enroller,
        enrolled: &BTreeMap<Arc<str>, Arc<PodHandle>>,
        snapshot: &Snapshot,
    ) {
        self.pods.retain(|uid, of| enrolled.get(uid).is_some_and(|pod| Arc::ptr_eq(pod, &of.pod)));
        for (uid, pod) in enrolled {
            if !self.pods.contains_key(uid) {
                let mut of = OfPod { pod: pod.clone(), connections: None, count: 0, problem: None };
                let looked = of.look(enroller, snapshot).await;
                of.note(looked);
                self.pods.insert(uid.clone(), of);
            }
        }
        let now = Instant::now();
        if self.counted.is_some_and(|at| now < at + RECOUNT) {
            return;
        }
        self.counted = Some(now);
        for (uid, of) in &mut self.pods {
            let cut = snapshot.local.get(uid).is_some_and(|local| local.cut_existing);
            let looked = of.look_again(enroller, snapshot, cut).await;
            of.note(looked);
        }
        self.measure(enroller);
    }

    /// Of the pod of that name: how many there are, and why they could not be counted or cut.
    pub fn of(&self, uid: &str) -> (usize, Option<String>) {
        self.pods.get(uid).map(|of| (of.count, of.problem.clone())).unwrap_or_default()
    }

    fn measure(&self, enroller: &Enroller) {
        let gauge = &enroller.metrics.existing;
        gauge.clear();
        for of in self.pods.values().filter(|of| of.count > 0) {
            let workload = &of.pod.workload;
            let labels = WorkloadLabels {
                workload: Text(workload.workload_name.clone()),
                namespace: Text(workload.namespace.clone()),
            };
            gauge.get_or_create(&labels).inc_by(of.count as i64);
        }
    }
}

impl OfPod {
    /// Writes down what there is.
    async fn look(&mut self, enroller: &Enroller, snapshot: &Snapshot) -> Result<(), Error> {
        let mut all = self.list(enroller).await?;
        // What leads out of the cluster never comes to be with the mesh.
        let may_count = |ip| snapshot.in_range(ip) || snapshot.mesh.kind(ip) != AddressKind::Unknown;
        all.retain(|c| may_count(c.far().ip()));
        self.connections = Some(all);
        Ok(())
    }

    /// Counts what is left of it, and cuts that where it is to be cut.
    async fn look_again(&mut self, enroller: &Enroller, snapshot: &Snapshot, cut: bool) -> Result<(), Error> {
        if self.connections.is_none() {
            self.look(enroller, snapshot).await?;
        }
        let with_mesh = |c: &&Connection| is_with_mesh(snapshot, c.far());
        if self.connections.iter().flatten().any(|c| with_mesh(&c)) {
            let open: HashSet<u64> = self.list(enroller).await?.iter().map(Connection::cookie).collect();
            self.connections.iter_mut().for_each(|all| all.retain(|c| open.contains(&c.cookie())));
        }
        let counted: Vec<_> = self.connections.iter().flatten().filter(with_mesh).copied().collect();
        self.count = counted.len();
        // Not before: a client would come back in the clear.
        if cut && self.count > 0 && self.pod.phase() == Phase::Published {
            let pod = self.pod.clone();
            enroller.blocking(move |_| counted.iter().try_for_each(|c| pod.kernel.destroy(c))).await?;
            info!(uid = %self.pod.uid, connections = self.count, "cut what is older than the pod's enrolment");
        }
        Ok(())
    }

    async fn list(&self, enroller: &Enroller) -> Result<Vec<Connection>, Error> {
        let pod = self.pod.clone();
        enroller.blocking(move |_| pod.kernel.direct_connections()).await
    }

    fn note(&mut self, looked: Result<(), Error>) {
        let problem = looked.err().map(|error| format!("{:#}", anyhow::Error::from(error)));
        if problem.is_some() && problem != self.problem {
            warn!(uid = %self.pod.uid, error = problem, "connections that are older than the pod's enrolment");
        }
        self.problem = problem;
    }
}

/// Whether a connection with that far end would be captured or refused if it were opened now. A client's port could be a node
/// port by its number; the usual ranges of the two do not overlap.
fn is_with_mesh(snapshot: &Snapshot, far: SocketAddr) -> bool {
    match snapshot.mesh.kind(far.ip()) {
        AddressKind::Meshed | AddressKind::Enrolled => true,
        AddressKind::Node => snapshot.mesh.is_meshed(Target::NodePort(far.port())),
        AddressKind::External => snapshot.mesh.is_meshed(Target::Port(far)),
        AddressKind::Unmeshed | AddressKind::Unknown => false,
    }
}
