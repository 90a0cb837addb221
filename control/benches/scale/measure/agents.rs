//! Simulated agents: each a stream of delta xDS over TLS, as a node's agent opens one, that answers what comes and keeps
//! almost nothing of it. Of a response only names are read, so that fifty agents cost less than the controller.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use hyper::body::Buf;
use prost::Message;
use tokio::{
    sync::{mpsc, watch},
    time::sleep,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
};
use weft_proto::{
    discovery::{DeltaDiscoveryRequest, Node},
    node::{EnrollmentReport, node_service_client::NodeServiceClient},
    type_url,
};
use weft_xds::{AuthenticatedChannel, ControlEndpoint, MAX_RESPONSE_BYTES};

const METHOD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// After a call that failed.
const RETRY: Duration = Duration::from_millis(200);
/// In the order in which an agent asks, the last of which makes its first state whole.
const TYPES: [&str; 4] = [type_url::MESH_CONFIG, type_url::NODE, type_url::ADDRESS, type_url::LOCAL_WORKLOAD];

/// What all agents saw together.
#[derive(Debug, Default)]
pub struct Seen {
    /// Responses, and their bytes before TLS.
    pub messages: AtomicU64,
    pub bytes: AtomicU64,
    pub reports: AtomicU64,
    /// Agents that have a whole first state, and what it weighed.
    pub full: AtomicUsize,
    pub first_bytes: AtomicU64,
    pub first_resources: AtomicU64,
    /// Streams that ended, which none should.
    pub ended: AtomicUsize,
    /// When each change was made, by the uid of the pod.
    made: Mutex<HashMap<String, Instant>>,
    /// How long it took, once for each change and agent.
    arrivals: Mutex<Vec<Duration>>,
}

impl Seen {
    /// A change is about to be made; its arrivals are measured from now.
    pub fn expect(&self, uid: &str) {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(uid.to_owned(), Instant::now());
    }

    pub fn arrivals(&self) -> usize {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Shortest first.
    pub fn sorted_arrivals(&self) -> Vec<Duration> {
        let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner).clone();
        arrivals.sort_unstable();
        arrivals
    }

    /// `known` are the changes that this agent has seen.
    fn arrived(&self, names: &[String], known: &mut HashSet<String>) {
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        for name in names {
            if let Some(at) = made.get(name)
                && known.insert(name.clone())
            {
                self.arrivals.lock().unwrap_or_else(PoisonError::into_inner).push(at.elapsed());
            }
        }
    }
}

/// Starts an agent. It runs until the runtime ends.
pub fn start(endpoint: &ControlEndpoint, node: String, seen: Arc<Seen>) -> Result<(), weft_xds::ConfigError> {
    let channel = weft_xds::channel(endpoint)?;
    let (enrolled, news) = watch::channel(BTreeSet::new());
    tokio::spawn(report(channel.clone(), news, seen.clone()));
    tokio::spawn(async move {
        let mut first = HashSet::new();
        // Whoever asks the API server about fifty tokens at once may be refused at first.
        while let Err(why) = stream(channel.clone(), &node, &enrolled, &seen, &mut first).await {
            if !first.is_empty() {
                eprintln!("the stream of {node} ended: {why}");
                break;
            }
            sleep(RETRY).await;
        }
        seen.ended.fetch_add(1, Ordering::Relaxed);
    });
    Ok(())
}

/// One stream to its end. `first` are the types of which anything came.
async fn stream(
    channel: AuthenticatedChannel,
    node: &str,
    enrolled: &watch::Sender<BTreeSet<String>>,
    seen: &Seen,
    first: &mut HashSet<String>,
) -> Result<(), Status> {
    let (requests, outgoing) = mpsc::channel(TYPES.len());
    for kind in TYPES {
        let node = Some(Node { id: node.to_owned(), ..Node::default() });
        let request = DeltaDiscoveryRequest { node, type_url: kind.to_owned(), ..Default::default() };
        // There is room for all of them.
        let _ = requests.try_send(request);
    }
    let mut grpc = Grpc::new(channel).max_decoding_message_size(MAX_RESPONSE_BYTES);
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let request = tonic::Request::new(ReceiverStream::new(outgoing));
    let mut responses =
        grpc.streaming(request, PathAndQuery::from_static(METHOD), Counting).await?.into_inner();
    let mut known = HashSet::new();
    while let Some(Counted { bytes, response }) = responses.message().await? {
        let Response { resources, type_url, nonce, removed } = response;
        let names: Vec<String> = resources.into_iter().map(|resource| resource.name).collect();
        seen.messages.fetch_add(1, Ordering::Relaxed);
        seen.bytes.fetch_add(bytes, Ordering::Relaxed);
        if first.insert(type_url.clone()) {
            seen.first_bytes.fetch_add(bytes, Ordering::Relaxed);
            seen.first_resources.fetch_add(names.len() as u64, Ordering::Relaxed);
            if first.len() == TYPES.len() {
                seen.full.fetch_add(1, Ordering::Relaxed);
            }
        }
        if type_url == type_url::ADDRESS {
            seen.arrived(&names, &mut known);
        } else if type_url == type_url::LOCAL_WORKLOAD {
            enrolled.send_modify(|enrolled| {
                enrolled.retain(|name| !removed.contains(name));
                enrolled.extend(names);
            });
        }
        let answer = DeltaDiscoveryRequest { type_url, response_nonce: nonce, ..Default::default() };
        if requests.send(answer).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// Tells the controller whom this node has enrolled, which is at once whoever is to be.
async fn report(channel: AuthenticatedChannel, mut news: watch::Receiver<BTreeSet<String>>, seen: Arc<Seen>) {
    let mut client = NodeServiceClient::new(channel);
    while news.changed().await.is_ok() {
        let enrolled_uids = news.borrow_and_update().iter().cloned().collect();
        seen.reports.fetch_add(1, Ordering::Relaxed);
        let outcome =
            client.report_enrollment(EnrollmentReport { enrolled_uids, ..EnrollmentReport::default() }).await;
        if outcome.is_err() {
            sleep(RETRY).await;
            news.mark_changed();
        }
    }
}

/// `DeltaDiscoveryResponse` as far as it matters here; the rest is skipped over.
#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, repeated, tag = "2")]
    resources: Vec<Resource>,
    #[prost(string, tag = "4")]
    type_url: String,
    #[prost(string, tag = "5")]
    nonce: String,
    #[prost(string, repeated, tag = "6")]
    removed: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(string, tag = "3")]
    name: String,
}

#[derive(Debug)]
struct Counted {
    bytes: u64,
    response: Response,
}

/// Reads responses as [`Response`] and says how long they were.
#[derive(Debug, Clone, Copy)]
struct Counting;

impl Codec for Counting {
    type Encode = DeltaDiscoveryRequest;
    type Decode = Counted;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Counting {
    type Item = DeltaDiscoveryRequest;
    type Error = Status;

    fn encode(&mut self, item: DeltaDiscoveryRequest, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.encode(buffer).map_err(|error| Status::internal(error.to_string()))
    }
}

impl Decoder for Counting {
    type Item = Counted;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Counted>, Status> {
        let bytes = buffer.remaining() as u64;
        let response = Response::decode(buffer).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Some(Counted { bytes, response }))
    }
}
