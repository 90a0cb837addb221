//! A stand-in for an API server, in memory, that costs next to nothing beside the controller it feeds: every object is
//! kept as the text it is sent as. It pages its lists, bounds the history of its watches and sends bookmarks as a real
//! one does, because those decide what a start costs the controller. It knows no permissions and no errors; the one in
//! `tests/support/api.rs` is for those.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    convert::Infallible,
    net::SocketAddr,
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::StreamExt;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Method, Request, Response,
    body::{Bytes, Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc, time::sleep};
use tokio_stream::wrappers::UnboundedReceiverStream;

type Body = BoxBody<Bytes, Infallible>;
/// Plural, and namespace and name.
type Key = (String, String);

/// Watches that ask for more than this many events ago must list again.
const HISTORY: usize = 10_000;
/// What the one account that calls weft-control is called, and what every token is taken for.
const AGENT: &str = "system:serviceaccount:weft-system:weft-agent";

#[derive(Debug, Default)]
struct World {
    version: u64,
    objects: BTreeMap<Key, Bytes>,
    watches: Vec<(String, mpsc::UnboundedSender<Bytes>)>,
    /// Version, plural and event.
    history: VecDeque<(u64, String, Bytes)>,
    /// Watches from before are too old to go on.
    compacted: u64,
    /// NodeEnrollments that the controller wrote, and conditions of Pods.
    writes: u64,
    conditions: u64,
}

/// Cheap to clone: every clone is the same server.
#[derive(Debug, Clone, Default)]
pub struct Api(Arc<Mutex<World>>);

impl Api {
    /// Serves on a port of its own for as long as the runtime runs.
    pub async fn serve(&self) -> std::io::Result<SocketAddr> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let api = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                let api = api.clone();
                let service = service_fn(move |request| {
                    let api = api.clone();
                    async move { Ok::<_, Infallible>(api.answer(request).await) }
                });
                let http = hyper::server::conn::http1::Builder::new();
                tokio::spawn(http.serve_connection(TokioIo::new(stream), service));
            }
        });
        Ok(address)
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes or changes an object, of which `render` gives the text with the given resourceVersion.
    pub fn put(&self, plural: &str, name: &str, render: impl FnOnce(u64) -> String) {
        let mut world = self.world();
        let text = render(world.version + 1);
        world.put(plural, name, text.into());
    }

    pub fn delete(&self, plural: &str, name: &str) {
        let mut world = self.world();
        if let Some(object) = world.objects.remove(&key(plural, name)) {
            world.version += 1;
            let object = with_version(&object, world.version);
            world.tell(plural, "DELETED", &object);
        }
    }

    /// NodeEnrollments that the controller wrote so far.
    pub fn writes(&self) -> u64 {
        self.world().writes
    }

    /// Conditions that it wrote on Pods so far.
    pub fn conditions(&self) -> u64 {
        self.world().conditions
    }

    /// An object's text.
    pub fn get(&self, plural: &str, name: &str) -> Option<Bytes> {
        self.world().objects.get(&key(plural, name)).cloned()
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let query: HashMap<&str, String> = parts
            .uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(name, value)| (name, value.replace("%2F", "/").replace("%3D", "=")))
            .collect();
        // /api/v1/... or /apis/GROUP/VERSION/...
        let path: Vec<&str> = parts.uri.path().split('/').filter(|part| !part.is_empty()).collect();
        let rest = path.get(if path.first() == Some(&"api") { 2 } else { 3 }..).unwrap_or_default();
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some(*namespace), rest),
            rest => (None, rest),
        };
        let (Some(plural), name) = (rest.first(), rest.get(1)) else { return refusal(404, "NotFound") };
        let full = |name: &str| namespace.map_or(name.to_owned(), |namespace| format!("{namespace}/{name}"));
        match (&parts.method, name) {
            (&Method::POST, None) if *plural == "tokenreviews" => whole(201, review(&body).to_string()),
            (&Method::PATCH, Some(name)) => self.patch(plural, &full(name), &body),
            (&Method::DELETE, Some(name)) => {
                self.delete(plural, &full(name));
                whole(200, json!({"kind": "Status", "apiVersion": "v1", "status": "Success"}).to_string())
            }
            (&Method::POST | &Method::PUT, _) => {
                let name = name.map_or_else(|| name_of(&body), |name| (*name).to_owned());
                self.write(&parts.method, plural, &full(&name), &body)
            }
            (_, Some(name)) => match self.get(plural, &full(name)) {
                Some(object) => whole(200, object),
                None => refusal(404, "NotFound"),
            },
            (_, None) if query.contains_key("watch") => self.watch(plural, &query),
            (_, None) => self.world().list(plural, &query),
        }
    }

    /// A watch ends after its time with a bookmark, so that the next goes on from there however quiet the kind is.
    fn watch(&self, plural: &str, query: &HashMap<&str, String>) -> Response<Body> {
        let number = |name: &str| query.get(name).and_then(|value| value.parse::<u64>().ok());
        let (events, response) = self.world().watch(plural, number("resourceVersion").unwrap_or(0));
        let (api, lasts) = (self.clone(), Duration::from_secs(number("timeoutSeconds").unwrap_or(300)));
        tokio::spawn(async move {
            sleep(lasts).await;
            let mut world = api.world();
            let metadata = json!({"resourceVersion": world.version.to_string()});
            let bookmark = json!({"kind": "Any", "apiVersion": "v1", "metadata": metadata});
            // Nobody may listen any more.
            let _ = events.send(format!("{}\n", json!({"type": "BOOKMARK", "object": bookmark})).into());
            world.watches.retain(|(_, watch)| !watch.same_channel(&events));
        });
        response
    }

    fn write(&self, method: &Method, plural: &str, name: &str, body: &[u8]) -> Response<Body> {
        let mut world = self.world();
        let known = world.objects.get(&key(plural, name));
        let Ok(mut object) = serde_json::from_slice::<Value>(body) else { return refusal(400, "BadRequest") };
        match (method, known) {
            (&Method::POST, Some(_)) => return refusal(409, "AlreadyExists"),
            (&Method::POST, None) => {}
            (_, None) => return refusal(404, "NotFound"),
            (_, Some(known)) => {
                let known: Value = serde_json::from_slice(known).unwrap_or_default();
                let expected = &object["metadata"]["resourceVersion"];
                if !expected.is_null() && *expected != known["metadata"]["resourceVersion"] {
                    return refusal(409, "Conflict");
                }
            }
        }
        object["metadata"]["resourceVersion"] = json!((world.version + 1).to_string());
        let text = Bytes::from(object.to_string());
        world.put(plural, name, text.clone());
        world.writes += u64::from(plural == "nodeenrollments");
        whole(if method == Method::POST { 201 } else { 200 }, text)
    }

    /// A patch of conditions, which merge by their type.
    fn patch(&self, plural: &str, name: &str, body: &[u8]) -> Response<Body> {
        let mut world = self.world();
        let Some(known) = world.objects.get(&key(plural, name)) else { return refusal(404, "NotFound") };
        let mut object: Value = serde_json::from_slice(known).unwrap_or_default();
        let patch: Value = serde_json::from_slice(body).unwrap_or_default();
        let Some(new) = patch["status"]["conditions"].as_array() else { return refusal(400, "BadRequest") };
        if patch["metadata"]["uid"] != object["metadata"]["uid"] {
            return refusal(409, "Conflict");
        }
        let mut conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.retain(|old| new.iter().all(|new| new["type"] != old["type"]));
        conditions.extend(new.iter().cloned());
        object["status"]["conditions"] = conditions.into();
        object["metadata"]["resourceVersion"] = json!((world.version + 1).to_string());
        let text = Bytes::from(object.to_string());
        world.put(plural, name, text.clone());
        world.conditions += 1;
        whole(200, text)
    }
}

impl World {
    fn put(&mut self, plural: &str, name: &str, text: Bytes) {
        self.version += 1;
        let known = self.objects.insert(key(plural, name), text.clone());
        self.tell(plural, if known.is_some() { "MODIFIED" } else { "ADDED" }, &text);
    }

    fn tell(&mut self, plural: &str, what: &str, object: &[u8]) {
        let start = format!("{{\"type\":\"{what}\",\"object\":");
        let event = Bytes::from([start.as_bytes(), object, b"}\n"].concat());
        self.watches.retain(|(of, watch)| of != plural || watch.send(event.clone()).is_ok());
        self.history.push_back((self.version, plural.to_owned(), event));
        if self.history.len() > HISTORY
            && let Some((version, _, _)) = self.history.pop_front()
        {
            self.compacted = version;
        }
    }

    /// A page of a list, in the order of names.
    fn list(&self, plural: &str, query: &HashMap<&str, String>) -> Response<Body> {
        let limit: usize = query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
        let begin = match query.get("continue") {
            Some(last) => Bound::Excluded(key(plural, last)),
            None => Bound::Included(key(plural, "")),
        };
        let mut of_kind =
            self.objects.range((begin, Bound::Unbounded)).take_while(|((of, _), _)| of == plural);
        let page: Vec<_> = of_kind.by_ref().take(limit).collect();
        let more =
            if of_kind.next().is_some() { page.last().map(|((_, name), _)| name.as_str()) } else { None };
        let metadata =
            json!({"resourceVersion": self.version.to_string(), "continue": more.unwrap_or_default()});
        let start = format!("{{\"kind\":\"List\",\"apiVersion\":\"v1\",\"metadata\":{metadata},\"items\":[");
        let mut text = start.into_bytes();
        for (index, (_, object)) in page.into_iter().enumerate() {
            if index > 0 {
                text.push(b',');
            }
            text.extend_from_slice(object);
        }
        text.extend_from_slice(b"]}");
        whole(200, text)
    }

    fn watch(&mut self, plural: &str, from: u64) -> (mpsc::UnboundedSender<Bytes>, Response<Body>) {
        let (sender, events) = mpsc::unbounded_channel();
        if from < self.compacted {
            let status = json!({"kind": "Status", "apiVersion": "v1", "code": 410, "reason": "Expired",
                "message": "too old resource version"});
            let _ = sender.send(format!("{}\n", json!({"type": "ERROR", "object": status})).into());
        } else {
            for (_, _, event) in self.history.iter().filter(|(at, of, _)| *at > from && of == plural) {
                let _ = sender.send(event.clone());
            }
            self.watches.push((plural.to_owned(), sender.clone()));
        }
        let frames = UnboundedReceiverStream::new(events).map(|event| Ok(Frame::data(event)));
        (sender, Response::new(BodyExt::boxed(StreamBody::new(frames))))
    }
}

/// A deleted object is told with the version of its deletion.
fn with_version(object: &[u8], version: u64) -> Vec<u8> {
    const FIELD: &str = "\"resourceVersion\":\"";
    let text = String::from_utf8_lossy(object);
    let Some((before, after)) = text.split_once(FIELD) else { return object.to_vec() };
    let rest = after.trim_start_matches(|c: char| c.is_ascii_digit());
    format!("{before}{FIELD}{version}{rest}").into_bytes()
}

fn key(plural: &str, name: &str) -> Key {
    (plural.to_owned(), name.to_owned())
}

fn name_of(body: &[u8]) -> String {
    let object: Value = serde_json::from_slice(body).unwrap_or_default();
    object["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}

/// Every token is an agent's, and says of which node: `weft.NODE.bench`.
fn review(body: &[u8]) -> Value {
    let mut review: Value = serde_json::from_slice(body).unwrap_or_default();
    let node = review["spec"]["token"].as_str().and_then(|token| token.split('.').nth(1)).map(str::to_owned);
    review["status"] = json!({"authenticated": true, "audiences": ["weft"], "user": {
        "username": AGENT,
        "extra": {"authentication.kubernetes.io/node-name": [node], "authentication.kubernetes.io/pod-uid": ["1"]}
    }});
    review
}

fn whole(status: u16, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(body.into()).boxed());
    *response.status_mut() = hyper::StatusCode::from_u16(status).unwrap_or_default();
    let json = hyper::header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, json);
    response
}

fn refusal(status: u16, reason: &str) -> Response<Body> {
    let text = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "reason": reason,
        "message": reason});
    whole(status, text.to_string())
}
