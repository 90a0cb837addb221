//! Whom this node believes: the bundle of roots that the controller sends, the only source of roots for its connections. A new
//! bundle is written down before it is in force, beside the admin socket, so that a successor does not believe an older one
//! and knows the controller by it.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use prost::Message;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tracing::warn;
use weft_api::trust::SERIAL_LINE;
use weft_proto::node::TrustBundle;
use weft_transport::Roots;
use weft_xds::CaSource;

/// A bundle in force.
#[derive(Debug)]
pub struct Trust {
    pub serial: u64,
    pub roots: Arc<Roots>,
    /// The one of them under which certificates are issued now.
    pub signer: Roots,
    certificates: Vec<CertificateDer<'static>>,
}

impl Trust {
    /// Whether it believes all that `other` does.
    pub fn covers(&self, other: &Trust) -> bool {
        other.certificates.iter().all(|root| self.certificates.contains(root))
    }
}

impl TryFrom<&TrustBundle> for Trust {
    type Error = anyhow::Error;

    fn try_from(bundle: &TrustBundle) -> anyhow::Result<Self> {
        let certificates: Vec<_> = bundle.roots.iter().map(|der| CertificateDer::from(der.clone())).collect();
        let signer = certificates.iter().find(|root| Sha256::digest(root).as_slice() == bundle.signer);
        let signer = signer.context("the root that signs is not among the roots")?.clone();
        let (roots, signer) = (Arc::new(Roots::new(certificates.clone())?), Roots::new([signer])?);
        Ok(Self { serial: bundle.serial, roots, signer, certificates })
    }
}

/// Keeps the newest bundle.
#[derive(Debug)]
pub struct Keeper {
    path: PathBuf,
    current: watch::Sender<Option<Arc<Trust>>>,
}

impl Keeper {
    /// `path` is where bundles are written down.
    pub fn new(path: PathBuf) -> Self {
        Self { path, current: watch::Sender::default() }
    }

    /// The bundle in force; None until the controller has sent one.
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<Trust>>> {
        self.current.subscribe()
    }

    /// Takes in a `weft.node.v1.TrustBundle` from the controller. One that is older than what this node has believed changes
    /// nothing; one that cannot be believed is an error.
    pub fn take(&self, encoded: &[u8]) -> anyhow::Result<()> {
        let bundle = TrustBundle::decode(encoded)?;
        let trust = Trust::try_from(&bundle)?;
        let known = self.current.borrow().as_ref().map(|trust| trust.serial);
        let written = read(&self.path).map(|pem| serial_of(&pem)).unwrap_or_else(|error| {
            warn!("{error:#}: not known what was believed before");
            0
        });
        let newest = written.max(known.unwrap_or_default());
        if trust.serial < newest {
            warn!(
                serial = trust.serial,
                newest,
                "the controller wants roots believed that are older than those this node believes; after its state was \
                 restored from a back-up, `weft-agent forget-versions` makes this node believe it"
            );
            return Ok(());
        }
        if trust.serial > written
            && let Err(error) = self.write(&trust)
        {
            // Better than to believe a root that is let go, or not to believe one that signs.
            warn!("{error:#}: a successor of this agent may believe older roots");
        }
        if known != Some(trust.serial) {
            self.current.send_replace(Some(Arc::new(trust)));
        }
        Ok(())
    }

    /// Forgets all of it: any bundle is believed next.
    pub fn forget(&self) -> anyhow::Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| self.path.display().to_string());
            }
            _ => {}
        }
        self.current.send_replace(None);
        Ok(())
    }

    /// By what the controller is known: the certificates in `file`, or those of the newest bundle, whichever is newer. A file
    /// that cannot be read is as good as none, once there was a good one.
    pub fn controller_ca(&self, file: PathBuf) -> anyhow::Result<CaSource> {
        let pem = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        ensure!(is_bundle(&pem), "{} holds no certificate", file.display());
        let (path, last) = (self.path.clone(), Mutex::new(pem));
        Ok(CaSource::new(move || {
            let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
            let candidates = [&file, &path].map(|path| fs::read(path).unwrap_or_default());
            // The later of two that are equally new.
            let newest = candidates.into_iter().filter(|pem| is_bundle(pem)).max_by_key(|pem| serial_of(pem));
            if let Some(newest) = newest {
                *last = newest;
            }
            last.clone()
        }))
    }

    fn write(&self, trust: &Trust) -> anyhow::Result<()> {
        let context = || self.path.display().to_string();
        if let Some(parent) = self.path.parent() {
            fs::create_dir_all(parent).with_context(context)?;
        }
        let mut text = format!("{SERIAL_LINE}{}\n", trust.serial);
        for root in &trust.certificates {
            text.push_str("-----BEGIN CERTIFICATE-----\n");
            for line in STANDARD.encode(root).as_bytes().chunks(64) {
                text.push_str(&String::from_utf8_lossy(line));
                text.push('\n');
            }
            text.push_str("-----END CERTIFICATE-----\n");
        }
        // Of its own, since an agent and its successor may both be writing.
        let new = self.path.with_extension(format!("trust.{}", std::process::id()));
        let written = File::create(&new).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.and_then(|()| fs::rename(&new, &self.path)).with_context(context)
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.with_context(|| path.display().to_string()),
    }
}

fn is_bundle(pem: &[u8]) -> bool {
    let mut certificates = CertificateDer::pem_slice_iter(pem).peekable();
    certificates.peek().is_some() && certificates.all(|certificate| certificate.is_ok())
}

/// 0 where a file does not say.
fn serial_of(pem: &[u8]) -> u64 {
    let first = pem.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let text = std::str::from_utf8(first).unwrap_or_default();
    text.strip_prefix(SERIAL_LINE).and_then(|serial| serial.trim().parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    fn root() -> Vec<u8> {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.self_signed(&key).expect("signed").der().to_vec()
    }

    fn bundle(serial: u64, roots: &[&Vec<u8>], signer: &[u8]) -> Vec<u8> {
        let roots = roots.iter().map(|root| (*root).clone()).collect();
        TrustBundle { serial, roots, signer: Sha256::digest(signer).to_vec() }.encode_to_vec()
    }

    fn serial(keeper: &Keeper) -> Option<u64> {
        keeper.subscribe().borrow().as_ref().map(|trust| trust.serial)
    }

    #[test]
    fn nothing_older_is_believed_and_a_successor_knows() {
        let directory = std::env::temp_dir().join(format!("weft-trust-{}", std::process::id()));
        let path = directory.join("agent.trust");
        let (a, b, c) = (root(), root(), root());
        let keeper = Keeper::new(path.clone());
        assert_eq!(serial(&keeper), None);
        keeper.take(&bundle(5, &[&a], &a)).expect("taken");
        keeper.take(&bundle(7, &[&a, &b], &a)).expect("taken");
        keeper.take(&bundle(6, &[&c], &c)).expect("ignored");
        assert_eq!(serial(&keeper), Some(7));
        for unfit in [bundle(8, &[], &a), bundle(8, &[&a], &b), bundle(8, &[&vec![1]], &[1]), vec![0xff]] {
            keeper.take(&unfit).expect_err("no bundle");
        }
        assert_eq!(serial(&keeper), Some(7));
        let successor = Keeper::new(path.clone());
        successor.take(&bundle(5, &[&a], &a)).expect("ignored");
        assert_eq!(serial(&successor), None);
        successor.take(&bundle(7, &[&a, &b], &a)).expect("taken");
        assert_eq!(serial(&successor), Some(7));
        successor.forget().expect("removed");
        successor.take(&bundle(5, &[&a], &a)).expect("taken");
        assert_eq!(serial(&successor), Some(5));
        fs::remove_dir_all(directory).expect("removed");
    }

    #[test]
    fn the_controller_is_known_by_the_newer_of_two() {
        let directory = std::env::temp_dir().join(format!("weft-ca-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("made");
        let (file, path) = (directory.join("ca.pem"), directory.join("agent.trust"));
        let (a, b) = (root(), root());
        let keeper = Keeper::new(path.clone());
        // As somebody copied it long ago, without a number.
        keeper.take(&bundle(3, &[&a], &a)).expect("taken");
        let long_ago = String::from_utf8(fs::read(&path).expect("there")).expect("text");
        let long_ago = long_ago.split_once('\n').expect("lines").1.to_owned();
        fs::write(&file, &long_ago).expect("written");
        let ca = keeper.controller_ca(file.clone()).expect("there");
        let known = || {
            CertificateDer::pem_slice_iter(&ca.pem()).map(|c| c.expect("one").to_vec()).collect::<Vec<_>>()
        };
        keeper.take(&bundle(4, &[&b], &b)).expect("taken");
        assert_eq!(known(), std::slice::from_ref(&b));
        fs::write(&file, format!("{SERIAL_LINE}9\n{long_ago}")).expect("written");
        assert_eq!(known(), std::slice::from_ref(&a));
        fs::remove_file(&path).expect("removed");
        fs::write(&file, "-----BEGIN CERTIFICATE-----\nhalf").expect("written");
        assert_eq!(known(), [a], "the last good one");
        assert!(keeper.controller_ca(file).is_err());
        fs::remove_dir_all(directory).expect("removed");
    }
}
