//! The calls an agent makes of the controller beside the xDS stream, all over one connection with the join token. After one
//! that failed it is another connection, which may lead to another replica.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tonic::{Request, Status};
use weft_proto::{
    ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_client::IstioCertificateServiceClient,
    },
    node::{EnrollmentReport, node_service_client::NodeServiceClient},
};
use weft_xds::{AuthenticatedChannel, ControlEndpoint, TokenSource};

use crate::{config::Config, seen::Seen, trust};

/// A call that takes longer counts as failed and is tried again.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// DNS name in the controller's certificate, whatever address it is reached at.
const SERVER_NAME: &str = "weft-control";

/// Cheap to clone.
#[derive(Clone)]
pub struct Controller {
    endpoint: ControlEndpoint,
    channel: Arc<Mutex<AuthenticatedChannel>>,
}

impl Controller {
    pub fn new(endpoint: &ControlEndpoint) -> anyhow::Result<Self> {
        let channel = Arc::new(Mutex::new(weft_xds::channel(endpoint)?));
        Ok(Self { endpoint: endpoint.clone(), channel })
    }

    fn channel(&self) -> AuthenticatedChannel {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The calls to come use another connection: after one that failed, and when others are to be believed.
    pub fn reconnect(&self) {
        if let Ok(channel) = weft_xds::channel(&self.endpoint) {
            *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = channel;
        }
    }

    fn outcome<T>(&self, outcome: Result<T, Status>) -> Result<T, Status> {
        if outcome.is_err() {
            self.reconnect();
        }
        outcome
    }

    pub async fn create_certificate(
        &self,
        request: IstioCertificateRequest,
    ) -> Result<IstioCertificateResponse, Status> {
        let mut request = Request::new(request);
        request.set_timeout(CALL_TIMEOUT);
        let mut ca = IstioCertificateServiceClient::new(self.channel());
        Ok(self.outcome(ca.create_certificate(request).await)?.into_inner())
    }

    pub async fn report_enrollment(&self, report: EnrollmentReport) -> Result<(), Status> {
        let mut request = Request::new(report);
        request.set_timeout(CALL_TIMEOUT);
        self.outcome(NodeServiceClient::new(self.channel()).report_enrollment(request).await)?;
        Ok(())
    }
}

/// Where the controller is, from the settings. It is told what this node has `seen`, and known by whom the node believes.
pub fn endpoint(config: &Config, seen: &Seen, trust: &trust::Keeper) -> anyhow::Result<ControlEndpoint> {
    Ok(ControlEndpoint {
        address: config.control.clone(),
        ca: trust.controller_ca(config.control_ca.clone())?,
        server_name: SERVER_NAME.to_owned(),
        token: TokenSource::file(config.token_file.clone()),
        seen: Some(seen.subscribe()),
    })
}
