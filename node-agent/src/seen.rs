//! What this node has seen of the cluster, by the newest of the controller's states that it took in. It goes with every call
//! to the controller, and a replica that has seen less does not serve this node: so no state is ever older than the one
//! before. In a file beside the admin socket, since what the kernel holds outlives the agent, too; both end with the node.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::PathBuf,
};

use anyhow::{Context, anyhow};
use tokio::sync::watch;
use weft_xds::VersionVector;

#[derive(Debug)]
pub struct Seen {
    path: PathBuf,
    current: watch::Sender<VersionVector>,
}

impl Seen {
    /// What earlier agents of this node left there. A file that says nothing sensible is an error: nobody knows then what
    /// must not be believed.
    pub fn open(path: PathBuf) -> anyhow::Result<Self> {
        let seen = Self { path, current: watch::Sender::default() };
        seen.current.send_replace(seen.read()?);
        Ok(seen)
    }

    pub fn subscribe(&self) -> watch::Receiver<VersionVector> {
        self.current.subscribe()
    }

    pub fn current(&self) -> VersionVector {
        self.current.borrow().clone()
    }

    /// Adds what another state holds. Written down when this returns. That is a few hundred bytes in memory, as a rule (a
    /// node's /run is), and at most as often as the controller publishes.
    pub fn raise(&self, seen: &VersionVector) -> anyhow::Result<()> {
        if self.current.borrow().covers(seen) {
            return Ok(());
        }
        let mut all = self.current();
        all.merge(seen);
        let _lock = self.lock()?;
        // While one agent replaces another, both write.
        all.merge(&self.read()?);
        let new = self.path.with_extension("seen.new");
        let written = File::create(&new).and_then(|mut file| file.write_all(all.to_string().as_bytes()));
        written
            .and_then(|()| fs::rename(&new, &self.path))
            .with_context(|| self.path.display().to_string())?;
        self.current.send_replace(all);
        Ok(())
    }

    /// Forgets all of it: any state is believed next.
    pub fn forget(&self) -> anyhow::Result<()> {
        let _lock = self.lock()?;
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| self.path.display().to_string());
            }
            _ => {}
        }
        self.current.send_replace(VersionVector::default());
        Ok(())
    }

    fn read(&self) -> anyhow::Result<VersionVector> {
        let text = match fs::read_to_string(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(VersionVector::default()),
            text => text.with_context(|| self.path.display().to_string())?,
        };
        text.trim().parse().map_err(|error| {
            anyhow!(
                "{}: {error}; if the controller is to be believed whatever it says next, remove the file",
                self.path.display()
            )
        })
    }

    /// Held until the returned file is closed.
    fn lock(&self) -> anyhow::Result<File> {
        let path = self.path.with_extension("seen.lock");
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
        }
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        file.lock().with_context(|| path.display().to_string())?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(text: &str) -> VersionVector {
        text.parse().expect("a vector")
    }

    #[test]
    fn a_successor_knows_it_and_neither_lowers_what_the_other_wrote() {
        let dir = std::env::temp_dir().join(format!("weft-seen-{}", std::process::id()));
        let path = dir.join("agent.seen");
        let one = Seen::open(path.clone()).expect("no file yet");
        assert!(one.current().is_empty());
        one.raise(&VersionVector::default()).expect("nothing to write");
        assert!(!dir.exists());
        one.raise(&vector("pods=5,services=1")).expect("written");
        let other = Seen::open(path.clone()).expect("there");
        assert_eq!(other.current(), vector("pods=5,services=1"));
        other.raise(&vector("pods=9")).expect("written");
        one.raise(&vector("services=2")).expect("written");
        assert_eq!(Seen::open(path.clone()).expect("there").current(), vector("pods=9,services=2"));
        fs::write(&path, "7").expect("written");
        assert!(Seen::open(path.clone()).is_err());
        one.raise(&vector("services=3")).expect_err("what is there is not known");
        one.forget().expect("removed");
        assert!(one.current().is_empty() && Seen::open(path).expect("no file").current().is_empty());
        fs::remove_dir_all(dir).expect("removed");
    }
}
