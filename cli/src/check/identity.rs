//! The root of trust, and the certificates that agents hold.

use std::time::SystemTime;

use serde_json::Value;
use weft_api::trust::TrustStatus;
use x509_parser::prelude::{FromDer, Pem, X509Certificate};

use super::{
    report::{Check, Outcome},
    server::by,
    view::{Installed, View},
};
use crate::cluster::seconds;

const DAY: f64 = 24.0 * 3600.0;
/// Time to plan a change of the root.
const NOTICE: f64 = 60.0 * DAY;
/// Nodes that are well follow sooner.
const LATE: f64 = 600.0;

pub fn checks(view: &View, installed: &Installed) -> Vec<Check> {
    let namespace = &view.namespace;
    // What counts is the cluster's clock, not this machine's.
    let now = seconds(view.server.clock);
    let mut checks = root(namespace, &installed.root, now);
    let (mut expired, mut unfit) = (Vec::new(), Vec::new());
    for (node, answer) in &installed.agents {
        let Ok(answer) = answer else { continue };
        for certificate in &answer.status.certificates {
            let left = certificate.not_after as f64 - now;
            if left <= 0.0 {
                expired.push(format!("{node}: {} expired, {}", certificate.identity, by(left)));
            }
        }
        let held = |pod: &&weft_api::agent::PodStatus| {
            let certificates = answer.status.certificates.iter();
            pod.identity.is_some()
                && !certificates.map(|c| &c.identity).any(|id| Some(id) == pod.identity.as_ref())
        };
        unfit.extend(
            answer
                .status
                .pods
                .iter()
                .filter(held)
                .map(|pod| format!("{node}: {} has no certificate", pod.uid)),
        );
    }
    let logs =
        format!("is the controller reachable from there? kubectl -n {namespace} logs daemonset/weft-agent");
    checks.push(Check::of(Outcome::Error, "the agents' certificates are valid", expired, logs.clone()));
    checks.push(Check::of(Outcome::Error, "every pod of the mesh has a certificate", unfit, logs));
    checks
}

fn root(namespace: &str, map: &Result<Option<Value>, String>, now: f64) -> Vec<Check> {
    let published = "the root's certificate is published";
    let restart = format!("the controller publishes it: kubectl -n {namespace} logs deployment/weft-control");
    let map = match map {
        Ok(Some(map)) => map,
        Ok(None) => {
            let missing = format!("there is no ConfigMap {namespace}/weft-root; agents cannot start");
            return vec![Check::error(published, missing, restart)];
        }
        Err(why) => return vec![Check::unknown(published, why)],
    };
    let pem = map["data"]["root.pem"].as_str().unwrap_or_default();
    match validity(pem) {
        Err(why) => vec![Check::error(published, format!("ConfigMap {namespace}/weft-root: {why}"), restart)],
        Ok((from, until)) => vec![
            Check::success(published),
            Check::of(
                Outcome::Error,
                "the root's certificate is valid",
                match (now < from, now > until) {
                    (true, _) => vec![format!("not yet, for {}", by(now - from))],
                    (_, true) => {
                        vec![format!("it expired; the cluster's clock is {} of its end", by(now - until))]
                    }
                    _ => Vec::new(),
                },
                format!(
                    "no certificate of the mesh is valid any more. Make a new root:\n\
                     kubectl -n {namespace} delete secret/weft-ca configmap/weft-root\n\
                     kubectl -n {namespace} rollout restart deployment/weft-control daemonset/weft-agent"
                ),
            ),
            Check::of(
                Outcome::Warning,
                "the root's certificate is valid for at least 60 days",
                if now <= until && until - now < NOTICE {
                    vec![format!("{:.0} days are left", (until - now) / DAY)]
                } else {
                    Vec::new()
                },
                "replace it: weft root rotate",
            ),
            rotation(map, now),
        ],
    }
}

/// Whether a rotation of the root waits for long.
fn rotation(map: &Value, now: f64) -> Check {
    let status: Option<TrustStatus> =
        map["data"]["status.json"].as_str().and_then(|text| serde_json::from_str(text).ok());
    let is_late = |status: &TrustStatus| {
        (!status.waiting_for.is_empty() && now - status.changed_at as f64 > LATE) || status.problem.is_some()
    };
    Check::of(
        Outcome::Warning,
        "no rotation of the root is held up",
        status.filter(is_late).map(|status| status.to_string()).into_iter().collect(),
        "see `weft root status`; a node that is gone for good holds it up until its Node object is deleted, or for a day",
    )
}

/// From when to when, in seconds since 1970.
fn validity(pem: &str) -> Result<(f64, f64), String> {
    let block = Pem::iter_from_buffer(pem.as_bytes()).next().ok_or("root.pem holds no certificate")?;
    let block = block.map_err(|error| format!("root.pem: {error}"))?;
    let (_, certificate) =
        X509Certificate::from_der(&block.contents).map_err(|error| format!("root.pem: {error}"))?;
    let validity = certificate.validity();
    let time = |time: x509_parser::time::ASN1Time| seconds(SystemTime::from(time.to_datetime()));
    Ok((time(validity.not_before), time(validity.not_after)))
}
