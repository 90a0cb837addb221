//! The one owner of the store and of who is enrolled. Changes of objects and reports of agents come to it in one queue,
//! and each is taken in, written down and published before the next: so there is one history of states, and every
//! agent sees a prefix of it. Runs on a thread of its own, since translation computes and writing down waits for the disk.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use tokio::sync::{mpsc, oneshot, watch};
use weft_xds::Snapshot;

use crate::{
    cluster::enrollment::Heard,
    enrollment::{Enrollment, Places},
    metrics::{KindLabel, Metrics, NodeLabel},
    snapshot::Builder,
    source::Delta,
    store::Store,
    translate::{self, Identities, MeshSettings},
};

/// What the controller takes in.
#[derive(Debug)]
pub enum Input {
    Objects(Delta),
    Report(Report),
    /// Who is written down in the cluster as enrolled.
    Enrollment(Heard),
}

/// What an agent says of the pods of its node.
#[derive(Debug)]
pub struct Report {
    /// As its token proves it.
    pub node: String,
    /// Workload uids.
    pub enrolled: BTreeSet<String>,
    /// Workload uid to what went wrong.
    pub failures: BTreeMap<String, String>,
    /// Told when the report is written down and published, or why it is not.
    pub done: oneshot::Sender<Result<(), String>>,
}

/// What everybody else works on. None until the first state is there.
#[derive(Debug, Clone)]
pub struct Published {
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    pub identities: watch::Receiver<Option<Arc<Identities>>>,
}

pub struct Controller {
    settings: MeshSettings,
    store: Store,
    enrollment: Enrollment,
    builder: Builder,
    /// As last said, to say each once.
    problems: BTreeMap<String, String>,
    snapshots: watch::Sender<Option<Arc<Snapshot>>>,
    identities: watch::Sender<Option<Arc<Identities>>>,
    metrics: Metrics,
}

impl Controller {
    pub fn new(settings: MeshSettings, enrollment: Enrollment, metrics: Metrics) -> (Self, Published) {
        let (snapshots, snapshots_receiver) = watch::channel(None);
        let (identities, identities_receiver) = watch::channel(None);
        let controller = Self {
            settings,
            store: Store::default(),
            enrollment,
            builder: Builder::default(),
            problems: BTreeMap::new(),
            snapshots,
            identities,
            metrics,
        };
        (controller, Published { snapshots: snapshots_receiver, identities: identities_receiver })
    }

    /// Whether pods are enrolled from an earlier run.
    pub fn remembers_pods(&self) -> bool {
        !self.enrollment.enrolled().is_empty()
    }

    /// Takes in what comes until every sender is gone.
    pub fn run(mut self, mut inputs: mpsc::Receiver<Input>) {
        let mut next = None;
        while let Some(input) = next.take().or_else(|| self.wait(&mut inputs)) {
            match input {
                Input::Objects(delta) => {
                    self.store.apply(delta);
                    // All that waits is one change: working out what follows costs more than applying it.
                    loop {
                        match inputs.try_recv() {
                            Ok(Input::Objects(delta)) => self.store.apply(delta),
                            other => break next = other.ok(),
                        }
                    }
                    self.settle();
                }
                Input::Report(report) => self.report(report),
                Input::Enrollment(heard) => self.heard(&heard),
            }
        }
    }

    /// What comes next. If it is not there yet, there is time for what can be done late.
    fn wait(&mut self, inputs: &mut mpsc::Receiver<Input>) -> Option<Input> {
        inputs.try_recv().ok().or_else(|| {
            let started = self.is_started();
            let is_there = |node: &str| !started || self.store.nodes.contains_key(node);
            if self.enrollment.tidy(is_there) {
                self.settle();
            }
            inputs.blocking_recv()
        })
    }

    /// Applies a change of objects and publishes what follows.
    pub fn objects(&mut self, delta: Delta) {
        self.store.apply(delta);
        self.settle();
    }

    /// Takes in what is written down of a node's pods: before the first objects all of it, later what another replica
    /// wrote.
    fn heard(&mut self, heard: &Heard) {
        let desired = self.is_started().then(|| translate::desired(&self.store, &self.settings));
        if self.enrollment.heard(heard, desired.as_ref()) && desired.is_some() {
            self.publish();
        }
        if self.is_started() {
            self.retain_failures();
        }
    }

    fn is_started(&self) -> bool {
        self.identities.borrow().is_some()
    }

    /// Makes of the store what follows from it.
    fn settle(&mut self) {
        let desired = translate::desired(&self.store, &self.settings);
        self.enrollment.retain(&desired);
        self.retain_failures();
        self.metrics.pods_desired.set(desired.len() as i64);
        for (kind, count) in self.store.counts() {
            self.metrics.objects.get_or_create(&KindLabel { kind: kind.as_str() }).set(count as i64);
        }
        let identities = Arc::new(translate::identities(&self.store, &self.settings));
        self.identities.send_replace(Some(identities));
        self.publish();
    }

    fn report(&mut self, report: Report) {
        let Report { node, enrolled, failures, done } = report;
        let result = self.take_report(&node, &enrolled, failures);
        if let Err(why) = &result {
            tracing::error!(target: "enrollment", node, "a report is not in force: {why}");
        }
        // The agent may have hung up; it reports again then.
        let _ = done.send(result);
    }

    fn take_report(
        &mut self,
        node: &str,
        enrolled: &BTreeSet<String>,
        mut failures: BTreeMap<String, String>,
    ) -> Result<(), String> {
        if self.snapshots.borrow().is_none() {
            // Taking it in now would find none of its pods, and the agent would not repeat it.
            return Err("the controller has not read its objects yet".to_owned());
        }
        failures.retain(|uid, _| translate::is_wanted(&self.store, &self.settings, node, uid));
        self.say_failures(node, &failures);
        let desired = translate::desired(&self.store, &self.settings);
        let report = self.enrollment.report(node, enrolled, failures, &desired);
        if report.map_err(|error| error.to_string())? {
            self.publish();
        }
        self.count_failures();
        match self.too_early(node, enrolled, &desired) {
            Some(uid) => Err(format!("{uid} has no address yet as far as is known here; report it again")),
            None => Ok(()),
        }
    }

    /// A reported pod that is to be in the mesh and does not count yet, since its address has not come here: an agent
    /// may have that from another replica. It has to be reported again.
    fn too_early<'a>(&self, node: &str, enrolled: &'a BTreeSet<String>, desired: &Places) -> Option<&'a str> {
        let waiting = translate::waiting(&self.store, &self.settings, node);
        enrolled.iter().map(String::as_str).find(|uid| waiting.contains(*uid) && !desired.contains_key(*uid))
    }

    fn say_failures(&self, node: &str, failures: &BTreeMap<String, String>) {
        let known = self.enrollment.failures();
        let is_known = |uid: &String, message: &String| known.get(uid).is_some_and(|f| f.message == *message);
        for (uid, message) in failures.iter().filter(|(uid, message)| !is_known(uid, message)) {
            tracing::warn!(target: "enrollment", node, uid, "the agent cannot enrol a pod: {message}");
        }
    }

    /// What is not to be in the mesh cannot fail to get there.
    fn retain_failures(&mut self) {
        let (store, settings) = (&self.store, &self.settings);
        self.enrollment.retain_failures(|node, uid| translate::is_wanted(store, settings, node, uid));
        self.count_failures();
    }

    fn count_failures(&self) {
        let family = &self.metrics.enrollment_failures;
        family.clear();
        for failure in self.enrollment.failures().values() {
            family.get_or_create(&NodeLabel { node: failure.node.clone() }).inc();
        }
    }

    fn publish(&mut self) {
        let started = Instant::now();
        let mut translation = translate::translate(&self.store, self.enrollment.enrolled(), &self.settings);
        if let Some(what) = translation.uncaptured() {
            // Agents would capture nothing that goes there, and let it out in the clear.
            let problem = (what.to_owned(), "no range is known, so nothing new is served".to_owned());
            self.say([problem].into());
            return;
        }
        self.say(std::mem::take(&mut translation.problems));
        self.metrics.pods_enrolled.set(self.enrollment.enrolled().len() as i64);
        if let Some(snapshot) = self.builder.build(translation) {
            tracing::info!(
                target: "controller",
                version = snapshot.version, took = ?started.elapsed(),
                enrolled = self.enrollment.enrolled().len(), "published a state"
            );
            self.metrics.snapshots.inc();
            self.snapshots.send_replace(Some(Arc::new(snapshot)));
        }
        self.metrics.set_ready();
    }

    fn say(&mut self, problems: BTreeMap<String, String>) {
        for (subject, problem) in
            problems.iter().filter(|(subject, problem)| self.problems.get(*subject) != Some(problem))
        {
            tracing::warn!(target: "controller", "{subject}: {problem}");
        }
        self.metrics.translation_problems.set(problems.len() as i64);
        self.problems = problems;
    }
}

#[cfg(test)]
mod tests;
