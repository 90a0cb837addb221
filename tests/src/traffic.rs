//! Traffic that goes on in the background while a scenario kills or replaces things: new connections one after the
//! other, each with a payload that must come back.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::capture::Moment;
use crate::place::Place;
use crate::poll::{pause, until};
use crate::sockets::{Dial, ask};

/// How a connection went.
#[derive(Clone, Debug)]
pub struct Call {
    pub at: Moment,
    pub to: SocketAddr,
    /// `None` where the payload came back.
    pub error: Option<String>,
}

/// Running traffic. Dropping it stops it.
#[derive(Debug)]
pub struct Traffic {
    stop: Arc<AtomicBool>,
    calls: Arc<Mutex<Vec<Call>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Traffic {
    /// From `place`, one thread a target, connects to echo servers over and over, `pace` apart; each sends a line with
    /// `payload` and waits for it to come back.
    pub fn start(place: &Place, targets: &[SocketAddr], payload: &str, pace: Duration) -> Traffic {
        let stop = Arc::new(AtomicBool::new(false));
        let calls = Arc::new(Mutex::new(Vec::new()));
        let threads = targets
            .iter()
            .map(|&to| {
                let (place, payload) = (place.clone(), payload.to_owned());
                let (stop, calls) = (stop.clone(), calls.clone());
                std::thread::spawn(move || {
                    while !stop.load(Ordering::SeqCst) {
                        let at = Moment::now();
                        let error = call(&place, to, &payload).err().map(|error| error.to_string());
                        let call = Call { at, to, error };
                        calls.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(call);
                        pause(pace);
                    }
                })
            })
            .collect();
        Traffic { stop, calls, threads }
    }

    /// The calls that ended so far.
    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Waits until `count` calls that began from now on went well to every one of `targets`.
    pub fn wait_for_success(&self, targets: &[SocketAddr], count: usize, timeout: Duration) -> Result<()> {
        let since = Moment::now();
        until(timeout, &format!("{count} calls went well to each of {targets:?}"), || {
            let calls = self.calls();
            let good = |to: &SocketAddr| {
                calls.iter().filter(|call| call.at >= since && call.to == *to && call.error.is_none()).count()
            };
            match targets.iter().find(|to| good(to) < count) {
                None => Ok(true),
                Some(to) => {
                    let error =
                        calls.iter().rev().find(|call| call.to == *to).and_then(|call| call.error.clone());
                    Err(anyhow!("the last to {to}: {}", error.unwrap_or_else(|| "went well".to_owned())))
                }
            }
        })
    }

    /// Stops, and returns every call.
    pub fn stop(mut self) -> Vec<Call> {
        self.end();
        self.calls()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.end();
    }
}

/// One connection to an echo server with a payload that must come back.
pub fn call(place: &Place, to: SocketAddr, payload: &str) -> std::io::Result<()> {
    let mut stream = place.dial(&Dial::to(to))?;
    let answer = ask(&mut stream, payload)?;
    if answer == payload { Ok(()) } else { Err(std::io::Error::other(format!("{to} answered {answer:?}"))) }
}
