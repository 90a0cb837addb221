//! The client: one stream to the controller, opened again whenever it breaks, and the memory that lets it resume.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use tracing::{debug, info, warn};
use weft_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use weft_proto::discovery::{self, DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};

use crate::channel::error_chain;
use crate::order::TypeKey;
use crate::update::{Change, check};
use crate::vector::HOLD;
use crate::{
    AuthenticatedChannel, Backoff, ConfigError, ControlEndpoint, MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES,
    Update, Version, channel,
};

/// Connecting and being let in takes at most this long, and a server that is behind lets nobody in for a while.
const OPEN_TIMEOUT: Duration = HOLD.saturating_add(Duration::from_secs(10));

/// What to ask of whom.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// The controller.
    pub server: ControlEndpoint,
    /// Name of this node. For the server's information; what it believes is the token.
    pub node: String,
    /// Type URLs, all resources of each.
    pub types: Vec<&'static str>,
    /// Waits between attempts.
    pub backoff: Backoff,
    /// Told why the last stream ended, or was not opened.
    pub trouble: watch::Sender<String>,
}

/// What is known of one type, over all streams.
struct Known {
    type_url: &'static str,
    /// Version of every resource the consumer accepted.
    versions: HashMap<String, Version>,
    /// Whether the consumer has accepted an update.
    synced: bool,
}

/// How a stream ended.
enum Ended {
    /// The consumer is gone: no more streams.
    Consumer,
    /// The connection or the server; another attempt follows.
    Broken(Status),
}

/// Keeps the consumer of `updates` in sync with the controller, for as long as there is one; `connected` says whether a
/// stream is open. Returns when the receiver of `updates` is dropped, or at once if the settings are unusable.
///
/// Updates come one at a time in the order of the stream: the next follows the answer to the one before, also over
/// reconnects.
pub async fn run(
    config: ClientConfig,
    updates: mpsc::Sender<Update>,
    connected: watch::Sender<bool>,
) -> Result<(), ConfigError> {
    let mut session = Session::new(&config, updates, connected);
    let mut failures = 0;
    loop {
        let started = Instant::now();
        let mut productive = false;
        // A connection of its own for each stream: the next one may lead to another replica, which a connection that is
        // kept open never would.
        let ended = session.stream(channel(&config.server)?, &mut productive).await;
        session.connected.send_replace(false);
        let status = match ended {
            Ended::Consumer => return Ok(()),
            Ended::Broken(status) => status,
        };
        // A server that takes streams only to end them at once is as good as none.
        failures = if productive || started.elapsed() > config.backoff.max { 1 } else { failures + 1 };
        let delay = config.backoff.delay(failures);
        let server = &config.server.address;
        let reason = describe(&status);
        config.trouble.send_replace(reason.clone());
        if status.code() == Code::Unauthenticated || status.code() == Code::PermissionDenied {
            warn!(
                server,
                reason,
                ?delay,
                "the controller does not let this node in; is the join token right?"
            );
        } else {
            info!(server, reason, ?delay, "not connected to the controller; trying again");
        }
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = session.updates.closed() => return Ok(()),
        }
    }
}

struct Session {
    node: String,
    known: Vec<Known>,
    updates: mpsc::Sender<Update>,
    connected: watch::Sender<bool>,
}

impl Session {
    fn new(config: &ClientConfig, updates: mpsc::Sender<Update>, connected: watch::Sender<bool>) -> Session {
        let mut types = config.types.clone();
        // The server answers requests as they come, so the order of the answers is the order of the questions.
        types.sort_by_key(|type_url| TypeKey::new(type_url));
        types.dedup();
        let known =
            types.into_iter().map(|type_url| Known { type_url, versions: HashMap::new(), synced: false });
        Session { node: config.node.clone(), known: known.collect(), updates, connected }
    }

    /// One stream from opening to end. Sets `productive` when an update was accepted.
    async fn stream(&mut self, channel: AuthenticatedChannel, productive: &mut bool) -> Ended {
        let first = self.first_requests();
        let (requests, outgoing) = mpsc::channel(first.len() + 1);
        for request in first {
            // There is room for all of them.
            let _ = requests.try_send(request);
        }
        let mut client = AggregatedDiscoveryServiceClient::new(channel)
            .max_decoding_message_size(MAX_RESPONSE_BYTES)
            .max_encoding_message_size(MAX_REQUEST_BYTES);
        let opening = client.delta_aggregated_resources(ReceiverStream::new(outgoing));
        let opened = tokio::select! {
            opened = tokio::time::timeout(OPEN_TIMEOUT, opening) => opened,
            () = self.updates.closed() => return Ended::Consumer,
        };
        let mut responses = match opened {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return Ended::Broken(status),
            Err(_) => return Ended::Broken(Status::deadline_exceeded("the controller did not answer")),
        };
        info!(node = self.node, "connected to the controller");
        self.connected.send_replace(true);
        let mut early = Early { received: VecDeque::new(), room: self.known.len() };
        loop {
            let received = match early.received.pop_front() {
                Some(received) => received,
                None => tokio::select! {
                    received = responses.message() => received,
                    () = self.updates.closed() => return Ended::Consumer,
                },
            };
            let response = match received {
                Ok(Some(response)) => response,
                Ok(None) => return Ended::Broken(Status::unavailable("the controller ended the stream")),
                Err(status) => return Ended::Broken(status),
            };
            let answer = match self.deliver(response, &mut responses, &mut early).await {
                Ok(answer) => answer,
                Err(ended) => return ended,
            };
            *productive |= answer.error_detail.is_none();
            if requests.send(answer).await.is_err() {
                debug!("the stream ended before the answer");
            }
        }
    }

    /// Hands one response to the consumer and waits for its verdict. Meanwhile the stream is watched, so that its end
    /// is known at once; what comes from it is kept in `early` and delivered in its turn, also if the stream has ended
    /// by then: it is news all the same, and the controller may be away for long.
    async fn deliver(
        &mut self,
        response: DeltaDiscoveryResponse,
        responses: &mut Streaming<DeltaDiscoveryResponse>,
        early: &mut Early,
    ) -> Result<DeltaDiscoveryRequest, Ended> {
        let Some(known) = self.known.iter_mut().find(|known| known.type_url == response.type_url) else {
            let reason = format!("the controller sent type {:?}, which nobody asked for", response.type_url);
            return Err(Ended::Broken(Status::internal(reason)));
        };
        let nonce = response.nonce.clone();
        let verdict = match check(response) {
            Err(why) => Err(why),
            Ok(change) => {
                let memory = known.remembering(&change);
                let (update, mut verdict) = change.into_update(known.type_url, !known.synced);
                if self.updates.send(update).await.is_err() {
                    return Err(Ended::Consumer);
                }
                let verdict = await_verdict(&mut verdict, responses, early, &self.connected).await;
                if verdict.is_ok() {
                    known.remember(memory);
                }
                verdict
            }
        };
        if let Err(why) = &verdict {
            warn!(kind = known.type_url, why, "rejecting an update from the controller");
        }
        Ok(DeltaDiscoveryRequest {
            type_url: known.type_url.to_owned(),
            response_nonce: nonce,
            error_detail: verdict.err().map(|message| discovery::Status {
                code: Code::InvalidArgument.into(),
                message,
                details: Vec::new(),
            }),
            ..Default::default()
        })
    }

    fn first_requests(&self) -> Vec<DeltaDiscoveryRequest> {
        let mut node = Some(Node { id: self.node.clone(), ..Default::default() });
        let requests = self.known.iter().map(|known| DeltaDiscoveryRequest {
            node: node.take(),
            type_url: known.type_url.to_owned(),
            initial_resource_versions: known
                .versions
                .iter()
                .map(|(name, version)| (name.clone(), version.as_str().to_owned()))
                .collect(),
            ..Default::default()
        });
        requests.collect()
    }
}

/// Names to forget and versions to keep once the consumer accepts.
type Memory = (Vec<String>, Vec<(String, Version)>);

impl Known {
    fn remembering(&self, change: &Change) -> Memory {
        let upserts = change.upserts.iter().map(|resource| (resource.name.clone(), resource.version.clone()));
        (change.removed.clone(), upserts.collect())
    }

    fn remember(&mut self, (removed, upserts): Memory) {
        self.synced = true;
        for name in removed {
            self.versions.remove(&name);
        }
        self.versions.extend(upserts);
    }
}

async fn await_verdict(
    verdict: &mut oneshot::Receiver<Result<(), String>>,
    responses: &mut Streaming<DeltaDiscoveryResponse>,
    early: &mut Early,
    connected: &watch::Sender<bool>,
) -> Result<(), String> {
    let unanswered = |_| Err("the update was dropped without an answer".to_owned());
    while early.has_room() {
        tokio::select! {
            biased;
            verdict = &mut *verdict => return verdict.unwrap_or_else(unanswered),
            received = responses.message() => {
                if !matches!(received, Ok(Some(_))) {
                    connected.send_replace(false);
                }
                early.received.push_back(received);
            }
        }
    }
    verdict.await.unwrap_or_else(unanswered)
}

/// What came from the stream while the consumer was busy.
struct Early {
    received: VecDeque<Result<Option<DeltaDiscoveryResponse>, Status>>,
    /// A server has at most one response of each type unanswered; one that sends more is not read.
    room: usize,
}

impl Early {
    fn has_room(&self) -> bool {
        self.received.len() < self.room && self.received.back().is_none_or(|last| matches!(last, Ok(Some(_))))
    }
}

fn describe(status: &Status) -> String {
    match std::error::Error::source(status) {
        Some(source) => format!("{}: {}", status.message(), error_chain(source)),
        None => status.message().to_owned(),
    }
}
