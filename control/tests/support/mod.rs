//! What tests of the program share: the running controller, an agent's view of it, and its calls.
#![allow(dead_code, clippy::unwrap_used, reason = "tests, each with a part of it")]

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc as std_mpsc,
    time::Duration,
};

use prost::Message;
use tokio::{sync::mpsc, sync::watch, time::timeout};
use tonic::Code;
use weft_proto::{
    ca::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient},
    node::{EnrollmentFailure, EnrollmentReport, LocalWorkload, node_service_client::NodeServiceClient},
    type_url,
    workload::{Address, TunnelProtocol, address},
};
use weft_xds::{Backoff, ClientConfig, ControlEndpoint, Update, VersionVector};

pub mod api;
pub mod cluster;

pub const BINARY: &str = env!("CARGO_BIN_EXE_weft-control");
pub const LONG: Duration = Duration::from_secs(10);
pub const UID: &str = "Kubernetes//Pod/shop/web";
pub const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// A running controller; killed when dropped.
pub struct Control {
    pub child: Child,
    log: std_mpsc::Receiver<String>,
    pub agents: String,
    pub metrics: String,
    pub ready: String,
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Control {
    /// Starts it; the ports are in the log.
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, log) = std_mpsc::channel();
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let mut control =
            Control { child, log, agents: String::new(), metrics: String::new(), ready: String::new() };
        control.agents = control.address("for agents");
        control.metrics = control.address("for metrics");
        control.ready = control.address("for readiness");
        control
    }

    /// Waits for a line of the log that holds `words`.
    pub fn logged(&self, words: &str) -> String {
        let mut others = Vec::new();
        loop {
            let line = self.log.recv_timeout(LONG);
            let line = line.unwrap_or_else(|_| panic!("no line with {words:?}, only {others:#?}"));
            if line.contains(words) {
                return line;
            }
            others.push(line);
        }
    }

    pub fn address(&self, what: &str) -> String {
        let line = self.logged(what);
        line.split_once("listening on ").unwrap().1.split(' ').next().unwrap().to_owned()
    }
}

/// A plain HTTP GET: status line and body in one.
pub async fn get(address: &str, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// What an agent sees: the last state of the pod, as updates come in.
pub struct Agent {
    pub updates: mpsc::Receiver<Update>,
    pub tunnel: Option<bool>,
    pub enroll: Option<bool>,
    pub pod_uid: String,
    pub seen: watch::Sender<VersionVector>,
}

impl Agent {
    pub fn connect(endpoint: ControlEndpoint, node: &str) -> Self {
        Self::having_seen(endpoint, node, VersionVector::default())
    }

    /// One that was at another replica before.
    pub fn having_seen(mut endpoint: ControlEndpoint, node: &str, seen: VersionVector) -> Self {
        let (seen, receiver) = watch::channel(seen);
        endpoint.seen = Some(receiver);
        let (sender, updates) = mpsc::channel(1);
        let types = vec![type_url::ADDRESS, type_url::MESH_CONFIG, type_url::LOCAL_WORKLOAD];
        let config = ClientConfig {
            server: endpoint,
            node: node.to_owned(),
            types,
            backoff: Backoff::default(),
            trouble: watch::Sender::default(),
        };
        tokio::spawn(weft_xds::run(config, sender, watch::channel(false).0));
        Self { updates, tunnel: None, enroll: None, pod_uid: String::new(), seen }
    }

    /// Waits until the pod is known both ways: whether it is reached by tunnel, and whether it is to be enrolled.
    pub async fn until(&mut self, tunnel: bool, enroll: bool) {
        self.until_known(Some(tunnel), Some(enroll)).await;
    }

    pub async fn until_known(&mut self, tunnel: Option<bool>, enroll: Option<bool>) {
        while (self.tunnel, self.enroll) != (tunnel, enroll) {
            let update = timeout(LONG, self.updates.recv())
                .await
                .unwrap_or_else(|_| panic!("stays at tunnel {:?}, enroll {:?}", self.tunnel, self.enroll));
            let update = update.unwrap();
            self.seen.send_if_modified(|seen| seen.merge(&update.seen));
            for resource in update.upserts.iter().filter(|resource| resource.name == UID) {
                let value = resource.value.clone();
                match update.type_url {
                    type_url::ADDRESS => match Address::decode(value).unwrap().r#type {
                        Some(address::Type::Workload(w)) => {
                            self.tunnel = Some(w.tunnel_protocol() == TunnelProtocol::Hbone);
                        }
                        other => panic!("{other:?}"),
                    },
                    _ => {
                        let local = LocalWorkload::decode(value).unwrap();
                        (self.enroll, self.pod_uid) = (Some(local.enroll), local.pod_uid);
                    }
                }
            }
            update.ack();
        }
    }
}

pub async fn report(endpoint: &ControlEndpoint, uids: &[&str]) -> Result<(), Code> {
    report_failures(endpoint, uids, &[]).await
}

pub async fn report_failures(
    endpoint: &ControlEndpoint,
    uids: &[&str],
    failures: &[(&str, &str)],
) -> Result<(), Code> {
    let mut client = NodeServiceClient::new(weft_xds::channel(endpoint).unwrap());
    let enrolled_uids = uids.iter().map(|uid| (*uid).to_owned()).collect();
    let failures = failures
        .iter()
        .map(|(uid, message)| EnrollmentFailure { uid: (*uid).to_owned(), message: (*message).to_owned() });
    let request = EnrollmentReport { enrolled_uids, failures: failures.collect(), trust_serial: 0 };
    client.report_enrollment(request).await.map(drop).map_err(|status| status.code())
}

pub async fn certificate(endpoint: &ControlEndpoint, identity: &str) -> Result<Vec<String>, Code> {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI(identity.try_into().unwrap())];
    let csr = params.serialize_request(&key).unwrap().pem().unwrap();
    let value = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(identity.to_owned())) };
    let metadata = prost_types::Struct { fields: [("ImpersonatedIdentity".to_owned(), value)].into() };
    let request = IstioCertificateRequest { csr, validity_duration: 3600, metadata: Some(metadata) };
    let mut client = IstioCertificateServiceClient::new(weft_xds::channel(endpoint).unwrap());
    client
        .create_certificate(request)
        .await
        .map(|r| r.into_inner().cert_chain)
        .map_err(|status| status.code())
}
