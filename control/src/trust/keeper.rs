//! Follows the record of whom the mesh believes, wherever it is kept, and, as the replica that leads, moves it on.

use std::{
    future::pending,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use tokio::sync::{mpsc, watch};
use weft_api::trust::{Progress, TrustStatus, Waiting};

use super::{Authorities, Circumstances, Pair, Record, Rotation, Settled, given::Given, unix};
use crate::{
    cluster::{ClusterError, authority, bounded, patiently},
    controller::Input,
    metrics::{Metrics, NodeLabel},
    state_dir::{Access, StateDir, StateError},
};

const RECORD_FILE: &str = "trust.json";
/// The bundle, for whoever has to know the controller.
const BUNDLE_FILE: &str = "root.pem";
const STATUS_FILE: &str = "trust-status.json";
/// What is written there asks for a rotation.
const REQUEST_FILE: &str = "rotate-root";
/// How often the record is read, where others may change it.
const INTERVAL: Duration = Duration::from_secs(5);
/// A request for a rotation on the same machine is noticed as fast as a person expects.
const INTERVAL_IN_DIRECTORY: Duration = Duration::from_secs(1);
/// How often whoever waits for a rotation looks.
const LOOK: Duration = Duration::from_millis(500);
/// A controller that runs has taken a request up by then.
const PATIENCE: Duration = Duration::from_secs(10);
/// A replica that has not read the record for that long may sign with a root that has been let go: it signs nothing.
const STALE: Duration = Duration::from_secs(15);

/// What is known of the record.
#[derive(Debug, Clone)]
pub struct Current {
    pub authorities: Arc<Authorities>,
    /// When it was read.
    read: Instant,
    /// Nobody else changes it.
    alone: bool,
}

impl Current {
    /// Read just now. `alone`: nobody else changes it.
    pub fn new(authorities: Authorities, alone: bool) -> Self {
        Self { authorities: Arc::new(authorities), read: Instant::now(), alone }
    }

    /// As if it had been read that long ago, and others might change it.
    #[cfg(test)]
    pub fn aged(self, by: Duration) -> Self {
        Self { read: Instant::now().checked_sub(by).unwrap(), alone: false, ..self }
    }

    /// Whether something may be signed.
    pub fn is_fresh(&self) -> bool {
        self.alone || self.read.elapsed() < STALE
    }
}

/// Cheap to clone.
pub type Trust = watch::Receiver<Current>;

/// Where the record is kept.
pub enum Place {
    Directory(StateDir),
    Cluster { client: kube::Client, namespace: String },
}

#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error("{what} is not usable: {why}")]
    Unfit { what: String, why: String },
    #[error("the mesh's issuer: {0}")]
    Given(String),
}

/// The record as it was read.
struct Read {
    record: Record,
    /// In a cluster, what it replaces.
    version: Option<String>,
}

/// Follows the record.
pub struct Keeper {
    place: Place,
    rotation: Rotation,
    /// Where somebody else puts what is to sign.
    given: Option<Given>,
    /// Why that is not taken.
    problem: Option<String>,
    organization: String,
    record: Record,
    /// Since when it is that.
    since: Instant,
    /// What somebody has written who wants a rotation.
    request: Option<String>,
    current: watch::Sender<Current>,
    metrics: Metrics,
    /// As it was last shown.
    status: Option<TrustStatus>,
}

impl Keeper {
    /// Reads the record, or makes the first one, with a root of its own. A record that is there and no good is an error:
    /// another root would cut off every certificate that is in use.
    pub async fn open(
        place: Place,
        rotation: Rotation,
        given: Option<Given>,
        organization: &str,
        metrics: Metrics,
    ) -> Result<(Self, Trust), TrustError> {
        let unfit = |why: String| TrustError::Unfit { what: place.what(), why };
        let record = match place.read_at_start().await? {
            Some(read) => read.record,
            None => {
                let now = SystemTime::now();
                let new = match &given {
                    None => Record::new(organization, now).map_err(unfit)?,
                    Some(given) => Record::of(given.read().map_err(TrustError::Given)?, now),
                };
                place.create(&new).await?
            }
        };
        let authorities = Authorities::try_from(&record).map_err(unfit)?;
        let alone = matches!(place, Place::Directory(_));
        let (current, trust) = watch::channel(Current::new(authorities, alone));
        let organization = organization.to_owned();
        let mut keeper = Self {
            place,
            rotation,
            given,
            problem: None,
            organization,
            record,
            since: Instant::now(),
            request: None,
            current,
            metrics,
            status: None,
        };
        keeper.publish(&Settled::new(), true).await?;
        Ok((keeper, trust))
    }

    /// Never returns. `leads` says whether this replica moves the record on; `settled` is None before it is known who is
    /// enrolled.
    pub async fn run(
        mut self,
        mut leads: watch::Receiver<bool>,
        mut settled: watch::Receiver<Option<Arc<Settled>>>,
    ) {
        let interval = match self.place {
            Place::Directory(_) => INTERVAL_IN_DIRECTORY,
            Place::Cluster { .. } => INTERVAL,
        };
        loop {
            let leading = *leads.borrow_and_update();
            let nodes = settled.borrow_and_update().clone();
            if let Err(error) = self.follow(leading, nodes.as_deref()).await {
                tracing::warn!(target: "trust", "{error}");
            }
            tokio::select! {
                () = tokio::time::sleep(interval) => {}
                () = changed(&mut leads) => {}
                () = changed(&mut settled) => {}
            }
        }
    }

    async fn follow(&mut self, leading: bool, settled: Option<&Settled>) -> Result<(), TrustError> {
        let asked = Instant::now();
        let read = self.place.read().await?;
        if read.record != self.record {
            if read.record.serial() < self.record.serial() {
                tracing::warn!(
                    target: "trust", serial = read.record.serial(), known = self.record.serial(),
                    "{} is older than it was: from a back-up?", self.place.what()
                );
            }
            self.adopt(read.record)?;
        }
        self.current.send_if_modified(|current| {
            current.read = asked;
            false
        });
        let Some(settled) = settled else { return Ok(()) };
        if leading {
            let given = self.take_given();
            let circumstances = Circumstances {
                rotation: &self.rotation,
                request: self.request.as_deref(),
                given: given.as_ref(),
                settled,
                since: self.since.elapsed(),
            };
            let step = self.record.step(&circumstances, &self.organization, SystemTime::now());
            if let Some((next, what)) = step.map_err(|why| self.unfit(why))?
                && self.place.replace(&next, read.version).await?
            {
                tracing::info!(target: "trust", serial = next.serial(), "{what}");
                self.adopt(next)?;
            }
        }
        self.tell(settled);
        self.publish(settled, leading).await
    }

    /// What was given, if it is fit; else what signs goes on to sign, and everybody is told why.
    fn take_given(&mut self) -> Option<Pair> {
        let read = self.given.as_ref()?.read();
        let problem = read.as_ref().err().cloned();
        if let Some(problem) = problem.as_ref().filter(|problem| self.problem.as_ref() != Some(problem)) {
            tracing::error!(target: "trust", "what is to sign for the mesh is not taken: {problem}");
        }
        self.problem = problem;
        Some(read.unwrap_or_else(|_| self.record.signer.clone()))
    }

    fn unfit(&self, why: String) -> TrustError {
        TrustError::Unfit { what: self.place.what(), why }
    }

    /// Takes another record for the truth. One that is no good leaves everything as it was.
    fn adopt(&mut self, record: Record) -> Result<(), TrustError> {
        let authorities = Authorities::try_from(&record).map_err(|why| self.unfit(why))?;
        self.record = record;
        self.since = Instant::now();
        self.current.send_modify(|current| *current = Current::new(authorities, current.alone));
        Ok(())
    }

    /// What metrics say.
    fn tell(&mut self, settled: &Settled) {
        let metrics = &self.metrics;
        metrics.root_expiry.set(unix(self.current.borrow().authorities.signer.not_after()) as i64);
        metrics.root_rotation.set(self.record.phase() as i64);
        metrics.root_waiting.clear();
        for node in self.record.waiting(settled) {
            metrics.root_waiting.get_or_create(&NodeLabel { node: node.to_owned() }).set(1);
        }
    }

    /// Shows the bundle and the status, unless they are there already; and sees whether somebody wants a rotation.
    async fn publish(&mut self, settled: &Settled, leading: bool) -> Result<(), TrustError> {
        let (given, problem) = (self.given.is_some(), self.problem.clone());
        let status = TrustStatus { given, problem, ..self.record.status(settled) };
        let authorities = self.current.borrow().authorities.clone();
        self.request = match &self.place {
            Place::Directory(state) if self.status.as_ref() == Some(&status) => request_in(state)?,
            Place::Directory(state) => {
                let text = serde_json::to_vec_pretty(&status).map_err(|e| self.unfit(e.to_string()))?;
                state.write(BUNDLE_FILE, authorities.pem().as_bytes(), Access::Public)?;
                state.write(STATUS_FILE, &text, Access::Public)?;
                request_in(state)?
            }
            // Each time, since somebody may have removed or changed it.
            Place::Cluster { client, namespace } => {
                let write = authority::publish(client, namespace, authorities.pem(), &status, leading);
                bounded("the roots' certificates", write).await?
            }
        };
        self.status = Some(status);
        Ok(())
    }
}

/// Waits for news; for ever where there will be none.
async fn changed<T>(receiver: &mut watch::Receiver<T>) {
    if receiver.changed().await.is_err() {
        pending::<()>().await;
    }
}

/// Tells the controller of every bundle, for its agents. Never returns while there is one.
pub async fn each_bundle(mut trust: Trust, inputs: mpsc::Sender<Input>) {
    loop {
        // The first one again, too: it may have changed before this began.
        let bundle = trust.borrow_and_update().authorities.bundle();
        if inputs.send(Input::Trust(bundle)).await.is_err() || trust.changed().await.is_err() {
            return;
        }
    }
}

/// Asks the controller that uses this state directory for a rotation. Returns the words of the request.
pub fn request(state: &StateDir) -> Result<String, StateError> {
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string();
    state.write(REQUEST_FILE, at.as_bytes(), Access::Private)?;
    Ok(at)
}

/// Says on standard error how the rotation goes on that was asked for in these words, until it is done.
pub fn until_rotated(state: &StateDir, request: &str) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut waiting = Waiting::new(request);
    loop {
        let text =
            state.read(STATUS_FILE)?.context("the controller has never run with this state directory")?;
        match waiting.look(serde_json::from_slice(&text).context(STATUS_FILE)?) {
            Progress::Done => {
                eprintln!("done: there is one root, the new one");
                return Ok(());
            }
            Progress::Idle if started.elapsed() > PATIENCE => {
                anyhow::bail!(
                    "no controller has taken the request up; one that starts with this state directory will"
                );
            }
            Progress::News(status) => eprintln!("{status}"),
            Progress::Idle | Progress::Nothing => {}
        }
        #[allow(clippy::disallowed_methods, reason = "a command without a runtime")]
        std::thread::sleep(LOOK);
    }
}

impl Place {
    fn what(&self) -> String {
        match self {
            Self::Directory(state) => state.path(RECORD_FILE).display().to_string(),
            Self::Cluster { namespace, .. } => format!("Secret {namespace}/{}", authority::SECRET),
        }
    }

    async fn read_at_start(&self) -> Result<Option<Read>, TrustError> {
        match self {
            Self::Directory(state) => in_directory(state, &self.what()),
            Self::Cluster { client, namespace } => {
                Ok(patiently(|| authority::read(client, namespace)).await?.map(Read::from))
            }
        }
    }

    async fn read(&self) -> Result<Read, TrustError> {
        let read = match self {
            Self::Directory(state) => in_directory(state, &self.what())?,
            Self::Cluster { client, namespace } => {
                bounded(authority::SECRET, authority::read(client, namespace)).await?.map(Read::from)
            }
        };
        read.ok_or_else(|| TrustError::Unfit { what: self.what(), why: "is gone".to_owned() })
    }

    /// Writes the first record, unless somebody else was faster. Returns the one that is there then.
    async fn create(&self, record: &Record) -> Result<Record, TrustError> {
        match self {
            Self::Directory(state) => {
                if state.read(BUNDLE_FILE)?.is_some() {
                    let why = "is missing, but a root's certificate is there: restore it from a back-up, or remove \
                        root.pem for a new root that nobody believes yet";
                    return Err(TrustError::Unfit { what: self.what(), why: why.to_owned() });
                }
                self.write(state, record)?;
                tracing::info!(target: "trust", "made the mesh's root of trust");
                Ok(record.clone())
            }
            Self::Cluster { client, namespace } => {
                Ok(patiently(|| authority::create(client, namespace, record)).await?)
            }
        }
    }

    /// Writes the next record. False if it is not any more what was read.
    async fn replace(&self, record: &Record, version: Option<String>) -> Result<bool, TrustError> {
        match self {
            Self::Directory(state) => self.write(state, record).map(|()| true),
            Self::Cluster { client, namespace } => {
                let write = authority::replace(client, namespace, record, version);
                Ok(bounded(authority::SECRET, write).await?)
            }
        }
    }

    fn write(&self, state: &StateDir, record: &Record) -> Result<(), TrustError> {
        let text = record.to_json().map_err(|why| TrustError::Unfit { what: self.what(), why })?;
        Ok(state.write(RECORD_FILE, &text, Access::Private)?)
    }
}

fn in_directory(state: &StateDir, what: &str) -> Result<Option<Read>, TrustError> {
    let Some(text) = state.read_private(RECORD_FILE)? else { return Ok(None) };
    let unfit = |why| TrustError::Unfit { what: what.to_owned(), why };
    Ok(Some(Read { record: Record::parse(&text).map_err(unfit)?, version: None }))
}

fn request_in(state: &StateDir) -> Result<Option<String>, StateError> {
    Ok(state.read(REQUEST_FILE)?.map(|text| String::from_utf8_lossy(&text).trim().to_owned()))
}

impl From<authority::Stored> for Read {
    fn from(stored: authority::Stored) -> Self {
        Self { record: stored.record, version: Some(stored.version) }
    }
}
