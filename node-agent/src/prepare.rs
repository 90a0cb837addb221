//! Pods that are protected before they start: those that the CNI plugin announced. The enroller calls in here whenever
//! there is news, and takes over when the controller knows a pod's addresses.

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
    time::Duration,
};

use tokio::time::Instant;
use tracing::{info, warn};
use weft_cni::protocol::AddRequest;
use weft_core::Workload;
use weft_kernel::{Pod, PodAddresses};

use crate::{
    cni::Asked,
    convert::{LocalPod, NetnsHint},
    enroll::Enroller,
    place::owner_of,
    state::Snapshot,
};

/// How long the controller may take to name a pod that the CNI plugin announced.
const TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Default)]
pub struct Prepared {
    /// Not named by the controller yet, and until when they may wait.
    announced: Vec<(Asked, Instant)>,
    /// By pod UID. Nobody serves them until the controller knows their addresses, which it learns when they have started.
    pods: BTreeMap<String, Pod>,
}

impl Prepared {
    /// Takes a pod that the plugin asks about; it is answered by [`Self::answer`].
    pub fn announce(&mut self, asked: Asked) {
        self.announced.push((asked, Instant::now() + TIMEOUT));
    }

    /// When [`Self::answer`] has something to do without any news.
    pub fn deadline(&self) -> Option<Instant> {
        self.announced.iter().map(|(_, deadline)| *deadline).min()
    }

    /// Answers about the pods that the controller has named by now, after protecting those that belong to the mesh, and
    /// forgets those that do not any more. `served` are the namespaces of enrolled pods.
    pub async fn answer(&mut self, enroller: &Enroller, snapshot: &Snapshot, served: HashSet<u64>) {
        for (asked, deadline) in std::mem::take(&mut self.announced) {
            let uid = &asked.request.pod_uid;
            let named = |local: &&LocalPod| matches!(&local.netns, NetnsHint::PodUid(own) if own == uid);
            let local = snapshot.local.values().find(named).filter(|_| snapshot.synced);
            let pod = &asked.request.pod;
            let outcome = match local {
                Some(local) if !local.enroll => Ok(false),
                Some(_) => self.protect(enroller, &asked.request, &served).await.map(|()| true),
                None if deadline <= Instant::now() => {
                    Err(format!("the controller has not told this node of the pod {pod} in time"))
                }
                None => {
                    self.announced.push((asked, deadline));
                    continue;
                }
            };
            match &outcome {
                Ok(true) => info!(pod, "protected before it starts"),
                Ok(false) => {}
                Err(error) => warn!(pod, error, "not protected, so it is not started"),
            }
            // A plugin that gave up is asked for the pod again.
            let _ = asked.answer.send(outcome);
        }
        self.forget_unwanted(enroller, snapshot).await;
    }

    /// Captures a pod whose processes have not started. On hold it sends nothing.
    async fn protect(
        &mut self,
        enroller: &Enroller,
        request: &AddRequest,
        served: &HashSet<u64>,
    ) -> Result<(), String> {
        let (path, addresses) = (PathBuf::from(&request.netns), request.addresses.clone());
        let served = served.clone();
        let pod = enroller.blocking(move |kernel| {
            let netns = owner_of(&addresses, &[path])?;
            // Asked again about a pod that is served: another listener would take its connections from the workers.
            if served.contains(&netns.cookie()) {
                return Ok(None);
            }
            kernel.enroll(netns, PodAddresses::from_ips(addresses)).map(Some).map_err(|e| e.to_string())
        });
        if let Some(pod) = pod.await? {
            self.pods.insert(request.pod_uid.clone(), pod);
        }
        Ok(())
    }

    /// Pods whose label is gone, or whose network is: one that was deleted may still start, so it stays captured as long as
    /// its network is there.
    async fn forget_unwanted(&mut self, enroller: &Enroller, snapshot: &Snapshot) {
        let unwanted = |(uid, pod): &(&String, &Pod)| {
            let unlabelled =
                |l: &LocalPod| !l.enroll && matches!(&l.netns, NetnsHint::PodUid(own) if own == *uid);
            !pod.netns().alive() || (snapshot.synced && snapshot.local.values().any(unlabelled))
        };
        let unwanted: Vec<_> = self.pods.iter().filter(unwanted).map(|(uid, _)| uid.clone()).collect();
        for uid in unwanted {
            let Some(pod) = self.pods.remove(&uid) else { continue };
            if let Err(error) = enroller.blocking(move |_| pod.stop_capture()).await {
                warn!(pod_uid = uid, %error, "removing a pod that was never started");
            }
        }
    }

    /// What was protected, if it has the addresses by which the controller knows the pod.
    pub fn take(&mut self, hint: &NetnsHint, workload: &Workload) -> Option<Pod> {
        let NetnsHint::PodUid(uid) = hint else { return None };
        let pod = self.pods.remove(uid)?;
        workload.addresses.iter().all(|ip| pod.addresses().contains(*ip)).then_some(pod)
    }
}
