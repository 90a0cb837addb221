//! The one TLS port: xDS, the certificate authority and the node service, each call authenticated. What they answer is
//! decided elsewhere; here is only what is on the wire.

use std::{collections::BTreeSet, future::Future, sync::Arc, time::Duration};

use prost_types::value::Kind;
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status, transport::Server};
use weft_proto::{
    ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
    },
    node::{
        EnrollmentAck, EnrollmentReport,
        node_service_server::{NodeService, NodeServiceServer},
    },
};
use weft_xds::Progress;

use crate::{
    auth::{Authenticator, Caller},
    ca::Authority,
    controller::{Input, Report},
    tls::Incoming,
};

/// Name of the metadata in which an agent says whose certificate it wants, as Istio's agents do.
const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";
/// A report that was not written down by then is to be sent again.
const REPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// Streams of xDS never end by themselves: how long a shutdown waits for calls to finish.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

/// Serves `incoming` until `shutdown`, then for as long as open calls take, a second at most.
pub async fn serve(
    incoming: Incoming,
    xds: weft_xds::Service,
    authenticator: Authenticator,
    authority: Authority,
    progress: Progress,
    inputs: mpsc::Sender<Input>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let (authority, known) = (Arc::new(authority), progress.clone());
    let ca = Ca { authenticator: authenticator.clone(), progress: known, authority };
    let node = Node { authenticator, progress, inputs };
    let (stop, stopped) = oneshot::channel::<()>();
    let server = weft_xds::with_keepalive(Server::builder())
        .add_service(xds)
        .add_service(IstioCertificateServiceServer::new(ca))
        .add_service(NodeServiceServer::new(node))
        .serve_with_incoming_shutdown(incoming, async { drop(stopped.await) });
    tokio::pin!(server);
    tokio::select! {
        result = &mut server => return result,
        () = shutdown => drop(stop),
    }
    tokio::time::timeout(SHUTDOWN_GRACE, server).await.unwrap_or(Ok(()))
}

struct Ca {
    authenticator: Authenticator,
    progress: Progress,
    authority: Arc<Authority>,
}

#[tonic::async_trait]
impl IstioCertificateService for Ca {
    /// Which pods are on an agent's node a replica that has seen less than the agent does not know.
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let caller = self
            .authenticator
            .caller(request.metadata())
            .await
            .inspect_err(|refused| self.authority.refused_caller(refused.reason()))?;
        if let Caller::Node(_) = caller {
            self.progress.reach(request.metadata()).await?;
        }
        let request = request.into_inner();
        let asked = request.metadata.as_ref().and_then(|metadata| metadata.fields.get(IMPERSONATED_IDENTITY));
        let asked = match asked.map(|value| value.kind.as_ref()) {
            None => None,
            Some(Some(Kind::StringValue(identity))) => Some(identity.as_str()),
            Some(_) => {
                return Err(Status::invalid_argument(format!("{IMPERSONATED_IDENTITY} is not a string")));
            }
        };
        let ttl = u64::try_from(request.validity_duration).ok().filter(|seconds| *seconds > 0);
        let chain = self.authority.issue(&caller, &request.csr, asked, ttl.map(Duration::from_secs))?;
        Ok(Response::new(IstioCertificateResponse { cert_chain: chain }))
    }
}

struct Node {
    authenticator: Authenticator,
    progress: Progress,
    inputs: mpsc::Sender<Input>,
}

#[tonic::async_trait]
impl NodeService for Node {
    /// Answers when the report is written down. A replica that has seen less than the agent might take the pods for others
    /// of their name.
    async fn report_enrollment(
        &self,
        request: Request<EnrollmentReport>,
    ) -> Result<Response<EnrollmentAck>, Status> {
        let node = self.authenticator.node(request.metadata()).await?;
        self.progress.reach(request.metadata()).await?;
        let EnrollmentReport { enrolled_uids, failures, trust_serial } = request.into_inner();
        let (done, result) = oneshot::channel();
        let report = Report {
            node,
            enrolled: enrolled_uids.into_iter().collect::<BTreeSet<_>>(),
            failures: failures.into_iter().map(|failure| (failure.uid, failure.message)).collect(),
            trust: trust_serial,
            done,
        };
        let take = async {
            self.inputs.send(Input::Report(report)).await.ok()?;
            result.await.ok()
        };
        match tokio::time::timeout(REPORT_TIMEOUT, take).await {
            Ok(Some(Ok(()))) => Ok(Response::new(EnrollmentAck {})),
            Ok(Some(Err(why))) => Err(Status::unavailable(why)),
            Ok(None) => Err(Status::unavailable("the controller is shutting down")),
            Err(_) => Err(Status::unavailable("the controller is busy")),
        }
    }
}
