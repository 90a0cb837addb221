//! Listing a kind and watching it, as the API server's own protocol has it: a list is complete as of its resourceVersion,
//! a watch tells in order what changed since, and goes on after a break where it was. kube's own `watcher` does the same and
//! keeps to itself how far it has got, which is what matters here.
//!
//! resourceVersions of one kind are compared as numbers (KEP-5504), and a kind whose versions are none cannot be followed.
//! They never go back: a list that is older than what was seen before comes from a store that was restored, and is refused.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream::BoxStream};
use kube::{
    Api,
    api::{DynamicObject, ListParams, WatchEvent, WatchParams},
};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

use crate::cluster::{self, REQUEST_TIMEOUT, WATCH_SECONDS};

/// Objects asked for at a time, so that neither side holds a long list twice.
const PAGE: u32 = 500;
/// A watch that should have ended by then is dead.
const SILENCE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 5);
/// Pauses before something that failed is tried again. Not longer: after a restart of the API server that would be time in
/// which pods cannot start.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(2);

/// What comes next of a kind. Versions say up to where everything has been told.
pub enum Next {
    /// A list begins; what it does not name by its end is gone.
    Begin,
    Listed(DynamicObject),
    /// `asked` if this list was begun because somebody asked for it.
    End {
        version: u64,
        asked: bool,
    },
    Applied(DynamicObject, u64),
    Deleted(DynamicObject, u64),
    /// Nothing else happened up to there.
    Nothing(u64),
}

/// Why it does not go on. It is tried again with the next call.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// There is no such kind.
    #[error("the API server does not know it")]
    Missing,
    #[error("{}", cluster::words(.0))]
    Request(#[from] kube::Error),
    /// A watch that had begun was told so.
    #[error("{message}")]
    Told { message: String, code: u16 },
    #[error("no answer within {0:?}")]
    Late(Duration),
    #[error("resourceVersion {0:?} is not a number")]
    NoVersion(String),
    #[error(
        "the API server's state is as of resourceVersion {now}, and {seen} was seen before: was it restored from a back-up? \
         See docs/operate.md, After a restored back-up"
    )]
    Back { now: u64, seen: u64 },
}

impl Failure {
    /// As [`cluster::passes`] has it.
    pub fn passes(&self) -> bool {
        match self {
            Self::Request(error) => cluster::passes(cluster::code(error)),
            Self::Told { code, .. } => cluster::passes(*code),
            Self::Missing | Self::Late(_) | Self::NoVersion(_) | Self::Back { .. } => false,
        }
    }
}

/// What may be asked of it although its watch seems to work.
#[derive(Default)]
pub struct Asks {
    /// A list.
    pub relist: Notify,
    /// To take up the watch where it is, over another connection.
    pub reopen: Notify,
}

/// One kind, followed from now on.
pub struct ListWatch {
    api: Api<DynamicObject>,
    asks: Arc<Asks>,
    state: State,
    /// The list under way was asked for.
    asked: bool,
    /// Up to where everything has been told, once there was a list.
    seen: u64,
    /// One after the other, without a watch that works in between; and whether the last thing was one.
    failures: u32,
    failed: bool,
}

enum State {
    Unlisted,
    /// The rest of a page, and what asks for the next or ends the list.
    Listing {
        page: std::vec::IntoIter<DynamicObject>,
        more: Option<String>,
        version: u64,
    },
    Listed,
    Watching(BoxStream<'static, kube::Result<WatchEvent<DynamicObject>>>),
}

impl ListWatch {
    pub fn new(api: Api<DynamicObject>, asks: Arc<Asks>) -> Self {
        Self { api, asks, state: State::Unlisted, asked: false, seen: 0, failures: 0, failed: false }
    }

    /// What comes next, for ever. After a failure it waits first.
    pub async fn next(&mut self) -> Result<Next, Failure> {
        if self.failed {
            sleep((FIRST_RETRY * (1 << self.failures.min(8))).min(LAST_RETRY)).await;
        }
        let next = self.advance().await;
        self.failed = next.is_err();
        self.failures += u32::from(self.failed);
        next
    }

    async fn advance(&mut self) -> Result<Next, Failure> {
        loop {
            // Whatever fails below is begun anew, but a watch that broke is taken up where it was.
            match std::mem::replace(&mut self.state, State::Unlisted) {
                State::Unlisted => {
                    self.state = self.page(None).await?;
                    return Ok(Next::Begin);
                }
                State::Listing { mut page, more, version } => {
                    if let Some(object) = page.next() {
                        self.state = State::Listing { page, more, version };
                        return Ok(Next::Listed(object));
                    }
                    if more.is_some() {
                        self.state = self.page(more).await?;
                        continue;
                    }
                    (self.state, self.seen) = (State::Listed, version);
                    return Ok(Next::End { version, asked: std::mem::take(&mut self.asked) });
                }
                State::Listed => {
                    let params = WatchParams::default().timeout(WATCH_SECONDS);
                    let from = self.seen.to_string();
                    self.state = match timeout(self.patience(), self.api.watch(&params, &from)).await {
                        Ok(Ok(events)) => {
                            self.failures = 0;
                            State::Watching(events.boxed())
                        }
                        // Too old to go on.
                        Ok(Err(kube::Error::Api(status))) if status.code == 410 => continue,
                        Ok(Err(error)) => {
                            // This may mean that it is newer than what there is, which a list tells.
                            if cluster::code(&error) != 504 {
                                self.state = State::Listed;
                            }
                            return Err(error.into());
                        }
                        Err(_) => {
                            self.state = State::Listed;
                            return Err(self.late());
                        }
                    };
                }
                State::Watching(mut events) => {
                    let event = tokio::select! {
                        event = timeout(SILENCE, events.next()) => event,
                        () = self.asks.relist.notified() => {
                            self.asked = true;
                            continue;
                        }
                        () = self.asks.reopen.notified() => {
                            self.state = State::Listed;
                            continue;
                        }
                    };
                    let told = match event {
                        Ok(Some(Ok(event))) => self.told(event)?,
                        Ok(Some(Err(error))) => {
                            self.state = State::Listed;
                            return Err(error.into());
                        }
                        Ok(None) | Err(_) => {
                            self.state = State::Listed;
                            continue;
                        }
                    };
                    if let Some(next) = told {
                        self.state = State::Watching(events);
                        return Ok(next);
                    }
                }
            }
        }
    }

    /// The first page of a list, or the next one. They are all as of one version.
    async fn page(&mut self, more: Option<String>) -> Result<State, Failure> {
        let mut params = ListParams::default().limit(PAGE);
        params.continue_token = more;
        let list = match timeout(self.patience(), self.api.list(&params)).await {
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => return Err(Failure::Missing),
            Ok(list) => list?,
            Err(_) => return Err(self.late()),
        };
        let version = number(list.metadata.resource_version.as_deref())?;
        if version < self.seen {
            return Err(Failure::Back { now: version, seen: self.seen });
        }
        let more = list.metadata.continue_.filter(|token| !token.is_empty());
        Ok(State::Listing { page: list.items.into_iter(), more, version })
    }

    /// What does not come within this time is asked for anew: its connection is dead, most likely, and the next attempt is
    /// over another. After failures it gets longer, for an API server that is slow.
    fn patience(&self) -> Duration {
        REQUEST_TIMEOUT * (1 << self.failures.min(3))
    }

    fn late(&self) -> Failure {
        Failure::Late(self.patience())
    }

    /// What an event says; None if a new list has to.
    fn told(&mut self, event: WatchEvent<DynamicObject>) -> Result<Option<Next>, Failure> {
        let next = match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                let version = number(object.metadata.resource_version.as_deref())?;
                Next::Applied(object, version)
            }
            WatchEvent::Deleted(object) => {
                let version = number(object.metadata.resource_version.as_deref())?;
                Next::Deleted(object, version)
            }
            WatchEvent::Bookmark(bookmark) => {
                Next::Nothing(number(Some(&bookmark.metadata.resource_version))?)
            }
            // Too old to go on.
            WatchEvent::Error(status) if status.code == 410 => return Ok(None),
            WatchEvent::Error(status) => {
                return Err(Failure::Told { message: status.message, code: status.code });
            }
        };
        if let Next::Applied(_, now) | Next::Deleted(_, now) | Next::Nothing(now) = next {
            if now < self.seen {
                return Err(Failure::Back { now, seen: self.seen });
            }
            self.seen = now;
        }
        Ok(Some(next))
    }
}

fn number(version: Option<&str>) -> Result<u64, Failure> {
    let version = version.unwrap_or_default();
    version.parse().map_err(|_| Failure::NoVersion(version.to_owned()))
}
