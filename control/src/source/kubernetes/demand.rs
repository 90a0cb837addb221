//! What others have seen more of than this replica: an agent that comes from another one, or another one that wrote down
//! who is enrolled. Mostly the watches bring it within milliseconds. Where they do not, a list does: they may be broken
//! without knowing it, or nothing has happened in a kind since the other replica first listed it, and a watch is silent then.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep_until},
};
use weft_xds::VersionVector;

/// What a watch gets to bring it.
const PATIENCE: Duration = Duration::from_secs(1);
/// Lists of a kind are not asked for more often. They are dear, and where the store was restored they never suffice.
const REST: Duration = Duration::from_secs(30);

pub struct Demand {
    wanted: mpsc::Receiver<VersionVector>,
    /// What came from there, and when to look whether a list is needed.
    open: VersionVector,
    due: Option<Instant>,
    watches: HashMap<&'static str, Watch>,
}

#[derive(Default)]
struct Watch {
    /// Tells it to list.
    relist: Arc<Notify>,
    /// What was last asked for, and when.
    asked: Option<(u64, Instant)>,
}

impl Demand {
    pub fn new(wanted: mpsc::Receiver<VersionVector>) -> Self {
        Self { wanted, open: VersionVector::default(), due: None, watches: HashMap::new() }
    }

    /// By this a watch is told to list.
    pub fn relist(&mut self, what: &'static str) -> Arc<Notify> {
        self.watches.entry(what).or_default().relist.clone()
    }

    /// Returns when it is time for [`Demand::ask`]. May be dropped and called again.
    pub async fn due(&mut self) {
        loop {
            match self.due {
                Some(due) => return sleep_until(due).await,
                None => match self.wanted.recv().await {
                    Some(wanted) => {
                        self.open.merge(&wanted);
                        self.due = Some(Instant::now() + PATIENCE);
                    }
                    None => std::future::pending().await,
                },
            }
        }
    }

    /// Asks for lists of what is wanted and still not known.
    pub fn ask(&mut self, known: &VersionVector) {
        self.due = None;
        while let Ok(wanted) = self.wanted.try_recv() {
            self.open.merge(&wanted);
        }
        let open = std::mem::take(&mut self.open);
        for (kind, version) in known.behind(&open) {
            let Some(watch) = self.watches.get_mut(kind) else { continue };
            if let Some((_, at)) = watch.asked.filter(|(_, at)| at.elapsed() < REST) {
                self.open.raise(kind, version);
                self.due = Some(at + REST);
                continue;
            }
            tracing::info!(
                target: "source",
                "listing {kind} anew: others have seen version {version}, this replica {}",
                known.get(kind).map_or_else(|| "nothing".to_owned(), |known| known.to_string())
            );
            watch.asked = Some((version, Instant::now()));
            watch.relist.notify_one();
        }
    }

    /// A list that was asked for is there.
    pub fn answered(&self, what: &str, version: u64) {
        let asked = self.watches.get(what).and_then(|watch| watch.asked);
        if let Some((asked, _)) = asked.filter(|(asked, _)| *asked > version) {
            tracing::error!(
                target: "source",
                "others have seen version {asked} of {what}, and the newest that the API server has is {version}: was it \
                 restored from a back-up? See docs/operate.md, After a restored back-up"
            );
        }
    }
}
