//! A client of the controller that is not an agent: it shows whatever token it is given, and says how it was answered.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use tokio::time::timeout;
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status};
use weft_proto::ca::IstioCertificateRequest;
use weft_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use weft_proto::discovery::DeltaDiscoveryRequest;
use weft_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use weft_proto::node::EnrollmentReport;
use weft_proto::node::node_service_client::NodeServiceClient;
use weft_proto::type_url;
use weft_testbed::Place;

/// The name that the controller's certificate carries.
const SERVER_NAME: &str = "weft-control";
const LIMIT: Duration = Duration::from_secs(10);
const TYPES: [&str; 4] = [type_url::MESH_CONFIG, type_url::NODE, type_url::ADDRESS, type_url::LOCAL_WORKLOAD];

/// Versions of resources by type URL and name.
pub type Versions = BTreeMap<(String, String), String>;

/// What can be asked of the controller.
#[derive(Clone, Debug)]
pub enum Ask {
    /// The xDS stream, to its first answers.
    Stream,
    /// To take these workloads for enrolled.
    Report(Vec<String>),
    /// A certificate for that identity.
    Certificate(String),
}

/// Who asks.
#[derive(Clone, Debug)]
pub struct Caller<'a> {
    pub place: &'a Place,
    pub controller: SocketAddr,
    /// The root that the controller's certificate must chain to.
    pub root: &'a [u8],
    /// The whole header.
    pub authorization: Option<String>,
}

impl Caller<'_> {
    /// As it is, with that token.
    pub fn with_token(&self, token: &str) -> Self {
        Caller { authorization: Some(format!("Bearer {token}")), ..self.clone() }
    }

    /// Asks, and says how it was answered; an error if there was no answer.
    pub fn ask(&self, what: &Ask) -> Result<Result<(), Status>> {
        Ok(match what {
            Ask::Stream => self.resources()?.map(drop),
            Ask::Report(uids) => self.report(uids)?,
            Ask::Certificate(identity) => self.certificate(identity)?.map(drop),
        })
    }

    /// What every resource's version is for this caller.
    pub fn resources(&self) -> Result<Result<Versions, Status>> {
        self.call(async |channel| {
            let (requests, stream) = tokio::sync::mpsc::channel(8);
            let request = self.request(tokio_stream::wrappers::ReceiverStream::new(stream));
            let ask = |type_url: &str, nonce: String| DeltaDiscoveryRequest {
                type_url: type_url.to_owned(),
                response_nonce: nonce,
                ..DeltaDiscoveryRequest::default()
            };
            for type_url in TYPES {
                let _ = requests.send(ask(type_url, String::new())).await;
            }
            let mut client = AggregatedDiscoveryServiceClient::new(channel);
            let mut answers = client.delta_aggregated_resources(request).await?.into_inner();
            let (mut versions, mut waiting) = (Versions::new(), TYPES.to_vec());
            while !waiting.is_empty() {
                let answer = answers.message().await?.ok_or(Status::data_loss("the stream ended"))?;
                let _ = requests.send(ask(&answer.type_url, answer.nonce)).await;
                waiting.retain(|type_url| *type_url != answer.type_url);
                for resource in answer.resources {
                    versions.insert((answer.type_url.clone(), resource.name), resource.version);
                }
            }
            Ok(versions)
        })
    }

    /// Reports these workloads as enrolled.
    pub fn report(&self, uids: &[String]) -> Result<Result<(), Status>> {
        self.call(async |channel| {
            let report = EnrollmentReport { enrolled_uids: uids.to_vec(), ..EnrollmentReport::default() };
            NodeServiceClient::new(channel).report_enrollment(self.request(report)).await.map(drop)
        })
    }

    /// A certificate for `identity` and a new key: the leaf, then the roots, in PEM.
    pub fn certificate(&self, identity: &str) -> Result<Result<Vec<String>, Status>> {
        let mut parameters = CertificateParams::default();
        parameters.subject_alt_names.push(SanType::URI(identity.try_into()?));
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let csr = parameters.serialize_request(&key)?.pem()?;
        let request = IstioCertificateRequest { csr, ..IstioCertificateRequest::default() };
        self.call(async |channel| {
            let mut client = IstioCertificateServiceClient::new(channel);
            Ok(client.create_certificate(self.request(request)).await?.into_inner().cert_chain)
        })
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let value = self.authorization.as_deref().and_then(|value| MetadataValue::try_from(value).ok());
        if let Some(value) = value {
            request.metadata_mut().insert("authorization", value);
        }
        request
    }

    /// One call on a connection of its own, from the caller's place.
    fn call<T: Send, F: Future<Output = Result<T, Status>>>(
        &self,
        call: impl FnOnce(Channel) -> F + Send,
    ) -> Result<Result<T, Status>> {
        let (controller, root) = (self.controller, self.root);
        self.place.netns().run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let tls = ClientTlsConfig::new()
                    .ca_certificate(Certificate::from_pem(root))
                    .domain_name(SERVER_NAME);
                let endpoint = Endpoint::from_shared(format!("https://{controller}"))?.tls_config(tls)?;
                let exchange = async {
                    let channel =
                        endpoint.connect().await.with_context(|| format!("connecting to {controller}"))?;
                    anyhow::Ok(call(channel).await)
                };
                match timeout(LIMIT, exchange).await {
                    Ok(answer) => answer,
                    Err(_) => bail!("no answer within {LIMIT:?}"),
                }
            })
        })?
    }
}

/// The status in an answer, for comparing.
pub fn code<T>(answer: &Result<T, Status>) -> Code {
    answer.as_ref().map_or_else(Status::code, |_| Code::Ok)
}
