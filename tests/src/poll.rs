//! Waiting: the one place where the bed sleeps.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Sleeps. Allowed here because no async runtime runs on the threads of the bed.
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// Asks every 20 ms until the answer is `Some`, and fails after `timeout` with `what` was waited for and the last error.
pub fn until_some<T>(timeout: Duration, what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        let last = match ask() {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if start.elapsed() > timeout {
            match last {
                Some(error) => return Err(error.context(format!("waited {timeout:?} until {what}"))),
                None => bail!("waited {timeout:?} in vain until {what}"),
            }
        }
        pause(Duration::from_millis(20));
    }
}

/// Asks every 20 ms until the answer is true.
pub fn until(timeout: Duration, what: &str, mut ask: impl FnMut() -> Result<bool>) -> Result<()> {
    until_some(timeout, what, || Ok(ask()?.then_some(())))
}
