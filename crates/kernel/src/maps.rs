//! The shared maps as user space writes them: at the rate of the control plane, so a lock each is fine. What the data
//! path writes (`OWN`) has none.

use crate::{Error, Target, Verdict};
use aya::{
    Ebpf,
    maps::{HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, SockMap, lpm_trie},
};
use std::{
    net::{IpAddr, TcpListener},
    os::fd::{AsFd, BorrowedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};
use weft_ebpf_common::{Address, CaptureKey, Counter, LpmKey, PodEntry};

/// BPF_EXIST: change an entry, do not make one.
const ONLY_EXISTING: u64 = 2;

/// Handles to every pinned map.
pub struct Maps {
    pods: Mutex<HashMap<MapData, u64, PodEntry>>,
    slots: Mutex<SockMap<MapData>>,
    capture: Mutex<LpmTrie<MapData, CaptureKey, u32>>,
    sources: Mutex<HashMap<MapData, Address, u32>>,
    counters: PerCpuArray<MapData, u64>,
    own: MapData,
}

impl Maps {
    pub fn take(ebpf: &mut Ebpf) -> Result<Maps, Error> {
        let Some(Map::SkStorage(own)) = ebpf.take_map("OWN") else { return Err(Error::ObjectLacks("OWN")) };
        Ok(Maps {
            pods: Mutex::new(take(ebpf, "PODS")?),
            slots: Mutex::new(take(ebpf, "SLOTS")?),
            capture: Mutex::new(take(ebpf, "CAPTURE")?),
            sources: Mutex::new(take(ebpf, "SOURCES")?),
            counters: take(ebpf, "COUNTERS")?,
            own,
        })
    }

    /// The socket storage in which the agent's own sockets are registered.
    pub fn own(&self) -> BorrowedFd<'_> {
        self.own.fd().as_fd()
    }

    pub fn pod(&self, cookie: u64) -> Result<Option<PodEntry>, Error> {
        match lock(&self.pods).get(&cookie, 0) {
            Ok(entry) => Ok(Some(entry)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(Error::map("PODS")(error)),
        }
    }

    pub fn pods(&self) -> Result<Vec<(u64, PodEntry)>, Error> {
        lock(&self.pods).iter().collect::<Result<_, _>>().map_err(Error::map("PODS"))
    }

    pub fn put_pod(&self, cookie: u64, entry: PodEntry) -> Result<(), Error> {
        lock(&self.pods).insert(cookie, entry, 0).map_err(Error::map("PODS"))
    }

    /// Holds a pod or lets it go. A pod that was removed meanwhile stays removed.
    pub fn set_hold(&self, cookie: u64, hold: bool) -> Result<(), Error> {
        let mut pods = lock(&self.pods);
        let entry = match pods.get(&cookie, 0) {
            Ok(entry) => entry,
            Err(MapError::KeyNotFound) => return Err(Error::NotEnrolled(cookie)),
            Err(error) => return Err(Error::map("PODS")(error)),
        };
        pods.insert(cookie, entry.with_hold(hold), ONLY_EXISTING).map_err(Error::map("PODS"))
    }

    pub fn remove_pod(&self, cookie: u64) -> Result<(), Error> {
        absent_is_fine(lock(&self.pods).remove(&cookie)).map_err(Error::map("PODS"))
    }

    /// Replaces the listener in a slot atomically; connections queued on the old one are still accepted there.
    pub fn fill_slot(&self, slot: u32, listener: &TcpListener) -> Result<(), Error> {
        lock(&self.slots).set(slot, listener, 0).map_err(Error::map("SLOTS"))
    }

    pub fn clear_slot(&self, slot: u32) -> Result<(), Error> {
        match lock(&self.slots).clear_index(&slot) {
            // An empty slot is EINVAL, an index beyond the map an error of aya's own.
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EINVAL) => {
                Ok(())
            }
            result => absent_is_fine(result).map_err(Error::map("SLOTS")),
        }
    }

    pub fn set_capture(&self, target: Target, verdict: Verdict) -> Result<(), Error> {
        lock(&self.capture).insert(&capture_key(target), verdict as u32, 0).map_err(Error::map("CAPTURE"))
    }

    pub fn clear_capture(&self, target: Target) -> Result<(), Error> {
        absent_is_fine(lock(&self.capture).remove(&capture_key(target))).map_err(Error::map("CAPTURE"))
    }

    pub fn capture_entries(&self) -> Result<Vec<(Target, Verdict)>, Error> {
        let mut entries = Vec::new();
        for entry in lock(&self.capture).iter() {
            let (key, verdict) = entry.map_err(Error::map("CAPTURE"))?;
            // What this layout cannot express is not ours to report.
            let target = LpmKey::from_parts(key.prefix_len(), key.data()).target().and_then(Target::from_key);
            entries.extend(target.zip(Verdict::from_u32(verdict)));
        }
        Ok(entries)
    }

    pub fn refuse_source(&self, ip: IpAddr) -> Result<(), Error> {
        lock(&self.sources).insert(Address::from(ip), 1, 0).map_err(Error::map("SOURCES"))
    }

    pub fn allow_source(&self, ip: IpAddr) -> Result<(), Error> {
        absent_is_fine(lock(&self.sources).remove(&Address::from(ip))).map_err(Error::map("SOURCES"))
    }

    pub fn refused_sources(&self) -> Result<Vec<IpAddr>, Error> {
        lock(&self.sources).keys().map(|key| Ok(key.map_err(Error::map("SOURCES"))?.into())).collect()
    }

    pub fn count(&self, counter: Counter) -> Result<u64, Error> {
        let values = self.counters.get(&(counter as u32), 0).map_err(Error::map("COUNTERS"))?;
        Ok(values.iter().sum())
    }
}

fn take<M: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, Error> {
    ebpf.take_map(name).ok_or(Error::ObjectLacks(name))?.try_into().map_err(Error::map(name))
}

/// A panic while a lock was held leaves nothing half written: each operation is one system call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result,
    }
}

fn capture_key(target: Target) -> lpm_trie::Key<CaptureKey> {
    let (bits, data) = target.key().into_parts();
    lpm_trie::Key::new(bits, data)
}
