//! What others have seen more of than this replica: an agent that comes from another one, or another one that wrote down
//! who is enrolled. Mostly the watches bring it within milliseconds. Where they do not, a list does: they may be broken
//! without knowing it, or nothing has happened in a kind since the other replica first listed it, and a watch is silent then.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use weft_xds::VersionVector;

use super::list_watch::Asks;

/// What a watch gets to bring it.
const PATIENCE: Duration = Duration::from_secs(1);
/// Lists of a kind are not asked for more often, since they are dear.
const PAUSE: Duration = Duration::from_secs(5);
/// The same for a kind whose last one was asked for in vain, or does not come. Where the store was restored none suffices.
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
    asks: Arc<Asks>,
    /// What was last asked for, and when.
    asked: Option<(u64, Instant)>,
}

impl Demand {
    pub fn new(wanted: mpsc::Receiver<VersionVector>) -> Self {
        Self { wanted, open: VersionVector::default(), due: None, watches: HashMap::new() }
    }

    /// What is asked of a watch here.
    pub fn asks(&mut self, what: &'static str) -> Arc<Asks> {
        self.watches.entry(what).or_default().asks.clone()
    }

    /// Returns when it is time for [`Demand::ask`]. May be dropped and called again.
    pub async fn due(&mut self) {
        loop {
            let due = self.due;
            tokio::select! {
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => return,
                // One kind that has to rest does not keep others waiting.
                Some(wanted) = self.wanted.recv() => {
                    self.open.merge(&wanted);
                    self.look_by(Instant::now() + PATIENCE);
                }
                else => std::future::pending().await,
            }
        }
    }

    fn look_by(&mut self, time: Instant) {
        self.due = Some(self.due.map_or(time, |due| due.min(time)));
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
            let enough = |asked| known.get(kind).is_some_and(|known| known >= asked);
            let again = watch.asked.map(|(asked, at)| at + if enough(asked) { PAUSE } else { REST });
            if let Some(again) = again.filter(|again| *again > Instant::now()) {
                self.open.raise(kind, version);
                self.look_by(again);
                continue;
            }
            tracing::info!(
                target: "source",
                "listing {kind} anew: others have seen version {version}, this replica {}",
                known.get(kind).map_or_else(|| "nothing".to_owned(), |known| known.to_string())
            );
            watch.asked = Some((version, Instant::now()));
            watch.asks.relist.notify_one();
        }
    }

    /// A list that was asked for is there. If it told what its watch had `missed`, no other watch is to be trusted either:
    /// what broke one without its knowing, as a lost connection to the API server, broke others.
    pub fn answered(&self, what: &str, version: u64, missed: bool) {
        if missed {
            self.watches.values().for_each(|watch| watch.asks.reopen.notify_one());
        }
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
