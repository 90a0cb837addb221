//! The one owner of the store and of who is enrolled. Changes of objects and reports of agents come to it in one queue,
//! and each is taken in, written down and published before the next: so there is one history of states, and every
//! agent sees a prefix of it. Runs on a thread of its own, since translation computes and writing down waits for the disk.
//!
//! In a cluster there are several histories, one a replica, and agents change between them. So each state says what it
//! holds of the cluster's ([`Builder::holds`]), and what this replica knows is told after what follows from it is published.
//! A state is not published before this replica has read what it rests on: everything up to what it wrote itself of who is
//! enrolled, and whatever another replica had read when it wrote that. Or two replicas could each publish a pod that the
//! other one's agents do not know to be enrolled.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot, watch};
use weft_proto::node::TrustBundle;
use weft_xds::{Progress, Snapshot, VersionVector};

use crate::{
    cluster::enrollment::Heard,
    enrollment::{Enrollment, Failures},
    metrics::{KindLabel, Metrics, NodeLabel},
    snapshot::Builder,
    source::{Delta, News},
    store::{Store, Touched},
    translate::{
        self, Identities, MeshSettings,
        incremental::{Changes, Placed, Translator},
    },
    trust::Settled,
};

/// Changes of objects come in company: a new pod, its EndpointSlice, the end of the old pod, each from a watch of its
/// own. All that comes within this time is taken in as one, so that agents are sent one message instead of three, and no
/// more states than this allows however restless the cluster is.
const GATHER: Duration = Duration::from_millis(20);
/// Demands for more that wait to be looked at; they are put together then.
const DEMANDS: usize = 64;

/// What the controller takes in.
#[derive(Debug)]
pub enum Input {
    /// From a directory.
    Objects(Delta),
    /// From a cluster.
    News(News),
    Report(Report),
    /// Whom agents are to believe.
    Trust(TrustBundle),
}

/// What an agent says of the pods of its node.
#[derive(Debug)]
pub struct Report {
    /// As its token proves it.
    pub node: String,
    /// Workload uids.
    pub enrolled: BTreeSet<String>,
    /// Workload uid to what went wrong.
    pub failures: Failures,
    /// The bundle that is in force there.
    pub trust: u64,
    /// Told when the report is written down, or why it is not. It is published then, or as soon as this replica has read
    /// everything up to there.
    pub done: oneshot::Sender<Result<(), String>>,
}

/// What everybody else works on. None until the first state is there.
#[derive(Debug)]
pub struct Published {
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    pub identities: watch::Receiver<Option<Arc<Identities>>>,
    /// How far the published state has got, for whoever has seen more.
    pub progress: Progress,
    /// What others have seen and this replica has not.
    pub wanted: mpsc::Receiver<VersionVector>,
    /// Whom the nodes with enrolled pods believe.
    pub settled: watch::Receiver<Option<Arc<Settled>>>,
}

pub struct Controller {
    store: Store,
    translator: Translator,
    enrollment: Enrollment,
    builder: Builder,
    /// As last said, to say each once.
    problems: BTreeMap<String, String>,
    /// A kind of address of which no range is known. Nothing is published then.
    uncaptured: Option<&'static str>,
    /// Nodes of which failures were heard that are not compared with the objects yet.
    heard_of: BTreeSet<String>,
    /// What has been read of the cluster, and what has to be before anything else is published.
    read: VersionVector,
    needed: VersionVector,
    /// Of these kinds a list has not shown as much as was needed then.
    doubted: BTreeMap<&'static str, u64>,
    /// Something is to be published that could not be.
    held_back: bool,
    known: watch::Sender<VersionVector>,
    wanted: mpsc::Sender<VersionVector>,
    snapshots: watch::Sender<Option<Arc<Snapshot>>>,
    identities: watch::Sender<Option<Arc<Identities>>>,
    settled: watch::Sender<Option<Arc<Settled>>>,
    metrics: Metrics,
}

impl Controller {
    pub fn new(settings: MeshSettings, enrollment: Enrollment, metrics: Metrics) -> (Self, Published) {
        let (snapshots, snapshots_receiver) = watch::channel(None);
        let (identities, identities_receiver) = watch::channel(None);
        let (settled, settled_receiver) = watch::channel(None);
        let (known, known_receiver) = watch::channel(VersionVector::default());
        let (wanted, wanted_receiver) = mpsc::channel(DEMANDS);
        let controller = Self {
            store: Store::default(),
            translator: Translator::new(settings),
            enrollment,
            builder: Builder::default(),
            problems: BTreeMap::new(),
            uncaptured: None,
            heard_of: BTreeSet::new(),
            read: VersionVector::default(),
            needed: VersionVector::default(),
            doubted: BTreeMap::new(),
            held_back: false,
            known,
            wanted: wanted.clone(),
            snapshots,
            identities,
            settled,
            metrics,
        };
        let published = Published {
            snapshots: snapshots_receiver,
            identities: identities_receiver,
            progress: Progress::new(known_receiver, wanted),
            wanted: wanted_receiver,
            settled: settled_receiver,
        };
        (controller, published)
    }

    /// Whether pods are enrolled from an earlier run.
    pub fn remembers_pods(&self) -> bool {
        !self.enrollment.enrolled().is_empty()
    }

    /// Takes in what comes until every sender is gone.
    pub fn run(mut self, mut inputs: mpsc::Receiver<Input>) {
        while let Some(input) = self.wait(&mut inputs) {
            let mut reports = Vec::new();
            if self.take(input, &mut reports) {
                #[allow(clippy::disallowed_methods, reason = "a thread of its own")]
                std::thread::sleep(GATHER);
                while let Ok(input) = inputs.try_recv() {
                    self.take(input, &mut reports);
                }
                self.settle();
            }
            // After the objects that came with them, so that what each of them says is about pods that are known.
            reports.into_iter().for_each(|report| self.report(report));
            self.catch_up();
            self.say_settled();
        }
    }

    /// Takes in one input; reports are put aside. Returns whether it was of objects, for [`Controller::settle`].
    fn take(&mut self, input: Input, reports: &mut Vec<Report>) -> bool {
        match input {
            Input::Objects(delta) => {
                self.store.apply(delta);
                true
            }
            Input::News(news) => self.news(news),
            Input::Report(report) => {
                reports.push(report);
                false
            }
            Input::Trust(bundle) => {
                self.trust(&bundle);
                false
            }
        }
    }

    /// Takes in what a cluster has told. Returns whether it was of objects.
    fn news(&mut self, News { heard, delta, known, content, newest }: News) -> bool {
        self.enrollment.decides_by(content.only(&translate::deciding()));
        self.builder.holds(content);
        self.read = known;
        for heard in &heard {
            // Of other kinds a version of Weft may have written that reads more than this one, which would wait for ever.
            self.needed.merge(&heard.seen().only(&translate::deciding()));
            self.heard(heard);
        }
        if let Some((kind, version)) = newest {
            self.disprove(kind, version);
        }
        let of_objects = !delta.is_empty();
        self.store.apply(delta);
        of_objects
    }

    /// A list has shown that a kind is not newer than this. Whoever wrote that it had read more did so in another history;
    /// but not before another list says so, too, since this one may have begun before that was written.
    fn disprove(&mut self, kind: &'static str, newest: u64) {
        let Some(needed) = self.needed.get(kind).filter(|needed| *needed > newest) else { return };
        if self.doubted.insert(kind, needed) == Some(needed) {
            self.needed.lower(kind, newest);
        }
    }

    /// Tells agents whom to believe.
    pub fn trust(&mut self, bundle: &TrustBundle) {
        self.builder.trust(bundle);
        self.held_back = self.is_started();
    }

    fn say_settled(&self) {
        if self.is_started() {
            let settled = self.enrollment.settled();
            self.settled.send_if_modified(|known| {
                let differs = known.as_deref() != Some(&settled);
                if differs {
                    *known = Some(Arc::new(settled));
                }
                differs
            });
        }
    }

    /// Publishes what was held back, if this replica has read enough by now, and says how far it is then.
    fn catch_up(&mut self) {
        if self.held_back {
            self.release();
        }
        if !self.held_back && self.is_started() {
            self.known.send_if_modified(|known| {
                let differs = *known != self.read;
                known.clone_from(&self.read);
                differs
            });
        }
    }

    /// What comes next. While it is not there yet, there is time for what can be done late.
    fn wait(&mut self, inputs: &mut mpsc::Receiver<Input>) -> Option<Input> {
        loop {
            if let Ok(input) = inputs.try_recv() {
                return Some(input);
            }
            // Before the first objects everybody looks as if they had left.
            if !self.is_started() || !self.tidy() {
                return inputs.blocking_recv();
            }
        }
    }

    /// One thing that can be done late. Returns whether there may be more.
    fn tidy(&mut self) -> bool {
        let (store, settings) = (&self.store, self.translator.settings());
        let is_wanted = |node: &str, uid: &str| translate::is_wanted(store, settings, node, uid);
        let is_there = |node: &str| store.nodes.contains_key(node);
        let more = self.enrollment.tidy(self.translator.desired(), is_wanted, is_there);
        self.needed.merge(&self.enrollment.written_at());
        self.count_failures();
        self.enrolled();
        more
    }

    /// Applies a change of objects and publishes what follows.
    pub fn objects(&mut self, delta: Delta) {
        self.store.apply(delta);
        self.settle();
    }

    /// Takes in what is written down of a node's pods: before the first objects all of it, later what another replica
    /// wrote.
    fn heard(&mut self, heard: &Heard) {
        let desired = self.is_started().then(|| self.translator.desired());
        self.enrollment.heard(heard, desired);
        self.heard_of.insert(heard.node.clone());
        if self.is_started() && !self.store.is_touched() {
            self.retain_failures(BTreeSet::new());
        }
        self.enrolled();
    }

    fn is_started(&self) -> bool {
        self.identities.borrow().is_some()
    }

    /// Makes of the store what follows from it.
    fn settle(&mut self) {
        let touched = self.store.take_touched();
        let Placed { former, nodes } = self.translator.place(&self.store, &touched);
        match self.is_started() {
            true => self.enrollment.leave(&former, self.translator.desired()),
            // What is enrolled was read before the objects, and may be of pods that ended since.
            false => self.enrollment.retain(self.translator.desired()),
        }
        self.retain_failures(nodes);
        self.metrics.pods_desired.set(self.translator.desired().len() as i64);
        for (kind, count) in self.store.counts() {
            self.metrics.objects.get_or_create(&KindLabel { kind: kind.as_str() }).set(count as i64);
        }
        self.identities.send_replace(Some(Arc::new(self.translator.identities().clone())));
        self.publish(&touched);
    }

    /// Publishes what follows from a change of who is enrolled. Before the first objects nothing does, and with objects
    /// that are not settled yet it is published together with them.
    fn enrolled(&mut self) {
        if self.is_started() && !self.store.is_touched() && self.enrollment.has_changed() {
            self.publish(&Touched::default());
        }
    }

    fn report(&mut self, report: Report) {
        let Report { node, enrolled, failures, trust, done } = report;
        let result = self.take_report(&node, &enrolled, failures, trust);
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
        mut failures: Failures,
        trust: u64,
    ) -> Result<(), String> {
        if self.snapshots.borrow().is_none() {
            // Taking it in now would find none of its pods, and the agent would not repeat it.
            return Err("the controller has not read its objects yet".to_owned());
        }
        failures.retain(|uid, _| translate::is_wanted(&self.store, self.translator.settings(), node, uid));
        self.say_failures(node, &failures);
        let desired = self.translator.desired();
        self.enrollment
            .report(node, enrolled, failures, trust, desired)
            .map_err(|error| error.to_string())?;
        self.needed.merge(&self.enrollment.written_at());
        self.count_failures();
        self.enrolled();
        match self.too_early(node, enrolled) {
            Some(uid) => Err(format!("{uid} has no address yet as far as is known here; report it again")),
            None => Ok(()),
        }
    }

    /// A reported pod that is to be in the mesh and does not count yet, since its address has not come here: an agent
    /// may have that from another replica. It has to be reported again.
    fn too_early<'a>(&self, node: &str, enrolled: &'a BTreeSet<String>) -> Option<&'a str> {
        let waiting = translate::waiting(&self.store, self.translator.settings(), node);
        enrolled.iter().map(String::as_str).find(|uid| waiting.contains(*uid))
    }

    fn say_failures(&self, node: &str, failures: &Failures) {
        let known = self.enrollment.failures();
        for (uid, message) in failures.iter().filter(|(uid, message)| known.get(node, uid) != Some(message)) {
            tracing::warn!(target: "enrollment", node, uid, "the agent cannot enrol a pod: {message}");
        }
    }

    /// What is not to be in the mesh cannot fail to get there. `nodes` are those whose pods may be other ones.
    fn retain_failures(&mut self, mut nodes: BTreeSet<String>) {
        nodes.append(&mut self.heard_of);
        let (store, settings) = (&self.store, self.translator.settings());
        for node in &nodes {
            self.enrollment
                .retain_failures(node, |node, uid| translate::is_wanted(store, settings, node, uid));
        }
        self.count_failures();
    }

    fn count_failures(&mut self) {
        let family = &self.metrics.enrollment_failures;
        for node in self.enrollment.take_changed_failures() {
            let count = self.enrollment.failures().of(&node).len();
            let label = NodeLabel { node };
            if count == 0 {
                family.remove(&label);
            } else {
                family.get_or_create(&label).set(count as i64);
            }
        }
    }

    fn publish(&mut self, touched: &Touched) {
        let started = Instant::now();
        let changed = self.enrollment.take_changed();
        let enrolled = self.enrollment.enrolled();
        let mut changes = self.translator.translate(&self.store, touched, enrolled, &changed);
        self.metrics.pods_enrolled.set(enrolled.len() as i64);
        self.note_problems(&mut changes);
        self.builder.apply(changes);
        tracing::trace!(target: "controller", took = ?started.elapsed(), "translated a change");
        self.held_back = true;
        self.release();
    }

    /// Publishes the state as it is now, if it may be.
    fn release(&mut self) {
        if !self.read.covers(&self.needed) {
            let _ = self.wanted.try_send(self.needed.clone());
            return;
        }
        if self.uncaptured.is_some() {
            return;
        }
        self.held_back = false;
        if let Some(snapshot) = self.builder.build() {
            tracing::debug!(
                target: "controller", version = snapshot.version, seen = %snapshot.seen, "published a state"
            );
            self.metrics.snapshots.inc();
            self.snapshots.send_replace(Some(Arc::new(snapshot)));
        }
        self.metrics.set_ready();
    }

    /// Says what is newly wrong.
    fn note_problems(&mut self, changes: &mut Changes) {
        if let Some(mesh) = &changes.mesh {
            let uncaptured = translate::uncaptured(mesh);
            // Agents would capture nothing that goes there, and let it out in the clear.
            let problem = "no range is known, so nothing new is served";
            let subjects = [(self.uncaptured, None), (uncaptured, Some(problem.to_owned()))];
            let subjects =
                subjects.into_iter().filter_map(|(what, problem)| Some((what?.to_owned(), problem)));
            changes.problems.extend(subjects);
            self.uncaptured = uncaptured;
        }
        for (subject, problem) in std::mem::take(&mut changes.problems) {
            match problem {
                None => drop(self.problems.remove(&subject)),
                Some(problem) if self.problems.get(&subject) == Some(&problem) => {}
                Some(problem) => {
                    tracing::warn!(target: "controller", "{subject}: {problem}");
                    self.problems.insert(subject, problem);
                }
            }
        }
        self.metrics.translation_problems.set(self.problems.len() as i64);
    }
}

#[cfg(test)]
mod anew;
#[cfg(test)]
mod tests;
