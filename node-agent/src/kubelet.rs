//! Keeps the kernel's idea of the kubelet current. Who that is, `weft_kernel::kubelet` says.
//!
//! A kubelet that restarts comes back in a new cgroup, and nobody tells: so it is looked for every second, which costs some
//! tens of system calls while it is where it was. Until it is found again its probes go to the agent.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};
use tracing::{error, info};
use weft_api::agent::KubeletStatus;
use weft_kernel::{Kernel, Kubelet, Options, kubelet};

const INTERVAL: Duration = Duration::from_secs(1);

/// Runs until the agent drains: from then on it is its successor's to say.
pub async fn keep_recognised(
    kernel: Arc<Kernel>,
    options: Options,
    status: watch::Sender<KubeletStatus>,
    mut draining: watch::Receiver<bool>,
) {
    let options = Arc::new(options);
    let mut last: Option<Kubelet> = None;
    // What the kernel was told; at first it has what a predecessor said.
    let mut told: Option<Option<u64>> = None;
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = draining.wait_for(|draining| *draining) => return,
        }
        let (options, known) = (options.clone(), last.take());
        let search = move || kubelet::find(&options, known.as_ref()).map_err(|why| why.to_string());
        // A search that panics has found nobody.
        let found = spawn_blocking(search).await.unwrap_or_else(|error| Err(error.to_string()));
        let now = match &found {
            Ok(kubelet) => KubeletStatus::Recognised { cgroup: kubelet.cgroup().display().to_string() },
            Err(why) => KubeletStatus::Unrecognised { why: why.clone() },
        };
        last = found.ok();
        let id = last.as_ref().map(Kubelet::cgroup_id);
        if told != Some(id) {
            match kernel.recognise_kubelet(last.as_ref()) {
                Ok(()) => told = Some(id),
                Err(error) => error!(%error, "telling the kernel who the kubelet is"),
            }
            info!(cgroup_id = id, status = ?now, "the kubelet");
        }
        status.send_if_modified(|status| std::mem::replace(status, now.clone()) != now);
    }
}
