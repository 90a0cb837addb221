//! An API server in memory, as far as the controller asks one: lists, watches that can be broken off or told that they
//! are too old, objects that are made and replaced under their version, reviews of tokens, and refusals on demand.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::{Arc, Mutex},
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
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::UnboundedReceiverStream;

type Body = BoxBody<Bytes, Infallible>;
/// The kinds that are held back.
type Held = watch::Receiver<BTreeSet<&'static str>>;

#[derive(Default)]
struct World {
    version: u64,
    /// By plural, namespace and name.
    objects: BTreeMap<(String, String, String), Value>,
    watches: Vec<(String, mpsc::UnboundedSender<Value>)>,
    /// What happened, for watches that start a little later: version, plural, event.
    history: Vec<(u64, String, Value)>,
    /// Watches from before are too old to go on.
    compacted: u64,
    forbidden: BTreeSet<String>,
    /// Nobody is answered any more.
    silent: bool,
    missing: BTreeSet<String>,
    /// Token to the status of its review.
    tokens: BTreeMap<String, Value>,
    reviews: usize,
    /// Of Pods' status.
    patches: Vec<Value>,
}

/// Another way to the same server, on which lists and watches of some kinds can be held back, so that whoever comes by it
/// falls behind.
pub struct Door {
    pub address: std::net::SocketAddr,
    held: watch::Sender<BTreeSet<&'static str>>,
}

impl Door {
    /// What happens to these kinds from now on is not told here, until it may be.
    pub fn hold(&self, kinds: &[&'static str]) {
        self.held.send_replace(kinds.iter().copied().collect());
    }
}

/// Every kind that is watched.
pub const KINDS: [&str; 8] = [
    "namespaces",
    "pods",
    "services",
    "endpointslices",
    "nodes",
    "servicecidrs",
    "authorizationpolicies",
    "nodeenrollments",
];

/// Cheap to clone: every clone is the same server.
#[derive(Clone)]
pub struct Api {
    world: Arc<Mutex<World>>,
    pub address: std::net::SocketAddr,
}

impl Api {
    /// Serves on a thread of its own, since tests wait for the program in ways that would keep it waiting.
    pub fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let api = Self { world: Arc::default(), address: listener.local_addr().unwrap() };
        api.serve_at(listener, watch::channel(BTreeSet::new()).1);
        api
    }

    pub fn door(&self) -> Door {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (held, receiver) = watch::channel(BTreeSet::new());
        let door = Door { address: listener.local_addr().unwrap(), held };
        self.serve_at(listener, receiver);
        door
    }

    fn serve_at(&self, listener: std::net::TcpListener, held: Held) {
        listener.set_nonblocking(true).unwrap();
        let server = self.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(server.serve(listener, held));
        });
    }

    async fn serve(self, listener: std::net::TcpListener, held: Held) {
        let listener = TcpListener::from_std(listener).unwrap();
        while let Ok((stream, _)) = listener.accept().await {
            let (server, held) = (self.clone(), held.clone());
            let service = service_fn(move |request| {
                let (server, held) = (server.clone(), held.clone());
                async move { Ok::<_, Infallible>(server.answer(request, held).await) }
            });
            tokio::spawn(
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
            );
        }
    }

    fn with<T>(&self, act: impl FnOnce(&mut World) -> T) -> T {
        act(&mut self.world.lock().unwrap())
    }

    /// Makes or changes an object, as anybody might.
    pub fn put(&self, plural: &str, object: Value) {
        self.with(|world| world.put(plural, object));
    }

    pub fn delete(&self, plural: &str, namespace: &str, name: &str) {
        self.with(|world| {
            world.delete(&(plural.to_owned(), namespace.to_owned(), name.to_owned()));
        });
    }

    pub fn get(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        let key = (plural.to_owned(), namespace.to_owned(), name.to_owned());
        self.with(|world| world.objects.get(&key).cloned())
    }

    /// Ends every watch; what changes from now until they are back is not told, and they are too old to go on.
    pub fn lose(&self, change: impl FnOnce(&Api)) {
        self.with(|world| world.watches.clear());
        change(self);
        self.with(|world| {
            world.version += 1;
            world.compacted = world.version;
        });
    }

    pub fn forbid(&self, plural: &str, forbidden: bool) {
        self.with(|world| match forbidden {
            true => drop(world.forbidden.insert(plural.to_owned())),
            false => drop(world.forbidden.remove(plural)),
        });
    }

    /// Answers nobody any more, or again; watches that are open tell nothing.
    pub fn silence(&self, silent: bool) {
        self.with(|world| {
            world.silent = silent;
            world.watches.clear();
        });
    }

    /// There is no such kind.
    pub fn lack(&self, plural: &str, missing: bool) {
        self.with(|world| match missing {
            true => drop(world.missing.insert(plural.to_owned())),
            false => drop(world.missing.remove(plural)),
        });
    }

    /// What a review of `token` answers.
    pub fn token(&self, token: &str, status: Value) {
        self.with(|world| world.tokens.insert(token.to_owned(), status));
    }

    pub fn reviews(&self) -> usize {
        self.with(|world| world.reviews)
    }

    /// What was written on Pods' status, one after the other.
    pub fn patches(&self) -> Vec<Value> {
        self.with(|world| world.patches.clone())
    }

    async fn answer(&self, request: Request<Incoming>, mut held: Held) -> Response<Body> {
        while self.with(|world| world.silent) {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        let (parts, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let query: BTreeMap<&str, &str> =
            parts.uri.query().unwrap_or("").split('&').filter_map(|pair| pair.split_once('=')).collect();
        let path: Vec<&str> = parts.uri.path().split('/').filter(|part| !part.is_empty()).collect();
        let rest = if path[0] == "api" { &path[2..] } else { &path[3..] };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
            rest => ("", rest),
        };
        let plural = rest[0];
        let name = rest.get(1).copied();
        if parts.method == Method::GET && name.is_none() && !query.contains_key("watch") {
            let _ = held.wait_for(|held| !held.contains(plural)).await;
        }
        self.with(|world| {
            if world.missing.contains(plural) {
                return refusal(404, "the server could not find the requested resource");
            }
            let subresource = rest.get(2).map(|subresource| format!("{plural}/{subresource}"));
            let what = subresource.as_deref().unwrap_or(plural);
            if world.forbidden.contains(what) {
                return refusal(403, &format!("{what} is forbidden"));
            }
            match (&parts.method, name) {
                (&Method::POST, None) if plural == "tokenreviews" => {
                    world.reviews += 1;
                    let token = body["spec"]["token"].as_str().unwrap().to_owned();
                    assert_eq!(body["spec"]["audiences"], json!(["weft"]));
                    let mut review = body;
                    review["status"] = world.tokens.get(&token).cloned().unwrap_or(json!({}));
                    whole(201, &review)
                }
                (&Method::POST, None) => {
                    let key = (plural.to_owned(), namespace.to_owned(), text(&body["metadata"]["name"]));
                    if world.objects.contains_key(&key) {
                        return refusal(409, "already exists");
                    }
                    whole(201, &world.put_in(plural, namespace, body))
                }
                (&Method::PUT, Some(name)) => {
                    let key = (plural.to_owned(), namespace.to_owned(), name.to_owned());
                    let Some(known) = world.objects.get(&key) else { return refusal(404, "not found") };
                    let version = &body["metadata"]["resourceVersion"];
                    if !version.is_null() && *version != known["metadata"]["resourceVersion"] {
                        return refusal(409, "the object has been modified");
                    }
                    whole(200, &world.put_in(plural, namespace, body))
                }
                (&Method::PATCH, Some(name)) => {
                    assert_eq!(what, "pods/status");
                    assert_eq!(parts.headers["content-type"], "application/strategic-merge-patch+json");
                    world.patch(namespace, name, body)
                }
                (&Method::DELETE, Some(name)) => {
                    let key = (plural.to_owned(), namespace.to_owned(), name.to_owned());
                    let Some(known) = world.objects.get(&key) else { return refusal(404, "not found") };
                    let version = &body["preconditions"]["resourceVersion"];
                    if !version.is_null() && *version != known["metadata"]["resourceVersion"] {
                        return refusal(409, "the object has been modified");
                    }
                    whole(200, &world.delete(&key))
                }
                (_, Some(name)) => {
                    let key = (plural.to_owned(), namespace.to_owned(), name.to_owned());
                    match world.objects.get(&key) {
                        Some(object) => whole(200, object),
                        None => refusal(404, "not found"),
                    }
                }
                (_, None) if query.contains_key("watch") => {
                    world.watch(plural, query.get("resourceVersion").copied(), held.clone())
                }
                (_, None) => {
                    let items: Vec<&Value> = world
                        .objects
                        .iter()
                        .filter(|((p, _, _), _)| p == plural)
                        .map(|(_, object)| object)
                        .collect();
                    let metadata = json!({"resourceVersion": world.version.to_string()});
                    whole(
                        200,
                        &json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items}),
                    )
                }
            }
        })
    }
}

impl World {
    fn put(&mut self, plural: &str, object: Value) {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or("").to_owned();
        self.put_in(plural, &namespace, object);
    }

    fn put_in(&mut self, plural: &str, namespace: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        if !namespace.is_empty() {
            object["metadata"]["namespace"] = json!(namespace);
        }
        let key = (plural.to_owned(), namespace.to_owned(), text(&object["metadata"]["name"]));
        let known = self.objects.insert(key, object.clone());
        self.tell(plural, if known.is_some() { "MODIFIED" } else { "ADDED" }, &object);
        object
    }

    /// A patch of a Pod's conditions, which merge by their type.
    fn patch(&mut self, namespace: &str, name: &str, patch: Value) -> Response<Body> {
        let key = ("pods".to_owned(), namespace.to_owned(), name.to_owned());
        let Some(mut pod) = self.objects.get(&key).cloned() else { return refusal(404, "not found") };
        if pod["metadata"]["uid"] != patch["metadata"]["uid"] {
            return refusal(409, "the UID in the precondition is another one");
        }
        let conditions = &mut pod["status"]["conditions"];
        let mut merged = conditions.as_array().cloned().unwrap_or_default();
        for new in patch["status"]["conditions"].as_array().unwrap() {
            merged.retain(|old| old["type"] != new["type"]);
            merged.push(new.clone());
        }
        *conditions = json!(merged);
        self.patches.push(patch);
        whole(200, &self.put_in("pods", namespace, pod))
    }

    fn delete(&mut self, key: &(String, String, String)) -> Value {
        let mut object = self.objects.remove(key).unwrap();
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.tell(&key.0, "DELETED", &object);
        object
    }

    fn tell(&mut self, plural: &str, what: &str, object: &Value) {
        let event = json!({"type": what, "object": object});
        self.history.push((self.version, plural.to_owned(), event.clone()));
        self.watches.retain(|(of, watch)| of != plural || watch.send(event.clone()).is_ok());
    }

    fn watch(&mut self, plural: &str, from: Option<&str>, held: Held) -> Response<Body> {
        let (sender, events) = mpsc::unbounded_channel();
        let from: u64 = from.and_then(|version| version.parse().ok()).unwrap_or(0);
        if from < self.compacted {
            let status = json!({"kind": "Status", "apiVersion": "v1", "code": 410, "reason": "Expired",
                "message": "too old resource version"});
            sender.send(json!({"type": "ERROR", "object": status})).unwrap();
        } else {
            for (_, _, event) in self.history.iter().filter(|(at, of, _)| *at > from && of == plural) {
                sender.send(event.clone()).unwrap();
            }
            self.watches.push((plural.to_owned(), sender));
        }
        let of = plural.to_owned();
        let told = move |event| {
            let (mut held, of) = (held.clone(), of.clone());
            async move {
                let _ = held.wait_for(|held| !held.contains(of.as_str())).await;
                event
            }
        };
        let events = UnboundedReceiverStream::new(events)
            .then(told)
            .map(|event| Ok(Frame::data(Bytes::from(format!("{event}\n")))));
        Response::new(BodyExt::boxed(StreamBody::new(events)))
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

fn whole(status: u16, value: &Value) -> Response<Body> {
    let body = Full::new(Bytes::from(value.to_string())).boxed();
    Response::builder().status(status).header("content-type", "application/json").body(body).unwrap()
}

fn refusal(status: u16, message: &str) -> Response<Body> {
    let reason = match status {
        403 => "Forbidden",
        404 => "NotFound",
        _ => "Conflict",
    };
    whole(
        status,
        &json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "reason": reason,
            "message": message}),
    )
}
