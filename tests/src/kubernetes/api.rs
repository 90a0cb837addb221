//! The API server's objects, as its administrator: plain HTTP to a `kubectl proxy`, because a scenario asks often and a
//! kubectl takes half a second each time. And its audit log, which says what others asked.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::control_plane::ControlPlane;
use crate::http::{Reply, send};
use crate::place::Place;
use crate::poll::until;
use crate::process::Process;

const PROXY_PORT: u16 = 8001;
const PROXY_READY: Duration = Duration::from_secs(20);
const JSON: &str = "application/json";
/// The stage of an audited request that has not been answered yet.
const RECEIVED: &str = "RequestReceived";

/// The kinds that a test writes: their API's path, their plural, and whether they are in namespaces.
const KINDS: [(&str, &str, &str, bool); 7] = [
    ("AuthorizationPolicy", "/apis/policy.weft.dev/v1alpha1", "authorizationpolicies", true),
    ("Namespace", "/api/v1", "namespaces", false),
    ("Node", "/api/v1", "nodes", false),
    ("Pod", "/api/v1", "pods", true),
    ("Service", "/api/v1", "services", true),
    ("ServiceAccount", "/api/v1", "serviceaccounts", true),
    ("EndpointSlice", "/apis/discovery.k8s.io/v1", "endpointslices", true),
];

/// The way to an API server.
#[derive(Debug)]
pub struct Api {
    place: Place,
    audit: PathBuf,
    _proxy: Process,
}

/// What somebody asked of the API server, by its audit log.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AuditedRequest {
    /// `system:serviceaccount:NAMESPACE:NAME`.
    pub user: String,
    pub verb: String,
    /// With group and subresource, as in `endpointslices.discovery.k8s.io` and `serviceaccounts/token`.
    pub resource: String,
    pub namespace: String,
    pub name: String,
    pub status: u64,
}

impl Api {
    /// The flags by which an API server writes down what service accounts of the namespace `weft-system` ask of it.
    pub(super) fn audit_flags(place: &Place) -> Result<Vec<String>> {
        let policy = place.dir().join("audit-policy.yaml");
        let text = "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules:\n\
                    - {level: Metadata, userGroups: [\"system:serviceaccounts:weft-system\"]}\n- {level: None}\n";
        std::fs::write(&policy, text)?;
        Ok(vec![
            format!("--audit-policy-file={}", policy.display()),
            format!("--audit-log-path={}", Self::audit_path(place).display()),
        ])
    }

    fn audit_path(place: &Place) -> PathBuf {
        place.dir().join("audit.jsonl")
    }

    pub(super) fn start(place: &Place, plane: &ControlPlane) -> Result<Api> {
        let command = plane.kubectl_command(["proxy", &format!("--port={PROXY_PORT}")]);
        let proxy = place.start_command("kubectl-proxy", command)?;
        let api = Api { place: place.clone(), audit: Self::audit_path(place), _proxy: proxy };
        until(
            PROXY_READY,
            "kubectl proxy answers",
            || Ok(api.send("GET", "/readyz", "", "")?.status == 200),
        )?;
        Ok(api)
    }

    fn send(&self, method: &str, path: &str, content_type: &str, body: &str) -> Result<Reply> {
        let stream = self.place.connect(SocketAddr::from(([127, 0, 0, 1], PROXY_PORT)))?;
        send(&stream, method, path, content_type, body)
    }

    /// A request that must succeed. Returns the object in the answer.
    fn request(&self, method: &str, path: &str, content_type: &str, body: &Value) -> Result<Value> {
        let text = if body.is_null() { String::new() } else { body.to_string() };
        let reply = self.send(method, path, content_type, &text)?;
        if !(200..300).contains(&reply.status) {
            bail!("{method} {path}: {} {}", reply.status, reply.body);
        }
        serde_json::from_str(&reply.body).with_context(|| format!("the answer to {method} {path}"))
    }

    /// The object, or whatever else is at a path such as `/api/v1/nodes/east`.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.request("GET", path, "", &Value::Null)
    }

    /// POST, for what is no object that stays, such as an access review.
    pub fn create(&self, path: &str, body: &Value) -> Result<Value> {
        self.request("POST", path, JSON, body)
    }

    /// Makes an object, or what of it the given fields say: server-side apply. A status goes along. Returns the object.
    pub fn apply(&self, object: &Value) -> Result<Value> {
        let path = path_of(object)?;
        let mut wanted = object.clone();
        let status = wanted.as_object_mut().and_then(|fields| fields.remove("status"));
        let patch = format!("{path}?fieldManager=bed&force=true");
        let applied = self.request("PATCH", &patch, "application/apply-patch+yaml", &wanted)?;
        match status {
            Some(status) if !status.is_null() => {
                let patch = json!({ "status": status });
                self.request("PATCH", &format!("{path}/status"), "application/merge-patch+json", &patch)
            }
            _ => Ok(applied),
        }
    }

    /// Deletes an object at once, as a kubelet does when a pod's processes have ended.
    pub fn delete(&self, object: &Value) -> Result<()> {
        self.request("DELETE", &path_of(object)?, JSON, &json!({"gracePeriodSeconds": 0})).map(drop)
    }

    /// A token of a service account for `audience`, or for the API server where that is empty, bound to an object
    /// (`Pod` or `Node`, and its name) if one is given, as a kubelet asks for it.
    pub fn token(
        &self,
        namespace: &str,
        account: &str,
        audience: &str,
        bound_to: Option<(&str, &str)>,
    ) -> Result<String> {
        let audiences: Vec<_> = Some(audience).filter(|audience| !audience.is_empty()).into_iter().collect();
        let reference = bound_to.map(|(kind, name)| json!({"kind": kind, "apiVersion": "v1", "name": name}));
        let answer = self.create(
            &format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"),
            &json!({
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenRequest",
                "spec": {"audiences": audiences, "expirationSeconds": 3600, "boundObjectRef": reference},
            }),
        )?;
        Ok(answer["status"]["token"].as_str().context("no token in the answer")?.to_owned())
    }

    /// What service accounts of Weft asked so far and were answered, in order.
    pub fn audited(&self) -> Result<Vec<AuditedRequest>> {
        self.audit(|stage| stage != RECEIVED)
    }

    /// How often service accounts of Weft have asked that, answered or not.
    pub fn received(&self, verb: &str, resource: &str) -> Result<usize> {
        let requests = self.audit(|stage| stage == RECEIVED)?;
        Ok(requests.iter().filter(|request| request.verb == verb && request.resource == resource).count())
    }

    fn audit(&self, is_wanted: impl Fn(&str) -> bool) -> Result<Vec<AuditedRequest>> {
        let text = std::fs::read_to_string(&self.audit).context("the audit log")?;
        // The last line may be half written.
        let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let entries = lines.map(|line| serde_json::from_str(line).with_context(|| line.to_owned()));
        entries
            .filter(|entry: &Result<Value>| {
                entry.as_ref().map_or(true, |entry| entry["stage"].as_str().is_some_and(&is_wanted))
            })
            .map(|entry| {
                let entry = entry?;
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                let reference = &entry["objectRef"];
                let mut resource = text(&reference["resource"]);
                for (separator, part) in [('.', "apiGroup"), ('/', "subresource")] {
                    if let Some(part) = reference[part].as_str() {
                        resource.extend([separator.to_string().as_str(), part]);
                    }
                }
                Ok(AuditedRequest {
                    user: text(&entry["user"]["username"]),
                    verb: text(&entry["verb"]),
                    resource,
                    namespace: text(&reference["namespace"]),
                    name: text(&reference["name"]),
                    status: entry["responseStatus"]["code"].as_u64().unwrap_or_default(),
                })
            })
            .collect()
    }

    /// Whether a service account (`NAMESPACE/NAME`) may do that, asked as `kubectl auth can-i --as` asks. A resource may
    /// have a group and a subresource, as in `AuditedRequest`, and namespace and name may be empty: everywhere, any.
    pub fn may(
        &self,
        account: &str,
        verb: &str,
        resource: &str,
        namespace: &str,
        name: &str,
    ) -> Result<bool> {
        let (own, account) = account.split_once('/').context("NAMESPACE/NAME")?;
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let (resource, group) = resource.split_once('.').unwrap_or((resource, ""));
        let attributes = BTreeMap::from([
            ("verb", verb),
            ("resource", resource),
            ("subresource", subresource),
            ("group", group),
            ("namespace", namespace),
            ("name", name),
        ]);
        let groups =
            ["system:serviceaccounts", &format!("system:serviceaccounts:{own}"), "system:authenticated"];
        let answer = self.create(
            "/apis/authorization.k8s.io/v1/subjectaccessreviews",
            &json!({
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SubjectAccessReview",
                "spec": {
                    "user": format!("system:serviceaccount:{own}:{account}"),
                    "groups": groups,
                    "resourceAttributes": attributes,
                },
            }),
        )?;
        answer["status"]["allowed"].as_bool().context("no answer")
    }
}

fn path_of(object: &Value) -> Result<String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (kind, name) = (text(&object["kind"]), text(&object["metadata"]["name"]));
    let (_, api, plural, in_namespace) =
        KINDS.into_iter().find(|(known, ..)| *known == kind).with_context(|| format!("no path of {kind}"))?;
    let namespace = text(&object["metadata"]["namespace"]);
    Ok(if in_namespace {
        format!("{api}/namespaces/{namespace}/{plural}/{name}")
    } else {
        format!("{api}/{plural}/{name}")
    })
}
