//! One enrolled pod as the data path sees it.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::{Notify, Semaphore, watch};
use weft_core::{SpiffeId, Workload};
use weft_kernel::Pod;

use crate::{affinity::Affinity, convert::NetnsHint};

/// How far a pod's membership has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// In place in the kernel, but this agent has not seen it published: its own connections wait.
    Hold,
    /// In the mesh.
    Published,
    /// The label is gone: peers are being told, tunnels still work, nothing waits.
    Leaving,
    /// The pod no longer exists; its connections are cut.
    Gone,
}

/// Shared by the enrolment task, which owns the phase, and the workers, which serve the pod's connections.
pub struct PodHandle {
    pub uid: Arc<str>,
    pub workload: Arc<Workload>,
    /// How its network namespace was found.
    pub hint: NetnsHint,
    pub kernel: Pod,
    /// What tunnels say about this pod as a source, in the form ztunnel reads.
    pub baggage: String,
    pub phase: watch::Sender<Phase>,
    /// Which endpoints its connections go to again.
    pub affinity: Affinity,
    /// One permit a connection, so that one pod cannot use up the agent.
    pub permits: Arc<Semaphore>,
    open: AtomicUsize,
    idle: Notify,
}

impl PodHandle {
    pub fn new(workload: Arc<Workload>, hint: NetnsHint, kernel: Pod, max_connections: usize) -> Self {
        let cluster = workload.uid.split('/').next().unwrap_or_default();
        let baggage = format!(
            "k8s.cluster.name={cluster},k8s.namespace.name={},k8s.pod.name={},service.name={}",
            workload.namespace, workload.name, workload.workload_name
        );
        Self {
            uid: workload.uid.clone(),
            baggage,
            workload,
            hint,
            kernel,
            phase: watch::Sender::new(Phase::Hold),
            affinity: Affinity::default(),
            permits: Arc::new(Semaphore::new(max_connections)),
            open: AtomicUsize::new(0),
            idle: Notify::new(),
        }
    }

    pub fn identity(&self) -> &SpiffeId {
        &self.workload.identity
    }

    pub fn owns(&self, ip: IpAddr) -> bool {
        self.kernel.addresses().contains(ip)
    }

    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Counts a connection until the guard is dropped.
    pub fn connection(self: &Arc<Self>) -> OpenConnection {
        self.open.fetch_add(1, Ordering::Relaxed);
        OpenConnection(self.clone())
    }

    pub fn open_connections(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Returns once no connection is open.
    pub async fn until_idle(&self) {
        loop {
            let idle = self.idle.notified();
            if self.open_connections() == 0 {
                return;
            }
            idle.await;
        }
    }
}

/// See [`PodHandle::connection`].
pub struct OpenConnection(Arc<PodHandle>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        if self.0.open.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}
