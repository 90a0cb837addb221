//! The roots that peers' certificates must chain to: built once for all identities of an agent, and replaced as a whole when
//! the mesh's roots rotate.

use crate::TlsError;
use crate::identity::PROVIDER;
use crate::verify::expiry_of;
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use std::sync::Arc;
use std::time::UNIX_EPOCH;
use tokio::sync::watch;

/// A bundle of roots.
#[derive(Debug)]
pub struct Roots {
    pub(crate) store: Arc<RootCertStore>,
    pub(crate) callers: Arc<dyn ClientCertVerifier>,
    retired: watch::Sender<bool>,
}

impl Roots {
    /// An error if there is none among `roots`, or one that cannot be a root.
    pub fn new(roots: impl IntoIterator<Item = CertificateDer<'static>>) -> Result<Self, TlsError> {
        let unusable = |why: String| TlsError::Roots(why);
        let mut store = RootCertStore::empty();
        for root in roots {
            store.add(root).map_err(|e| unusable(e.to_string()))?;
        }
        let store = Arc::new(store);
        let callers = WebPkiClientVerifier::builder_with_provider(store.clone(), PROVIDER.clone())
            .build()
            .map_err(|e| unusable(e.to_string()))?;
        Ok(Self { store, callers, retired: watch::Sender::new(false) })
    }

    /// Whether a leaf followed by its intermediates was issued under one of them: as of its last second, since whether it is
    /// valid now is another question.
    pub fn issued(&self, chain: &[CertificateDer<'_>]) -> bool {
        let [leaf, intermediates @ ..] = chain else { return false };
        let (Ok(expiry), Ok(leaf)) = (expiry_of(leaf), ParsedCertificate::try_from(leaf)) else {
            return false;
        };
        let then = UnixTime::since_unix_epoch(expiry.duration_since(UNIX_EPOCH).unwrap_or_default());
        let algorithms = PROVIDER.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&leaf, &self.store, intermediates, then, algorithms).is_ok()
    }

    /// One of them is not to be believed any more: what was proven by them is not enough for anything new. Tunnels made with
    /// them take no new stream, and open streams go on.
    pub fn retire(&self) {
        self.retired.send_replace(true);
    }

    pub fn are_retired(&self) -> bool {
        *self.retired.borrow()
    }

    pub(crate) fn retirement(&self) -> watch::Receiver<bool> {
        self.retired.subscribe()
    }
}

/// Ends when the roots are retired; never if they are dropped without that.
pub(crate) async fn retired(mut retirement: watch::Receiver<bool>) {
    if retirement.wait_for(|retired| *retired).await.is_err() {
        std::future::pending::<()>().await;
    }
}
