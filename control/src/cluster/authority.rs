//! The root of trust in a cluster: certificate and key in a Secret that is made once, whoever of several replicas comes
//! first; and the certificate alone in a ConfigMap, for the agents to know the controller by.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use tokio::time::sleep;

use super::{ClusterError, bounded, code};
use crate::root::Root;

const SECRET: &str = "weft-ca";
const CONFIG_MAP: &str = "weft-root";
const CERTIFICATE: &str = "root.pem";
const KEY: &str = "root.key";
/// How often the ConfigMap is looked after: agents that start need it.
const PUBLISH_INTERVAL: Duration = Duration::from_secs(30);

/// The cluster's root; made if there is none. A Secret that is there and no good is an error: another root would cut off
/// every certificate that is in use.
pub async fn root(client: &Client, namespace: &str, organization: &str) -> Result<Root, ClusterError> {
    let what = format!("Secret {namespace}/{SECRET}");
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let read = async || secrets.get_opt(SECRET).await.map_err(|error| ClusterError::request(&what, &error));
    if let Some(secret) = read().await? {
        return parse(&what, &secret);
    }
    let invalid = |why: String| ClusterError::Invalid { what: what.clone(), why };
    let (certificate, key) = Root::generate(organization).map_err(|error| invalid(error.to_string()))?;
    let data = [(CERTIFICATE, certificate), (KEY, key)];
    let secret = Secret {
        metadata: metadata(SECRET),
        data: Some(data.map(|(name, pem)| (name.to_owned(), ByteString(pem.into_bytes()))).into()),
        ..Secret::default()
    };
    match secrets.create(&PostParams::default(), &secret).await {
        Ok(created) => {
            tracing::info!(target: "cluster", "made the mesh's root of trust, in {what}");
            parse(&what, &created)
        }
        // Another replica was faster; its root is everybody's.
        Err(error) if code(&error) == 409 => {
            let secret = read().await?.ok_or_else(|| invalid("was there and is gone again".to_owned()))?;
            parse(&what, &secret)
        }
        Err(error) => Err(ClusterError::request(&what, &error)),
    }
}

fn parse(what: &str, secret: &Secret) -> Result<Root, ClusterError> {
    let invalid = |why: String| ClusterError::Invalid { what: what.to_owned(), why };
    let text = |name: &str| {
        let bytes = secret.data.as_ref().and_then(|data| data.get(name)).ok_or(format!("has no {name}"))?;
        String::from_utf8(bytes.0.clone()).map_err(|error| format!("{name}: {error}"))
    };
    let (certificate, key) = (text(CERTIFICATE).map_err(invalid)?, text(KEY).map_err(invalid)?);
    Root::from_pem(certificate, &key).map_err(|why| invalid(format!("{CERTIFICATE} {why}")))
}

/// Writes the certificate where agents read it, unless it is there already.
pub async fn publish(client: &Client, namespace: &str, pem: &str) -> Result<(), ClusterError> {
    let what = format!("ConfigMap {namespace}/{CONFIG_MAP}");
    let failed = |error: kube::Error| ClusterError::request(&what, &error);
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let wanted: BTreeMap<String, String> = [(CERTIFICATE.to_owned(), pem.to_owned())].into();
    match maps.get_opt(CONFIG_MAP).await.map_err(failed)? {
        Some(map) if map.data.as_ref() == Some(&wanted) => return Ok(()),
        Some(map) => {
            // Its version goes along: a replica that writes at the same time makes this fail, and the next look finds
            // what it wrote.
            let map = ConfigMap { data: Some(wanted), binary_data: None, ..map };
            maps.replace(CONFIG_MAP, &PostParams::default(), &map).await.map_err(failed)?;
        }
        None => {
            let map =
                ConfigMap { metadata: metadata(CONFIG_MAP), data: Some(wanted), ..ConfigMap::default() };
            match maps.create(&PostParams::default(), &map).await {
                Err(error) if code(&error) != 409 => return Err(failed(error)),
                _ => {}
            }
        }
    }
    tracing::info!(target: "cluster", "published the root's certificate, in {what}");
    Ok(())
}

/// Publishes again whenever somebody removed or changed it. Never returns.
pub async fn keep_published(client: Client, namespace: String, pem: String) {
    loop {
        sleep(PUBLISH_INTERVAL).await;
        if let Err(error) = bounded(CONFIG_MAP, publish(&client, &namespace, &pem)).await {
            tracing::warn!(target: "cluster", "{error}");
        }
    }
}

fn metadata(name: &str) -> ObjectMeta {
    let label = ("app.kubernetes.io/part-of".to_owned(), "weft".to_owned());
    ObjectMeta { name: Some(name.to_owned()), labels: Some([label].into()), ..ObjectMeta::default() }
}
