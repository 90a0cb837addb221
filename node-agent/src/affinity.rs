//! `sessionAffinity: ClientIP`: which endpoint of each such service a pod was given last. It ends with the pod, and is not
//! carried over to a successor of this agent, which makes the same first choice as long as the endpoints are the same.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rand::{SeedableRng, rngs::StdRng};

/// Services that one pod may have an endpoint of before those are looked for that have expired.
const TIDY_AT: usize = 256;

/// One pod's, by service key. Locked for a lookup only, and only for services that ask for it.
#[derive(Debug, Default)]
pub struct Affinity(Mutex<HashMap<Arc<str>, Kept>>);

#[derive(Debug)]
struct Kept {
    endpoint: Arc<str>,
    until: Instant,
}

impl Affinity {
    /// The uid of the endpoint that was given last, unless that is too long ago.
    pub fn endpoint(&self, service: &str) -> Option<Arc<str>> {
        let kept = self.lock();
        kept.get(service).filter(|kept| kept.until > Instant::now()).map(|kept| kept.endpoint.clone())
    }

    /// Remembers what is given now.
    pub fn keep(&self, service: &Arc<str>, endpoint: Arc<str>, timeout: Duration) {
        let now = Instant::now();
        let mut kept = self.lock();
        if kept.len() >= TIDY_AT && !kept.contains_key(service) {
            kept.retain(|_, kept| kept.until > now);
        }
        kept.insert(service.clone(), Kept { endpoint, until: now + timeout });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Draws the same numbers for the same pod and service, so that every worker's and every successor's first choice is the
/// same one.
pub fn first_choice(pod: &str, service: &str) -> StdRng {
    let mut hasher = DefaultHasher::new();
    (pod, service).hash(&mut hasher);
    StdRng::seed_from_u64(hasher.finish())
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;

    #[test]
    fn kept_for_a_while_after_the_last_connection() {
        let affinity = Affinity::default();
        assert_eq!(affinity.endpoint("s"), None);
        affinity.keep(&"s".into(), "a".into(), Duration::from_secs(60));
        affinity.keep(&"t".into(), "b".into(), Duration::ZERO);
        assert_eq!(affinity.endpoint("s").as_deref(), Some("a"));
        assert_eq!(affinity.endpoint("t"), None);
    }

    #[test]
    fn what_has_expired_is_forgotten() {
        let affinity = Affinity::default();
        for i in 0..10 * TIDY_AT {
            affinity.keep(&format!("s{i}").into(), "a".into(), Duration::ZERO);
        }
        assert!(affinity.lock().len() <= TIDY_AT);
    }

    #[test]
    fn the_first_choice_is_the_same_for_the_same_pod_alone() {
        let draw = |pod| first_choice(pod, "s").random_range(0..1_000_000);
        assert_eq!(draw("a"), draw("a"));
        assert_ne!(draw("a"), draw("b"));
    }
}
