//! Whom the mesh believes, in a cluster: the record with keys in a Secret that is made once, whoever of several replicas comes
//! first; and the certificates alone in a ConfigMap, for agents to know the controller by, with how a rotation goes on, for
//! people.

use std::collections::BTreeMap;

use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
};
use kube::{Api, Client, api::PostParams};

use weft_api::trust::{ROTATE_ROOT, TrustStatus};

use super::{ClusterError, code, metadata};
use crate::trust::Record;

pub const SECRET: &str = "weft-ca";
const CONFIG_MAP: &str = "weft-root";
const RECORD: &str = "trust.json";
const BUNDLE: &str = "root.pem";
const STATUS: &str = "status.json";

/// The record as it is in the Secret.
pub struct Stored {
    pub record: Record,
    pub version: String,
}

/// The cluster's record; None if there is none. A Secret that is there and no good is an error.
pub async fn read(client: &Client, namespace: &str) -> Result<Option<Stored>, ClusterError> {
    let what = what(namespace);
    let secret = secrets(client, namespace).get_opt(SECRET).await;
    secret.map_err(|error| ClusterError::request(&what, &error))?.map(|s| parse(&what, &s)).transpose()
}

/// Makes the Secret. If another replica was faster, its record is everybody's.
pub async fn create(client: &Client, namespace: &str, record: &Record) -> Result<Record, ClusterError> {
    let what = what(namespace);
    let secret = Secret { metadata: metadata(SECRET), data: Some(data(&what, record)?), ..Secret::default() };
    match secrets(client, namespace).create(&PostParams::default(), &secret).await {
        Ok(_) => {
            tracing::info!(target: "trust", "made the mesh's root of trust, in {what}");
            Ok(record.clone())
        }
        Err(error) if code(&error) == 409 => {
            let gone = || ClusterError::Invalid { what, why: "was there and is gone again".to_owned() };
            read(client, namespace).await?.map(|stored| stored.record).ok_or_else(gone)
        }
        Err(error) => Err(ClusterError::request(&what, &error)),
    }
}

/// Replaces the record that was read at `version`. False if there is another one by now.
pub async fn replace(
    client: &Client,
    namespace: &str,
    record: &Record,
    version: Option<String>,
) -> Result<bool, ClusterError> {
    let what = what(namespace);
    let failed = |error: &kube::Error| ClusterError::request(&what, error);
    let secrets = secrets(client, namespace);
    // As it is, so that labels and annotations of others stay.
    let Some(secret) = secrets.get_opt(SECRET).await.map_err(|error| failed(&error))? else {
        return Ok(false);
    };
    if secret.metadata.resource_version != version {
        return Ok(false);
    }
    let secret = Secret { data: Some(data(&what, record)?), ..secret };
    match secrets.replace(SECRET, &PostParams::default(), &secret).await {
        Ok(_) => Ok(true),
        Err(error) if code(&error) == 409 => Ok(false),
        Err(error) => Err(failed(&error)),
    }
}

fn parse(what: &str, secret: &Secret) -> Result<Stored, ClusterError> {
    let invalid = |why: String| ClusterError::Invalid { what: what.to_owned(), why };
    let text = secret.data.as_ref().and_then(|data| data.get(RECORD));
    let text = text.ok_or_else(|| invalid(format!("has no {RECORD}")))?;
    let record = Record::parse(&text.0).map_err(|why| invalid(format!("{RECORD} {why}")))?;
    Ok(Stored { record, version: secret.metadata.resource_version.clone().unwrap_or_default() })
}

fn data(what: &str, record: &Record) -> Result<BTreeMap<String, ByteString>, ClusterError> {
    let json = record.to_json().map_err(|why| ClusterError::Invalid { what: what.to_owned(), why })?;
    Ok([(RECORD.to_owned(), ByteString(json))].into())
}

/// Writes bundle and status where agents and people read them, unless they are there already. Who does not lead leaves
/// the status of the same record alone, and everybody that of a newer one. Returns what somebody has written there who wants
/// a rotation.
pub async fn publish(
    client: &Client,
    namespace: &str,
    pem: &str,
    status: &TrustStatus,
    leading: bool,
) -> Result<Option<String>, ClusterError> {
    let what = format!("ConfigMap {namespace}/{CONFIG_MAP}");
    let failed = |error: kube::Error| ClusterError::request(&what, &error);
    let text = serde_json::to_string_pretty(status)
        .map_err(|error| ClusterError::Invalid { what: what.clone(), why: error.to_string() })?;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let wanted: BTreeMap<_, _> =
        [(BUNDLE, pem), (STATUS, &text)].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    match maps.get_opt(CONFIG_MAP).await.map_err(failed)? {
        Some(map) => {
            let request = map.metadata.annotations.as_ref().and_then(|all| all.get(ROTATE_ROOT)).cloned();
            let data = map.data.clone().unwrap_or_default();
            let theirs: Option<TrustStatus> =
                data.get(STATUS).and_then(|text| serde_json::from_str(text).ok());
            let newer = theirs.as_ref().is_some_and(|theirs| theirs.serial > status.serial);
            let same = theirs.is_some_and(|theirs| theirs.serial == status.serial)
                && data.get(BUNDLE).is_some_and(|bundle| bundle == pem);
            if data == wanted || newer || (same && !leading) {
                return Ok(request);
            }
            // Its version goes along: a replica that writes at the same time makes this fail, and the next look finds
            // what it wrote.
            let map = ConfigMap { data: Some(wanted), binary_data: None, ..map };
            maps.replace(CONFIG_MAP, &PostParams::default(), &map).await.map_err(failed)?;
            Ok(request)
        }
        None => {
            let map =
                ConfigMap { metadata: metadata(CONFIG_MAP), data: Some(wanted), ..ConfigMap::default() };
            match maps.create(&PostParams::default(), &map).await {
                Err(error) if code(&error) != 409 => Err(failed(error)),
                _ => Ok(None),
            }
        }
    }
}

fn secrets(client: &Client, namespace: &str) -> Api<Secret> {
    Api::namespaced(client.clone(), namespace)
}

fn what(namespace: &str) -> String {
    format!("Secret {namespace}/{SECRET}")
}
