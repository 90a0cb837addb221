//! The eBPF object: embedded at build time, loaded once for the node's hooks and once more for each pod.

use crate::{
    Error, Options, PodAddresses,
    pins::{Pins, PodPin},
};
use aya::{
    Ebpf, EbpfLoader,
    programs::{CgroupSock, CgroupSockAddr, ProgramError, ProgramFd, ProgramType, SkLookup, SockOps},
    sys::{BpfHelper, is_helper_supported},
};
use std::borrow::Cow;
use weft_ebpf_common::{Address, PINNED};

static EMBEDDED: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/weft.o"));

/// `aya_log_common::Level`: Info, the level of the programs' lines; zero is off, and lets the verifier drop the code.
const LOG_INFO: u8 = 3;
const LOG_OFF: u8 = 0;
/// aya-log's ring buffer.
pub const LOGS: &str = "AYA_LOGS";

/// The object and how it is loaded.
#[derive(Debug)]
pub struct Object {
    bytes: Cow<'static, [u8]>,
    debug_log: bool,
    /// bpf_set_retval came with kernel 5.18; without it a refused connect says EPERM.
    has_set_retval: u8,
}

impl Object {
    pub fn open(options: &Options) -> Result<Object, Error> {
        let bytes = match &options.object {
            Some(path) => Cow::Owned(
                std::fs::read(path).map_err(Error::io(format!("{} could not be read", path.display())))?,
            ),
            None => Cow::Borrowed(EMBEDDED),
        };
        if bytes.is_empty() {
            return Err(Error::NoObject);
        }
        let probe = is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval);
        Ok(Object { bytes, debug_log: options.debug_log, has_set_retval: probe.unwrap_or(false).into() })
    }

    /// Loads with the pinned maps, making and pinning those that are missing.
    pub fn load(&self, pins: &Pins) -> Result<Ebpf, Error> {
        self.load_with(pins, &[])
    }

    /// The sk_lookup program of one pod, whose listener is bound to `port`.
    pub fn load_sk_lookup(
        &self,
        pins: &Pins,
        pin: PodPin,
        port: u16,
        addresses: &PodAddresses,
    ) -> Result<ProgramFd, Error> {
        let [v4, v6] = addresses.as_map_addresses().map(|address| address.octets());
        let globals: [(&'static str, &[u8]); 5] = [
            ("SLOT", &pin.slot.to_ne_bytes()),
            ("COOKIE", &pin.cookie.to_ne_bytes()),
            ("POD_V4", &v4),
            ("POD_V6", &v6),
            ("LISTENER_PORT", &u32::from(port).to_ne_bytes()),
        ];
        let mut ebpf = self.load_with(pins, &globals)?;
        let program: &mut SkLookup = program(&mut ebpf, "lookup")?;
        program.load().map_err(Error::program("lookup"))?;
        keep("lookup", program.fd())
    }

    fn load_with(&self, pins: &Pins, globals: &[(&'static str, &[u8])]) -> Result<Ebpf, Error> {
        let level = if self.debug_log { LOG_INFO } else { LOG_OFF };
        let mut loader = EbpfLoader::new();
        // No relocations against the kernel's types, so its BTF (megabytes) need not be parsed for every pod.
        loader.btf(None);
        loader.override_global("AYA_LOG_LEVEL", &level, true);
        loader.override_global("HAS_SET_RETVAL", &self.has_set_retval, true);
        for (name, value) in globals {
            loader.override_global(name, *value, true);
        }
        for name in PINNED {
            loader.map_pin_path(name, pins.map(name));
        }
        if self.debug_log {
            // One buffer for all instances, with one reader.
            loader.map_pin_path(LOGS, pins.map(LOGS));
        } else {
            // Never written: as small as the kernel allows, since every pod's instance has one.
            loader.map_max_entries(LOGS, 4096);
        }
        loader.load(&self.bytes).map_err(|error| Error::Load(Box::new(error)))
    }
}

/// A connect hook, verified and loaded.
pub fn load_connect(ebpf: &mut Ebpf, name: &'static str) -> Result<ProgramFd, Error> {
    let program: &mut CgroupSockAddr = program(ebpf, name)?;
    program.load().map_err(Error::program(name))?;
    keep(name, program.fd())
}

/// The program that records the kubelet's connections.
pub fn load_sock_ops(ebpf: &mut Ebpf, name: &'static str) -> Result<ProgramFd, Error> {
    let program: &mut SockOps = program(ebpf, name)?;
    program.load().map_err(Error::program(name))?;
    keep(name, program.fd())
}

/// The program that sees sockets closed.
pub fn load_sock_release(ebpf: &mut Ebpf, name: &'static str) -> Result<ProgramFd, Error> {
    let program: &mut CgroupSock = program(ebpf, name)?;
    program.load().map_err(Error::program(name))?;
    keep(name, program.fd())
}

fn keep(name: &'static str, fd: Result<&ProgramFd, ProgramError>) -> Result<ProgramFd, Error> {
    let fd = fd.map_err(Error::program(name))?;
    fd.try_clone().map_err(Error::io(format!("the program {name} could not be kept")))
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, Error>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = aya::programs::ProgramError>,
{
    ebpf.program_mut(name).ok_or(Error::ObjectLacks(name))?.try_into().map_err(Error::program(name))
}

impl PodAddresses {
    /// IPv4 and IPv6 as the maps and the programs' constants hold them, unspecified for none.
    pub(crate) fn as_map_addresses(&self) -> [Address; 2] {
        [
            self.v4.map_or(Address::UNSPECIFIED, Address::from),
            self.v6.map_or(Address::UNSPECIFIED, Address::from),
        ]
    }
}
