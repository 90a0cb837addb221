//! A TCP relay between one agent and the controller, so that a scenario can hold an agent's news by the node's name:
//! the connection stays, the bytes wait. It looks at no byte. Where there are several controllers it deals connections to
//! those that answer, as the address of a Service would. The way of a controller to the API server is one as well.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::Result;

use crate::netns::Netns;
use crate::sockets::Dial;

/// The relay of one agent.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    address: SocketAddr,
    listener: TcpListener,
}

#[derive(Debug, Default)]
struct Shared {
    gates: Mutex<Gates>,
    opened: Condvar,
}

#[derive(Debug, Default)]
struct Gates {
    hold_news: bool,
    hold_reports: bool,
    refuse: bool,
    /// New connections go to the first controller that answers, not to each in turn.
    in_order: bool,
    /// Connections up to this number are held, both ways.
    hold_old: u64,
    next: u64,
    connections: HashMap<u64, (TcpStream, TcpStream)>,
}

#[derive(Clone, Copy)]
enum Direction {
    /// Controller to agent.
    News,
    /// Agent to controller.
    Reports,
}

impl Shared {
    fn gates(&self) -> MutexGuard<'_, Gates> {
        self.gates.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Writes `bytes` of connection `id` once the gate of `direction` is open. The lock is kept while writing: when `hold`
    /// has returned, nothing passes any more.
    fn pass(&self, id: u64, direction: Direction, to: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
        let shut = |gates: &mut Gates| {
            let held = match direction {
                Direction::News => gates.hold_news,
                Direction::Reports => gates.hold_reports,
            };
            held || id <= gates.hold_old
        };
        let _open =
            self.opened.wait_while(self.gates(), shut).unwrap_or_else(|poisoned| poisoned.into_inner());
        to.write_all(bytes)
    }
}

impl Relay {
    /// Listens on loopback in `node` and connects to `controller` from there.
    pub fn start(node: &Netns, controller: SocketAddr) -> Result<Relay> {
        Self::start_spread(node, &[controller])
    }

    /// As `start`, to each of `controllers` in turn, or to the next that answers.
    pub fn start_spread(node: &Netns, controllers: &[SocketAddr]) -> Result<Relay> {
        let listener = node.run(|| TcpListener::bind(("127.0.0.1", 0)))??;
        let relay = Relay {
            shared: Arc::default(),
            address: listener.local_addr()?,
            listener: listener.try_clone()?,
        };
        let (shared, node, controllers) = (relay.shared.clone(), node.clone(), controllers.to_vec());
        std::thread::spawn(move || {
            let mut next = 0;
            while let Ok((agent, _)) = listener.accept() {
                let first = if shared.gates().in_order { 0 } else { next };
                let answering = (0..controllers.len()).find_map(|tried| {
                    let dial = Dial::to(controllers[(first + tried) % controllers.len()]);
                    node.run(|| dial.timeout(Duration::from_secs(2)).connect()).ok()?.ok()
                });
                next += 1;
                // With the controller away the agent's connection just ends, as it would without a relay.
                if let Some(controller) = answering {
                    let _ = splice(&shared, agent, controller);
                }
            }
        });
        Ok(relay)
    }

    /// Where the agent finds the controller.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on connects to the first controller as long as that answers.
    pub fn prefer_first(&self) {
        self.shared.gates().in_order = true;
    }

    /// Holds both directions.
    pub fn hold(&self) {
        let mut gates = self.shared.gates();
        gates.hold_news = true;
        gates.hold_reports = true;
    }

    /// Holds the connections that are open now, both ways; new ones are not.
    pub fn hold_open(&self) {
        let mut gates = self.shared.gates();
        gates.hold_old = gates.next;
    }

    /// Holds what the agent sends, so that it hears but is not heard.
    pub fn hold_reports(&self) {
        self.shared.gates().hold_reports = true;
    }

    /// Ends every open connection, and each new one at once.
    pub fn refuse(&self) {
        self.shared.gates().refuse = true;
        self.cut();
    }

    /// Lets everything flow that was held, and what follows.
    pub fn release(&self) {
        let mut gates = self.shared.gates();
        gates.hold_news = false;
        gates.hold_reports = false;
        gates.refuse = false;
        gates.hold_old = 0;
        self.shared.opened.notify_all();
    }

    /// Ends every open connection. The agent may connect again.
    pub fn cut(&self) {
        for (_, (agent, controller)) in self.shared.gates().connections.drain() {
            let _ = agent.shutdown(Shutdown::Both);
            let _ = controller.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if crate::bed::keeping() {
            return;
        }
        // SAFETY: shutdown on a listening socket we own; it makes the blocked accept return.
        unsafe { libc::shutdown(self.listener.as_raw_fd(), libc::SHUT_RDWR) };
        self.release();
        self.cut();
    }
}

fn splice(shared: &Arc<Shared>, agent: TcpStream, controller: TcpStream) -> std::io::Result<()> {
    for stream in [&agent, &controller] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(None)?;
    }
    let id = {
        let mut gates = shared.gates();
        if gates.refuse {
            return Ok(());
        }
        gates.next += 1;
        let id = gates.next;
        gates.connections.insert(id, (agent.try_clone()?, controller.try_clone()?));
        id
    };
    let copies = [
        (Direction::Reports, agent.try_clone()?, controller.try_clone()?),
        (Direction::News, controller, agent),
    ];
    for (direction, mut from, mut to) in copies {
        let shared = shared.clone();
        std::thread::spawn(move || {
            let mut buffer = [0u8; 16 << 10];
            while let Ok(length) = from.read(&mut buffer) {
                if length == 0 || shared.pass(id, direction, &mut to, &buffer[..length]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
            // The second direction to end forgets the connection.
            if let Direction::News = direction {
                shared.gates().connections.remove(&id);
            }
        });
    }
    Ok(())
}
