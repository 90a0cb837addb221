//! Stories of how one root of trust takes the place of another.

use std::io::Write as _;
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use weft_api::trust::Phase;
use weft_testbed::cluster::Builder;
use weft_testbed::evidence::TUNNEL_PORT;
use weft_testbed::kubernetes::KubeCluster;
use weft_testbed::poll::{pause, until};
use weft_testbed::sockets::ask;
use weft_testbed::traffic::Traffic;
use weft_testbed::{Cluster, Moment, Place};

use crate::kubernetes::{self, Calls};
use crate::rogue::{Forged, Rogue, SignedBy};
use crate::runner::Scenario;
use crate::shop::{Shop, marker};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "rotation",
        "the root is replaced under load: no connection is lost, and what the old one signed is refused",
        rotation,
    )
    .within(240),
    Scenario::new(
        "rotation_waits",
        "nothing is signed by a root that a node does not believe yet, and whom that waits for is said",
        waits,
    )
    .within(240),
    Scenario::new(
        "rotation_given",
        "a root that somebody else made signs, another one takes its place, and an unfit one does not",
        given,
    )
    .within(240),
];

/// Two changes of twenty seconds each, and what nodes take to follow.
const ROTATION: Duration = Duration::from_secs(120);
/// News that come to an agent, and its answer.
const NEWS: Duration = Duration::from_secs(15);

fn rotation(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let controller = shop.cluster.controller();
    let legacy = shop.cluster.outside("legacy")?;
    let before = roots(&shop.cluster)?;
    let former = Former { issuer: Arc::new(controller.issuer()?), shop: &shop, place: &legacy };
    ensure!(former.connect()? == 200, "the old root's certificate is refused before the rotation");

    let secret = marker("rotation");
    let capture = shop.cluster.capture()?;
    let start = Moment::now();
    let traffic = Traffic::start(&shop.client, &shop.echoes(), &secret, Duration::from_millis(3));
    let mut open =
        shop.echoes().map(|to| shop.client.connect(to)).into_iter().collect::<Result<Vec<_>, _>>()?;
    std::thread::scope(|scope| {
        let rotated = scope.spawn(|| controller.rotate(ROTATION));
        while !rotated.is_finished() {
            talk(&mut open, &secret)?;
            pause(Duration::from_millis(20));
        }
        rotated.join().map_err(|_| anyhow::anyhow!("the rotation panicked"))?
    })?;
    traffic.wait_for_success(&shop.echoes(), 50, NEWS)?;
    talk(&mut open, &secret).context("what was open before")?;
    let calls = all_went_well(traffic)?;
    ensure!(calls > 1000, "only {calls} connections were made");
    capture.stop()?.nothing_in_the_clear(start, &shop.enrolled(), secret.as_bytes())?;

    let after = roots(&shop.cluster)?;
    ensure!(after.len() == 1 && before.len() == 1 && after != before, "the old root is still believed");
    let record = std::fs::read_to_string(controller.state_dir().join("trust.json"))?;
    ensure!(
        record.matches("PRIVATE KEY-----").count() == 2,
        "the record holds another key than the new root's"
    );
    former.must_be_refused()?;
    let good = Rogue::with(Forged::good(&shop.client.identity()));
    let status =
        good.connect(&shop.cluster, &legacy, shop.web.at(TUNNEL_PORT), &shop.echoes()[0].to_string())?;
    ensure!(status == 200, "the new root's certificate is answered with {status}");

    // Whoever starts now still has the old root's file, from when the node was set up.
    shop.east()?.kill()?;
    shop.east()?.start()?;
    shop.cluster.wait_enrolled(&[&shop.web, &shop.client])?;
    shop.check_echo("after an agent's restart")?;
    controller.kill()?;
    controller.start()?;
    ensure!(roots(&shop.cluster)? == after, "a controller that starts has another root");
    former.must_be_refused()?;
    shop.check_echo("after the controller's restart")
}

fn waits(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let controller = shop.cluster.controller();
    let before = roots(&shop.cluster)?;
    shop.cluster.hold("east")?;
    let started = Instant::now();
    std::thread::scope(|scope| {
        let rotated = scope.spawn(|| controller.rotate(2 * ROTATION));
        until(NEWS, "the rotation waits for the node that is cut off", || {
            let status = controller.trust_status()?;
            Ok(status.phase == Phase::Announced && status.waiting_for == ["east"])
        })?;
        // For longer than it lasts at least.
        while started.elapsed() < Duration::from_secs(35) {
            ensure!(controller.trust_status()?.phase == Phase::Announced, "it does not wait");
            shop.check_echo("while a node is cut off")?;
            pause(Duration::from_millis(200));
        }
        let both = roots(&shop.cluster)?;
        ensure!(both.len() == 2 && both[0] == before[0], "{} roots are announced", both.len());
        let metrics = controller.metrics()?;
        ensure!(metrics.sum("weft_control_root_rotation_waiting", &[("node", "east")]) == 1.0);
        ensure!(metrics.sum("weft_control_root_rotation_phase", &[]) == 1.0);

        // A controller that starts in the middle goes on, and the old root is known by no more than one rotation.
        controller.kill()?;
        controller.start()?;
        shop.cluster.release("east")?;
        while !rotated.is_finished() {
            shop.check_echo("while the rotation goes on")?;
            pause(Duration::from_millis(50));
        }
        rotated.join().map_err(|_| anyhow::anyhow!("the rotation panicked"))?
    })?;
    let after = roots(&shop.cluster)?;
    ensure!(after.len() == 1 && after != before, "the old root is still believed");
    shop.check_echo("with the new root")
}

fn given(cluster: Builder) -> Result<()> {
    let files = Files::new()?;
    files.write(&Authority::root()?, None)?;
    let shop =
        Shop::open_enrolled(cluster.control_flag("--issuer").control_flag(&files.0.to_string_lossy()))?;
    let controller = shop.cluster.controller();
    let legacy = shop.cluster.outside("legacy")?;
    let first = roots(&shop.cluster)?;
    ensure!(first == [files.read("tls.crt")?], "another root is believed than the one that was given");
    let former = Former { issuer: Arc::new(controller.issuer()?), shop: &shop, place: &legacy };
    ensure!(former.connect()? == 200, "its certificate is refused");

    // One that does not fit its root changes nothing, and the reason can be read.
    let (root, other) = (Authority::root()?, Authority::root()?);
    files.write(&root.intermediate()?, Some(&other))?;
    until(NEWS, "it is said why what was given is not taken", || {
        let problem = controller.trust_status()?.problem.context("there is no problem")?;
        Ok(problem.contains("signs nothing that is believed"))
    })?;
    ensure!(roots(&shop.cluster)? == first, "a root that does not fit is believed");

    // An intermediate under another root, under load; then another intermediate under the same root.
    let traffic = Traffic::start(&shop.client, &shop.echoes(), "given", Duration::from_millis(5));
    files.write(&root.intermediate()?, Some(&root))?;
    let rotated = || -> Result<bool> {
        let status = controller.trust_status()?;
        Ok(status.phase == Phase::Steady && status.problem.is_none() && roots(&shop.cluster)? != first)
    };
    until(ROTATION, "the other root has taken its place", rotated)?;
    ensure!(
        roots(&shop.cluster)? == [root.pem.clone()],
        "another root is believed than the one that was given"
    );
    let serial = controller.trust_status()?.serial;
    files.write(&root.intermediate()?, Some(&root))?;
    until(NEWS, "another intermediate signs", || Ok(controller.trust_status()?.serial > serial))?;
    traffic.wait_for_success(&shop.echoes(), 100, NEWS)?;
    all_went_well(traffic)?;
    former.must_be_refused()
}

/// The files of an issuer.
struct Files(PathBuf);

impl Files {
    fn new() -> Result<Files> {
        let path = std::env::temp_dir().join(format!("weft-issuer-{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Files(path))
    }

    /// The key comes last, as when somebody copies them one after the other.
    fn write(&self, signs: &Authority, root: Option<&Authority>) -> Result<()> {
        if let Some(root) = root {
            std::fs::write(self.0.join("ca.crt"), &root.pem)?;
        }
        std::fs::write(self.0.join("tls.crt"), &signs.pem)?;
        Ok(std::fs::write(self.0.join("tls.key"), signs.key.serialize_pem())?)
    }

    fn read(&self, name: &str) -> Result<String> {
        Ok(std::fs::read_to_string(self.0.join(name))?)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Somebody else's.
struct Authority {
    pem: String,
    key: KeyPair,
    params: CertificateParams,
}

impl Authority {
    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    }

    fn root() -> Result<Authority> {
        let (params, key) = (Self::params("Example root"), KeyPair::generate()?);
        Ok(Authority { pem: params.self_signed(&key)?.pem().replace("\r\n", "\n"), key, params })
    }

    fn intermediate(&self) -> Result<Authority> {
        let (params, key) = (Self::params("Example intermediate"), KeyPair::generate()?);
        let pem = params.signed_by(&key, &Issuer::from_params(&self.params, &self.key))?.pem();
        Ok(Authority { pem, key, params })
    }
}

/// By command in a cluster with two replicas of the controller, while `url` is called. There are no callers but agents, so the
/// overlap that is for others is set to nothing.
pub fn in_a_cluster(kube: &KubeCluster, url: &str) -> Result<()> {
    let control = "deployment/weft-control";
    kube.kubectl(["set", "env", "-n", "weft-system", control, "WEFT_ROOT_OVERLAP=0s"])?;
    kubernetes::rolled_out(kube)?;
    let status = || -> Result<serde_json::Value> {
        let output = kubernetes::weft(kube, &["root", "status", "-o", "json"])?;
        ensure!(output.status.success(), "weft root status: {}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    let before = status()?;
    let traffic = Calls::start(kube, url)?;
    let output = kubernetes::weft(kube, &["root", "rotate"])?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "weft root rotate: {told}");
    let (calls, failed) = traffic.stop(kube)?;
    ensure!(calls > 20 && failed == 0, "{failed} of {calls} calls failed while the root was replaced");
    for part in ["is announced", "the new root signs", "done"] {
        ensure!(told.contains(part), "the command says nothing of {part:?}: {told}");
    }
    let after = status()?;
    let root = |status: &serde_json::Value| status["roots"][0]["serialNumber"].clone();
    let (count, phase) = (after["roots"].as_array().map(Vec::len), &after["phase"]);
    ensure!(count == Some(1) && phase == "steady", "after it there is {after}");
    ensure!(root(&after) != root(&before), "it is the same root as before");
    Ok(())
}

/// The certificates that are published, in PEM.
fn roots(cluster: &Cluster) -> Result<Vec<String>> {
    let pem = std::fs::read_to_string(cluster.controller().state_dir().join("root.pem"))?;
    let end = "-----END CERTIFICATE-----\n";
    let begin = "-----BEGIN CERTIFICATE-----";
    let certificates = pem.split_inclusive(end).filter_map(|text| Some(text[text.find(begin)?..].to_owned()));
    Ok(certificates.collect())
}

/// How many connections there were, none of which may have failed.
fn all_went_well(traffic: Traffic) -> Result<usize> {
    let calls = traffic.stop();
    let failed: Vec<_> = calls.iter().filter(|call| call.error.is_some()).collect();
    let (number, all) = (failed.len(), calls.len());
    ensure!(failed.is_empty(), "{number} of {all} connections failed: {:?}", failed.first());
    Ok(all)
}

/// One line there and back on each.
fn talk(streams: &mut [TcpStream], line: &str) -> Result<()> {
    for stream in streams {
        stream.flush()?;
        let answer = ask(stream, line).context("a connection that was open before is lost")?;
        ensure!(answer == line, "the answer is {answer:?}");
    }
    Ok(())
}

/// Somebody with the key of the root that was.
struct Former<'a> {
    issuer: Arc<rcgen::Issuer<'static, rcgen::KeyPair>>,
    shop: &'a Shop,
    place: &'a Place,
}

impl Former<'_> {
    /// The status with which a tunnel of theirs is answered.
    fn connect(&self) -> Result<u16> {
        let signed_by = SignedBy::Former(self.issuer.clone());
        let rogue = Rogue::with(Forged { signed_by, ..Forged::good(&self.shop.client.identity()) });
        let (tunnel, app) = (self.shop.web.at(TUNNEL_PORT), self.shop.echoes()[0].to_string());
        rogue.connect(&self.shop.cluster, self.place, tunnel, &app)
    }

    fn must_be_refused(&self) -> Result<()> {
        let unknown = [("reason", "unknown_issuer")];
        let refusals =
            || Ok::<_, anyhow::Error>(self.shop.west()?.metrics()?.sum("weft_tls_refused_total", &unknown));
        let before = refusals()?;
        if let Ok(status) = self.connect() {
            bail!("a certificate of the old root is answered with {status}");
        }
        until(Duration::from_secs(5), "the refusal is counted", || Ok(refusals()? == before + 1.0))
    }
}
