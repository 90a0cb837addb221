//! A workload comes to be known before a policy that it names. Weft's controller never lets that happen, because it sends
//! policies first; another one might, or a later one of ours. So here the test plays the controller
//! (`weft_testbed::StandIn`), beginning with what the real one served. Everything else is real: the two agents, the
//! client, a stranger who calls in plaintext, and an application that counts what reaches it.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use prost::Message as _;
use weft_proto::security::{Action, Authorization, Clause, Match, Rule, Scope, StringMatch, string_match};
use weft_proto::type_url;
use weft_proto::workload::{Address, address};
use weft_testbed::cluster::Builder;
use weft_testbed::poll::{pause, until};
use weft_testbed::traffic::call;
use weft_testbed::{Agent, Place, Pod, Server, StandIn};

use crate::policies::{FLIP, NEWS, cut, judged};
use crate::runner::Scenario;
use crate::shop::{Shop, still_alive};

pub const SCENARIOS: &[Scenario] = &[Scenario::new(
    "policy_held_back",
    "while a policy that is named has not come, not one byte of a new caller gets through",
    held_back,
)];

const APPLICATION: u16 = 7002;
const PAYLOAD: &str = "may I";
/// How long agents hold whom they cannot judge: less than they do by themselves, for a short story.
const HOLD: Duration = Duration::from_secs(3);
/// What a refusal may take beyond that, on a busy machine.
const SLACK: Duration = Duration::from_secs(2);
/// How much later than the callers a policy comes. Well within `HOLD`.
const LATE: Duration = Duration::from_millis(700);
/// Of that, what they have spent at the agent at least, by its own log.
const HELD: Duration = Duration::from_millis(200);

/// An Allow and a Deny of the client, each with what tells contents apart.
const ALLOW: &str = "shop/only-client@00000000";
const DENY: &str = "shop/no-client@00000000";
const TAG: &str = "@00000000";

fn held_back(cluster: Builder) -> Result<()> {
    let shop =
        Shop::open_enrolled(cluster.agent_flag("--hold-timeout").agent_flag(&HOLD.as_secs().to_string()))?;
    let west = shop.west()?;
    let mut application = Application::start(&shop.web)?;
    let legacy = shop.cluster.outside("legacy")?;
    let [v4, v6] = [shop.web.at(APPLICATION), shop.web.at_v6(APPLICATION)];
    let callers = [(&*shop.client, v4), (&*shop.client, v6), (&legacy, v4), (&legacy, v6)];
    let mut members = application.open(&callers[..2])?;
    let mut strangers = application.open(&callers[2..])?;

    // The workload names a policy, and that does not come: new callers are held, then refused.
    let mut controller = StandIn::take_over(&shop.cluster)?;
    name_policy(&mut controller, &shop.web, ALLOW)?;
    until_named(west, &shop.web, ALLOW)?;
    let began = Instant::now();
    let ended = while_they_call(&callers, || {
        application.all_alive(&mut members)?;
        application.all_alive(&mut strangers)
    })?;
    application.has_seen_no_more()?;
    for ((place, to), (result, at)) in callers.iter().zip(ended) {
        ensure!(result.is_err(), "{} was let in at {to}", place.name());
        let took = at - began;
        ensure!((HOLD..HOLD + SLACK).contains(&took), "{} was held at {to} for {took:?}", place.name());
    }
    until(NEWS, "both sides say why", || {
        let failed = failures(west, "destination", "policy_unknown")?;
        ensure!(failed == 4.0, "{failed} of 4 refusals are counted");
        let told = failures(shop.east()?, "source", "denied_by_peer")?;
        ensure!(told == 2.0, "the client's agent counts {told} of 2 refusals by its peer");
        for log in [west.log()?, shop.east()?.log()?] {
            ensure!(log.contains("have not come from the controller"), "an agent does not say why");
        }
        Ok(true)
    })?;

    // It comes while others are held: it decides about them at once, and about those who were in.
    let (ended, came) = held_until(&application, &callers, || {
        publish_policy(&mut controller, ALLOW, Action::Allow, &shop.client);
    })?;
    decided(&callers[..2], &ended[..2], came, true)?;
    decided(&callers[2..], &ended[2..], came, false)?;
    application.expect(2, 2 * line(PAYLOAD));
    for stream in &mut strangers {
        cut(stream, FLIP)?;
    }

    // One more is named and does not come: as long as it may be a Deny, the Allow that is there lets nobody in.
    name_policy(&mut controller, &shop.web, DENY)?;
    until_named(west, &shop.web, DENY)?;
    application.all_alive(&mut members)?;
    let (ended, came) = held_until(&application, &callers, || {
        publish_policy(&mut controller, DENY, Action::Deny, &shop.client);
    })?;
    decided(&callers, &ended, came, false)?;
    for stream in &mut members {
        cut(stream, FLIP)?;
    }

    until(NEWS, "the agent says by what it decided", || {
        // By the Allow: two strangers refused and two cut when it came, and two refused since.
        for (verdict, policy, expected) in
            [("allowed", ALLOW, 2.0), ("denied", ALLOW, 6.0), ("denied", DENY, 4.0)]
        {
            let count = judged(west, verdict, policy.trim_end_matches(TAG))?;
            ensure!(count == expected, "{count} of {expected} are {verdict} by {policy}");
        }
        let held = held_by_log(&west.log()?)?;
        ensure!(held.len() == 8, "the log tells of {} of 8 who were held when a policy came", held.len());
        let shortest = held.iter().min().copied().unwrap_or_default();
        ensure!(shortest >= HELD, "one of them had waited for {shortest:?} only");
        Ok(true)
    })?;
    application.has_seen_no_more()
}

/// Names a policy in what is in force for the pod, beside those that are named already.
fn name_policy(controller: &mut StandIn, pod: &Pod, policy: &str) -> Result<()> {
    let mut address = Address::decode(controller.get(type_url::ADDRESS, &pod.uid())?)?;
    let Some(address::Type::Workload(workload)) = &mut address.r#type else {
        bail!("{} is not a workload", pod.uid());
    };
    workload.authorization_policies.push(policy.to_owned());
    controller.put(type_url::ADDRESS, &pod.uid(), address.encode_to_vec());
    controller.publish();
    Ok(())
}

fn publish_policy(controller: &mut StandIn, name: &str, action: Action, whom: &Pod) {
    let principal = whom.identity().replace("spiffe://", "");
    let principal = StringMatch { match_type: Some(string_match::MatchType::Exact(principal)) };
    let matches = vec![Match { principals: vec![principal], ..Match::default() }];
    let policy = Authorization {
        scope: Scope::WorkloadSelector.into(),
        action: action.into(),
        rules: vec![Rule { clauses: vec![Clause { matches }] }],
        ..Authorization::default()
    };
    controller.put(type_url::AUTHORIZATION, name, policy.encode_to_vec());
    controller.publish();
}

/// Waits until what the agent's workers go by names `policy` for `pod`, heard from the controller that is there now.
fn until_named(agent: &Agent, pod: &Pod, policy: &str) -> Result<()> {
    until(NEWS, &format!("{} hears that {policy} is in force for {}", agent.node(), pod.name()), || {
        let dump = agent.config_dump()?;
        let workload =
            dump["workloads"].as_array().and_then(|all| all.iter().find(|w| w["uid"] == pod.uid()));
        let named = workload.context("it has not heard of the pod")?["policies"].as_array();
        Ok(dump["connected"] == true && named.is_some_and(|all| all.iter().any(|name| name == policy)))
    })
}

fn failures(agent: &Agent, reporter: &str, reason: &str) -> Result<f64> {
    let labels = [("reporter", reporter), ("reason", reason)];
    Ok(agent.metrics()?.sum("weft_tcp_connections_failed_total", &labels))
}

/// How a call ended, and when.
type Ended = (io::Result<()>, Instant);

/// Everybody calls at once, with a payload that is sent right away, and meanwhile `story` goes on.
fn while_they_call(
    callers: &[(&Place, SocketAddr)],
    story: impl FnOnce() -> Result<()>,
) -> Result<Vec<Ended>> {
    std::thread::scope(|scope| {
        let begin = |&(place, to): &(_, _)| scope.spawn(move || (call(place, to, PAYLOAD), Instant::now()));
        let calls: Vec<_> = callers.iter().map(begin).collect();
        story()?;
        calls.into_iter().map(|call| call.join().map_err(|_| anyhow!("a caller panicked"))).collect()
    })
}

/// They call, are held, and then `policy` comes. Returns how each call ended, and when the policy was published.
fn held_until(
    application: &Application,
    callers: &[(&Place, SocketAddr)],
    policy: impl FnOnce(),
) -> Result<(Vec<Ended>, Instant)> {
    let mut came = Instant::now();
    let ended = while_they_call(callers, || {
        pause(LATE);
        application.has_seen_no_more()?;
        came = Instant::now();
        policy();
        Ok(())
    })?;
    Ok((ended, came))
}

/// Each of `callers` was let in, or each was refused, and not before the policy came, but soon after.
fn decided(callers: &[(&Place, SocketAddr)], ended: &[Ended], came: Instant, let_in: bool) -> Result<()> {
    for ((place, to), (result, at)) in callers.iter().zip(ended) {
        let after = at.checked_duration_since(came);
        let after = after.with_context(|| format!("{} at {to}: {result:?} too early", place.name()))?;
        ensure!(result.is_ok() == let_in, "{} at {to}: {result:?}, {after:?} later", place.name());
        ensure!(after < FLIP, "{} at {to}: {result:?} only {after:?} after the policy", place.name());
    }
    Ok(())
}

/// How long those were at the agent in whole who were held when a policy came: let in, or refused without a byte.
fn held_by_log(log: &str) -> Result<Vec<Duration>> {
    let to = format!(":{APPLICATION} ");
    let was_held = |line: &&str| {
        let refused = line.contains("denied_by_policy") && line.contains("bytes_sent=0 bytes_received=0");
        line.contains(&to) && (refused || line.contains("connection complete"))
    };
    let time = |line: &str| {
        let (_, rest) = line.split_once("duration_ms=")?;
        Some(Duration::from_millis(rest.split_whitespace().next()?.parse().ok()?))
    };
    log.lines().filter(was_held).map(|line| time(line).with_context(|| line.to_owned())).collect()
}

/// Bytes of a line.
fn line(text: &str) -> u64 {
    text.len() as u64 + 1
}

/// An echo server that counts what reaches it, and what of that should have.
struct Application {
    server: Server,
    bytes: Arc<AtomicU64>,
    expected: (usize, u64),
}

impl Application {
    fn start(pod: &Pod) -> Result<Application> {
        let bytes = Arc::new(AtomicU64::new(0));
        let counter = bytes.clone();
        let server = Server::start(pod, APPLICATION, move |mut stream| {
            let mut buffer = [0; 1024];
            loop {
                let length = stream.read(&mut buffer)?;
                if length == 0 {
                    return stream.shutdown(Shutdown::Write);
                }
                counter.fetch_add(length as u64, Ordering::SeqCst);
                stream.write_all(&buffer[..length])?;
            }
        })?;
        Ok(Application { server, bytes, expected: (0, 0) })
    }

    /// Connections that stay open.
    fn open(&mut self, callers: &[(&Place, SocketAddr)]) -> Result<Vec<TcpStream>> {
        let streams = callers.iter().map(|(place, to)| place.connect(*to));
        let mut streams = streams.collect::<io::Result<Vec<_>>>()?;
        self.expect(streams.len(), 0);
        self.all_alive(&mut streams)?;
        Ok(streams)
    }

    fn all_alive(&mut self, streams: &mut [TcpStream]) -> Result<()> {
        for stream in streams {
            still_alive(stream, PAYLOAD)?;
            self.expect(0, line(PAYLOAD));
        }
        Ok(())
    }

    fn expect(&mut self, connections: usize, bytes: u64) {
        self.expected = (self.expected.0 + connections, self.expected.1 + bytes);
    }

    fn has_seen_no_more(&self) -> Result<()> {
        let seen = (self.server.callers().len(), self.bytes.load(Ordering::SeqCst));
        ensure!(
            seen == self.expected,
            "(connections, bytes) seen: {seen:?}, where {:?} may be",
            self.expected
        );
        Ok(())
    }
}
