//! What happens when controllers and a real API server lose each other.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};
use tonic::Code;
use weft_testbed::Metrics;
use weft_testbed::cluster::Builder;
use weft_testbed::kubernetes::ApiCluster;
use weft_testbed::netns::panic_text;
use weft_testbed::poll::{pause, until, until_some};

use super::{CALLERS, CERTIFICATES, NEWS, NODES, Shop, bearer};
use crate::caller::{Caller, Versions, code};

pub fn lost_delete(cluster: Builder) -> Result<()> {
    // Watches from etcd itself: what that has forgotten, no cache before it remembers.
    let flags = ["--watch-cache=false"];
    let shop = Shop::start(ApiCluster::start_with(cluster.name(), &NODES, 1, &flags)?)?;
    let (cluster, api) = (&shop.cluster, shop.cluster.api());
    let doomed = cluster.pod("shop/doomed", "west")?;
    let service = |name: &str| {
        let metadata = json!({"name": name, "namespace": "shop"});
        json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": [{"port": 80}]}})
    };
    for name in ["closing", "staying"] {
        api.apply(&service(name))?;
    }
    cluster.wait_enrolled(&[&doomed])?;
    let services = || -> Result<Vec<Vec<String>>> {
        let known = |dump: Value| {
            let keys = dump["services"].as_array().cloned().unwrap_or_default();
            let names = ["closing", "staying"].map(|name| format!("shop/{name}."));
            let is_known =
                |name: &String| keys.iter().any(|s| s["key"].as_str().is_some_and(|k| k.contains(name)));
            names.into_iter().filter(is_known).collect()
        };
        cluster.agents().map(|agent| Ok(known(agent.config_dump()?))).collect()
    };
    until(NEWS, "the Services are known", || Ok(services()?.iter().all(|known| known.len() == 2)))?;

    shop.undisturbed(|| {
        let lists = || -> Result<usize> {
            let asked = api.audited()?;
            Ok(asked.iter().filter(|r| r.verb == "list" && r.resource == "pods" && r.status == 200).count())
        };
        let before = lists()?;
        let log = cluster.controllers()[0].log()?.len();
        cluster.door(0)?.refuse();
        until(NEWS, "the controller has lost its watches", || {
            let log = cluster.controllers()[0].log()?.split_off(log);
            Ok(["pods", "services"].iter().all(|kind| log.contains(&format!("cannot watch {kind}:"))))
        })?;
        cluster.delete_pod(&doomed)?;
        api.delete(&service("closing"))?;
        // The last thing that happened is not forgotten.
        cluster.namespace("later", &[])?;
        cluster.control_plane().compact_storage()?;
        for agent in cluster.agents() {
            ensure!(agent.knows_as_enrolled(&doomed.uid())?, "{} heard of it past the cut", agent.node());
        }
        shop.serves()?;
        cluster.door(0)?.release();
        shop.wait_gone(&doomed)?;
        until(NEWS, "the deleted Service is gone, and the other is not", || {
            Ok(services()?.iter().all(|known| known == &["shop/staying."]))
        })?;
        ensure!(
            lists()? > before,
            "the watch of pods was taken up again: nothing was lost, and nothing is shown"
        );
        let late = cluster.pod("shop/late", "west")?;
        cluster.wait_enrolled(&[&late])
    })
}

pub fn replicas(cluster: Builder) -> Result<()> {
    let cluster = ApiCluster::start(cluster.name(), &NODES, 2)?;
    // Both find no root before either can make one.
    cluster.control_plane().pause_storage()?;
    for controller in cluster.controllers() {
        controller.start_unready()?;
    }
    until(NEWS, "both controllers have asked for the root", || {
        Ok(cluster.api().received("get", "secrets")? == 2)
    })?;
    cluster.control_plane().resume_storage()?;
    cluster.wait_controllers()?;
    let asked = cluster.api().audited()?.into_iter().filter(|request| request.resource == "secrets");
    let mut made: Vec<_> = asked.filter(|request| request.verb == "create").map(|r| r.status).collect();
    made.sort();
    ensure!(made == [201, 409], "two controllers that made a root were answered {made:?}");
    let shop = Shop::open(cluster)?;
    let cluster = &shop.cluster;
    let mut made = 0;
    for controller in cluster.controllers() {
        made += controller.log()?.matches("made the mesh's root of trust").count();
    }
    ensure!(made == 1, "{made} roots were made");
    equal(&shop)?;

    let refusals = [Code::PermissionDenied, Code::Unauthenticated, Code::InvalidArgument, Code::Internal];
    let (stop, root) = (AtomicBool::new(false), cluster.root()?);
    let east = cluster.agent("east")?;
    let caller = Caller {
        place: cluster.node("east")?,
        controller: east.controller_address(),
        root: &root,
        authorization: bearer(&cluster.agent_token("east")?),
    };
    let (worked, asked) = std::thread::scope(|scope| {
        // What an agent asks all day, of whoever answers.
        let asking = scope.spawn(|| -> Result<u32> {
            let mut issued = 0;
            while !stop.load(Ordering::SeqCst) {
                match caller.certificate(&shop.client.identity()) {
                    Ok(Ok(_)) => issued += 1,
                    Ok(Err(status)) => ensure!(!refusals.contains(&status.code()), "{status}"),
                    // Cut in the middle by the kill.
                    Err(_) => {}
                }
                pause(Duration::from_millis(20));
            }
            Ok(issued)
        });
        let worked = shop.undisturbed(|| {
            for (round, controller) in cluster.controllers().iter().enumerate() {
                refused_nothing(&controller.metrics()?)?;
                controller.kill()?;
                let fresh = cluster.pod(&format!("shop/fresh-{round}"), NODES[round])?;
                cluster.wait_enrolled(&[&fresh])?;
                controller.start()?;
                equal(&shop)?;
            }
            Ok(())
        });
        stop.store(true, Ordering::SeqCst);
        (worked, asking.join().map_err(|panic| anyhow!("the asking thread: {}", panic_text(&panic))))
    });
    worked?;
    let issued = asked??;
    ensure!(issued >= 10, "only {issued} certificates were asked for");
    cluster.controllers().iter().try_for_each(|controller| refused_nothing(&controller.metrics()?))
}

fn refused_nothing(metrics: &Metrics) -> Result<()> {
    for name in [CALLERS, CERTIFICATES] {
        let reasons = metrics.values_of(name, "reason");
        // A controller that has just started says so, and is asked again.
        let good = ["not_ready"];
        ensure!(reasons.iter().all(|reason| good.contains(&reason.as_str())), "{name}: {reasons:?}");
    }
    Ok(())
}

/// Waits until both controllers serve the same to every node: names and versions of resources, and the root.
fn equal(shop: &Shop) -> Result<()> {
    let (cluster, root) = (&shop.cluster, shop.cluster.root()?);
    for (node, pod) in [("east", &shop.client), ("west", &shop.web)] {
        let authorization = bearer(&cluster.agent_token(node)?);
        until(NEWS, &format!("both controllers serve the same to {node}"), || {
            let served = |number: usize| -> Result<(Versions, String)> {
                let controller = cluster.controllers()[number].address();
                let authorization = authorization.clone();
                let caller = Caller { place: cluster.node(node)?, controller, root: &root, authorization };
                let refused = |status| anyhow!("controller {number}: {status}");
                let chain = caller.certificate(&pod.identity())?.map_err(refused)?;
                let versions = caller.resources()?.map_err(refused)?;
                Ok((versions, chain.get(1).context("no root in the chain")?.clone()))
            };
            let (one, other) = (served(0)?, served(1)?);
            ensure!(one.1.as_bytes() == root && other.1.as_bytes() == root, "not the root that agents have");
            ensure!(one.0.keys().any(|(_, name)| *name == pod.uid()), "{} is not served", pod.name());
            let differing: Vec<_> =
                one.0.iter().filter(|(name, version)| other.0.get(*name) != Some(*version)).collect();
            ensure!(differing.is_empty() && one.0.len() == other.0.len(), "they differ in {differing:?}");
            Ok(true)
        })?;
    }
    Ok(())
}

pub fn restart(cluster: Builder) -> Result<()> {
    let shop = Shop::start(ApiCluster::start(cluster.name(), &NODES, 1)?)?;
    let cluster = &shop.cluster;
    let doomed = cluster.pod("shop/doomed", "east")?;
    cluster.wait_enrolled(&[&doomed])?;
    let root = cluster.root()?;
    let caller = Caller {
        place: cluster.node("east")?,
        controller: cluster.controllers()[0].address(),
        root: &root,
        authorization: bearer(&cluster.agent_token("east")?),
    };
    shop.undisturbed(|| {
        cluster.control_plane().kill_api()?;
        // Nobody can say now whether the token is good: that is no refusal, and is worth another try.
        let answer = caller.certificate(&shop.client.identity())?;
        ensure!(
            code(&answer) == Code::Unavailable,
            "without the API server a token is answered with {answer:?}"
        );
        let counted = cluster.controllers()[0].metrics()?.sum(CALLERS, &[("reason", "token_unchecked")]);
        ensure!(counted >= 1.0, "counted {counted} tokens that could not be checked");
        // An agent that loses its stream meanwhile goes on with what it knows.
        cluster.cut("east")?;
        shop.serves()?;
        cluster.control_plane().start_api()?;
        // At once, while the controller's watches are still broken.
        let fresh = cluster.pod("shop/fresh", "east")?;
        cluster.delete_pod(&doomed)?;
        cluster.wait_enrolled(&[&fresh])?;
        shop.wait_gone(&doomed)?;
        let answer = until_some(NEWS, "tokens are believed again", || {
            let answer = caller.certificate(&shop.client.identity())?;
            Ok(answer.ok())
        })?;
        ensure!(answer.len() == 2, "a chain of {}", answer.len());
        Ok(())
    })
}
