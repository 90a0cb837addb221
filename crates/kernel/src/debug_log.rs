//! The programs' own lines, for developing them: read from their ring buffer by a thread and written as `tracing`
//! events. Nothing of this exists unless the option is set.

use crate::{Error, kernel::Shared, object::LOGS};
use aya_log::EbpfLogger;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{os::fd::AsFd, sync::Weak};

/// How often the thread looks whether the instance is still open, in milliseconds.
const LOOK_UP: u16 = 500;

/// Hands `log` records to `tracing`.
struct Bridge;

impl log::Log for Bridge {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        tracing::info!(target: "weft_ebpf", "{}", record.args());
    }

    fn flush(&self) {}
}

pub fn start(ebpf: &mut aya::Ebpf, instance: Weak<Shared>) -> Result<(), Error> {
    let mut logger = EbpfLogger::init_with_logger(ebpf, Bridge).map_err(|_| Error::ObjectLacks(LOGS))?;
    let read = move || {
        while instance.strong_count() > 0 {
            let mut ready = [PollFd::new(logger.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::from(LOOK_UP)).is_ok_and(|count| count > 0) {
                logger.flush();
            }
        }
    };
    std::thread::Builder::new()
        .name("weft-ebpf-log".into())
        .spawn(read)
        .map(drop)
        .map_err(Error::io("a thread for the programs' log could not be started"))
}
