//! The plugin's own credentials: a token of its own service account, which outlives the agent's pod. (The token that a pod
//! is given ends with the pod, and the plugin needs one just when there is no agent.) See the TokenRequest API.

use serde_json::{Value, json};

use crate::http::{ApiServer, to_api};

/// The plugin's service account, in the agents' namespace. It may get Pods and Namespaces.
pub const ACCOUNT: &str = "weft-cni";
/// How long a token is asked for, in seconds; the agent asks again at half of it.
pub const LIFETIME: u64 = 24 * 3600;

/// Asks `api`, as the agent, for a token of the plugin's account.
pub fn request(api: ApiServer<'_>, namespace: &str) -> Result<String, String> {
    let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{ACCOUNT}/token");
    let body = json!({
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"expirationSeconds": LIFETIME},
    });
    let answer = to_api(api, &path, Some(body.to_string().as_bytes()))
        .map_err(|error| format!("the API server {}: {error}", api.address))?;
    let reply: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    match (answer.status, reply["status"]["token"].as_str()) {
        (200 | 201, Some(token)) => Ok(token.to_owned()),
        (status, _) => {
            let why = reply["message"].as_str().unwrap_or("no token is in the answer");
            Err(format!("no token for the service account {namespace}/{ACCOUNT}: {why} ({status})"))
        }
    }
}
