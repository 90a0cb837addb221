//! Replicas and a Lease in memory, on a clock that runs faster than the real one's settings.

use std::sync::{Arc, Mutex};

use kube::core::Status;

use super::*;

const QUICK: Timing = Timing {
    duration: Duration::from_secs(1),
    deadline: Duration::from_millis(600),
    renew: Duration::from_millis(200),
    retry: Duration::from_millis(50),
};

#[derive(Default)]
struct World {
    lease: Option<Lease>,
    version: u64,
    /// Who cannot reach the API server.
    cut_off: Option<&'static str>,
    /// Whose next write is done, but not answered.
    unanswered: Option<&'static str>,
}

#[derive(Clone)]
struct Memory {
    world: Arc<Mutex<World>>,
    whose: &'static str,
}

fn error(code: u16) -> kube::Error {
    kube::Error::Api(Box::new(Status::failure("refused", "refused").with_code(code)))
}

impl Memory {
    fn with<T>(&self, act: impl FnOnce(&mut World) -> T) -> T {
        act(&mut self.world.lock().unwrap())
    }

    fn of(&self, whose: &'static str) -> Self {
        Self { world: self.world.clone(), whose }
    }

    fn spec(&self) -> LeaseSpec {
        self.with(|world| world.lease.clone().unwrap().spec.unwrap())
    }

    fn holder(&self) -> String {
        self.spec().holder_identity.unwrap()
    }
}

impl Leases for Memory {
    async fn read(&self) -> kube::Result<Option<Lease>> {
        self.with(|world| match world.cut_off == Some(self.whose) {
            true => Err(error(503)),
            false => Ok(world.lease.clone()),
        })
    }

    async fn write(&self, lease: &Lease) -> kube::Result<Lease> {
        let written = self.with(|world| {
            if world.cut_off == Some(self.whose) {
                return Err(error(503));
            }
            let known = world.lease.as_ref().map(|lease| lease.metadata.resource_version.clone());
            if known.unwrap_or_default() != lease.metadata.resource_version {
                return Err(error(409));
            }
            world.version += 1;
            let mut lease = lease.clone();
            lease.metadata.resource_version = Some(world.version.to_string());
            world.lease = Some(lease.clone());
            Ok((lease, world.unanswered.take_if(|whose| *whose == self.whose).is_some()))
        });
        match written? {
            (lease, false) => Ok(lease),
            (_, true) => Err(error(500)),
        }
    }
}

struct Replica {
    leads: watch::Receiver<bool>,
    metrics: Metrics,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

fn nobody() -> Memory {
    Memory { world: Arc::default(), whose: "nobody" }
}

fn start(memory: &Memory, name: &'static str) -> Replica {
    let (leads, receiver) = watch::channel(false);
    let (stop, stopped) = oneshot::channel();
    let metrics = Metrics::default();
    let leadership = Leadership { leads, metrics: metrics.clone() };
    let task = tokio::spawn(Election::new(memory.of(name), name.to_owned(), QUICK).run(leadership, stopped));
    Replica { leads: receiver, metrics, stop, task }
}

impl Replica {
    async fn until(&mut self, leads: bool) -> Duration {
        let start = Instant::now();
        let turned = timeout(Duration::from_secs(5), self.leads.wait_for(|now| *now == leads));
        turned.await.expect("in time").expect("alive");
        assert_eq!(self.metrics.leader.get(), i64::from(leads));
        start.elapsed()
    }

    fn leads(&self) -> bool {
        *self.leads.borrow()
    }
}

fn bidding(lease: Option<Lease>, age: Duration) -> Election<Memory> {
    let mut election = Election::new(nobody().of("a"), "a".to_owned(), TIMING);
    election.observe(lease);
    if let Some(observed) = &mut election.observed {
        observed.since -= age;
    }
    election
}

fn held_by(holder: &str, renewed: &str) -> Lease {
    let renewed = MicroTime(renewed.parse().unwrap());
    let spec = LeaseSpec {
        holder_identity: Some(holder.to_owned()),
        lease_duration_seconds: Some(15),
        renew_time: Some(renewed.clone()),
        acquire_time: Some(renewed),
        lease_transitions: Some(3),
        ..LeaseSpec::default()
    };
    let metadata = kube::api::ObjectMeta { resource_version: Some("7".to_owned()), ..metadata(NAME) };
    Lease { metadata, spec: Some(spec) }
}

#[tokio::test]
async fn what_counts_is_when_a_renewal_was_seen_and_not_what_the_other_clock_says() {
    for (holder, age, takes) in [("b", 14, false), ("b", 16, true), ("", 0, true), ("a", 0, true)] {
        for clock in ["2001-01-01T00:00:00Z", "2099-01-01T00:00:00Z"] {
            let election = bidding(Some(held_by(holder, clock)), Duration::from_secs(age));
            assert_eq!(election.bid().is_some(), takes, "held by {holder:?} for {age} s");
        }
    }
    // A renewal that is seen starts the count anew; the same one seen again does not.
    let mut election = bidding(Some(held_by("b", "2001-01-01T00:00:00Z")), Duration::from_secs(16));
    election.observe(Some(held_by("b", "2001-01-01T00:00:00Z")));
    assert!(election.bid().is_some());
    election.observe(Some(held_by("b", "2001-01-01T00:00:05Z")));
    assert!(election.bid().is_none());
}

#[tokio::test]
async fn a_bid_says_who_since_when_and_on_which_version() {
    let spec = |bid: Option<Lease>| bid.unwrap().spec.unwrap();
    let first = bidding(None, Duration::ZERO).bid().unwrap();
    assert_eq!(first.metadata.resource_version, None);
    assert_eq!(first.spec.unwrap().lease_transitions, Some(0));
    let renewal = bidding(Some(held_by("a", "2001-01-01T00:00:00Z")), Duration::ZERO).bid();
    assert_eq!(renewal.as_ref().unwrap().metadata.resource_version.as_deref(), Some("7"));
    let renewal = spec(renewal);
    assert_eq!((renewal.lease_transitions, renewal.lease_duration_seconds), (Some(3), Some(15)));
    assert!(renewal.acquire_time < renewal.renew_time);
    let taken = spec(bidding(Some(held_by("b", "2001-01-01T00:00:00Z")), Duration::from_secs(15)).bid());
    assert_eq!((taken.lease_transitions, taken.holder_identity.as_deref()), (Some(4), Some("a")));
}

#[tokio::test]
async fn one_leads_and_who_resigns_is_followed_at_once() {
    let memory = nobody();
    let mut one = start(&memory, "one");
    one.until(true).await;
    let mut other = start(&memory, "other");
    tokio::time::sleep(2 * QUICK.duration).await;
    assert!(one.leads() && !other.leads(), "a holder that renews was not respected");
    assert_eq!(memory.holder(), "one");
    drop(one.stop);
    one.task.await.unwrap();
    let waited = other.until(true).await;
    assert!(waited < QUICK.duration / 2, "{waited:?}");
    assert_eq!((memory.holder().as_str(), memory.spec().lease_transitions), ("other", Some(1)));
}

#[tokio::test]
async fn who_is_cut_off_stops_before_another_starts() {
    let memory = nobody();
    let mut one = start(&memory, "one");
    one.until(true).await;
    let mut other = start(&memory, "other");
    tokio::time::sleep(QUICK.renew * 3).await;
    memory.with(|world| world.cut_off = Some("one"));
    let gave_up = one.until(false).await;
    assert!(gave_up <= QUICK.deadline + QUICK.retry, "{gave_up:?}");
    assert!(!other.leads(), "two led at once");
    other.until(true).await;
    // It comes back, and does not take the Lease from its new holder.
    memory.with(|world| world.cut_off = None);
    tokio::time::sleep(2 * QUICK.duration).await;
    assert!(!one.leads() && other.leads());
}

#[tokio::test]
async fn a_short_failure_changes_nothing() {
    let memory = nobody();
    let mut one = start(&memory, "one");
    one.until(true).await;
    memory.with(|world| world.cut_off = Some("one"));
    tokio::time::sleep(QUICK.deadline / 2).await;
    memory.with(|world| world.cut_off = None);
    // A write that was done although it seemed to fail is known as one's own.
    memory.with(|world| world.unanswered = Some("one"));
    tokio::time::sleep(2 * QUICK.duration).await;
    assert!(memory.with(|world| world.unanswered.is_none()));
    assert!(one.leads() && !one.leads.has_changed().unwrap());
    assert_eq!(memory.spec().lease_transitions, Some(0));
}

#[tokio::test]
async fn whose_lease_was_taken_leads_no_more() {
    let memory = nobody();
    let mut one = start(&memory, "one");
    one.until(true).await;
    memory.with(|world| {
        world.version += 1;
        let mut lease = held_by("thief", "2001-01-01T00:00:00Z");
        lease.metadata.resource_version = Some(world.version.to_string());
        world.lease = Some(lease);
    });
    let noticed = one.until(false).await;
    assert!(noticed <= QUICK.renew + QUICK.retry, "{noticed:?}");
    drop(one.stop);
    one.task.await.unwrap();
    assert_eq!(memory.holder(), "thief", "another's Lease was given up");
}
