//! Waiting between attempts to reach the controller.

use std::time::Duration;

use rand::Rng;

/// Bounds of the wait between two attempts. It doubles with every failure, and a random part of it is left out so that
/// the nodes of a cluster do not return to a restarted controller in step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// Wait after the first failure.
    pub min: Duration,
    /// Longest wait.
    pub max: Duration,
}

impl Default for Backoff {
    fn default() -> Backoff {
        Backoff { min: Duration::from_millis(100), max: Duration::from_secs(10) }
    }
}

impl Backoff {
    /// Wait before the attempt that follows `failures` failures in a row: between half of the doubled minimum and all
    /// of it.
    pub(crate) fn delay(&self, failures: u32) -> Duration {
        let doubled = self.min.saturating_mul(1 << failures.saturating_sub(1).min(20));
        doubled.min(self.max).mul_f64(rand::rng().random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_its_bound_and_stays_within_the_jitter() {
        let backoff = Backoff::default();
        for (failures, millis) in
            [(0, 100), (1, 100), (2, 200), (3, 400), (7, 6_400), (8, 10_000), (u32::MAX, 10_000)]
        {
            let full = Duration::from_millis(millis);
            for _ in 0..50 {
                let delay = backoff.delay(failures);
                assert!(delay <= full && delay >= full / 2, "{failures} failures: {delay:?}");
            }
        }
    }
}
