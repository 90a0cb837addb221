//! Without an answer of the agent: whether a pod may start, by what the API server says of it. A pod of the mesh may not;
//! the agent would have to protect it first.

use weft_api::{Namespace, Pod, mesh_choice};
use weft_cni::{
    http::{self, ApiServer},
    settings::Settings,
};

const HELP: &str = "see `kubectl -n weft-system get pods -o wide` for this node's agent; the pod starts by itself when it is back";

/// On the mirror of a static pod: the UID by which the node, and so the runtime, knows the pod.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// Ok where the pod may start without the agent.
pub fn decide(settings: &Settings, namespace: &str, name: &str, uid: &str, why: &str) -> Result<(), String> {
    match wanted(settings, namespace, name, uid) {
        Ok(false) => Ok(()),
        Ok(true) => Err(format!("{namespace}/{name} belongs to the mesh, and {why}. {HELP}")),
        // Whoever brings the API server back must be able to start.
        Err(_) if settings.excluded_namespaces.iter().any(|excluded| excluded == namespace) => Ok(()),
        Err(error) => Err(format!(
            "whether {namespace}/{name} belongs to the mesh cannot be found out: {why}; the API server: {error}. {HELP}"
        )),
    }
}

/// Whether labels want the pod in the mesh.
fn wanted(settings: &Settings, namespace: &str, name: &str, uid: &str) -> Result<bool, String> {
    let pod: Pod = get(settings, &format!("/api/v1/namespaces/{namespace}/pods/{name}"))?;
    let mirrored = pod.metadata.annotations.get(MIRROR).map(String::as_str);
    if pod.metadata.uid.as_deref() != Some(uid) && mirrored != Some(uid) {
        return Err(format!("the pod {name} is another one by now"));
    }
    let namespace: Namespace = get(settings, &format!("/api/v1/namespaces/{namespace}"))?;
    Ok(mesh_choice(Some(&namespace), &pod).wanted)
}

fn get<T: serde::de::DeserializeOwned>(settings: &Settings, path: &str) -> Result<T, String> {
    let api_server = &settings.api_server;
    let api = ApiServer { address: api_server, ca: &settings.api_ca, token: &settings.api_token };
    let answer = http::to_api(api, path, None).map_err(|error| format!("{api_server}: {error}"))?;
    if answer.status != 200 {
        return Err(format!("{api_server} answers {} for {path}", answer.status));
    }
    serde_json::from_slice(&answer.body).map_err(|error| format!("{path}: {error}"))
}
