//! Tells of refused system calls. The signal handler that sees them may neither allocate nor log.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tracing::warn;

use super::filter;
use crate::sys::readiness::PolledFd;
use crate::sys::sigsys;

/// The system calls that the filter refuses.
#[derive(Debug)]
pub struct Refusals {
    wake: OwnedFd,
    /// By number, how many were told of.
    told: BTreeMap<i64, u64>,
}

impl Refusals {
    pub(super) fn new(wake: OwnedFd) -> Refusals {
        Refusals {
            wake,
            told: BTreeMap::new(),
        }
    }

    /// Calls `count` with how many there were since it was last called, and names each call in the log once. Ends with an error
    /// of the runtime's only.
    ///
    /// # Errors
    /// Those of epoll(7).
    pub async fn report(self, count: impl Fn(u64)) -> io::Result<()> {
        let Refusals { wake, mut told } = self;
        let wake = PolledFd::new(wake, Interest::READABLE)?;
        loop {
            // Emptied before the counters are read: what comes after wakes again.
            wake.when_readable(|wake| Ok(rustix::io::read(wake, &mut [0; 8])?))
                .await?;
            for (number, now) in sigsys::refused() {
                let before = told.insert(number, now).unwrap_or(0);
                count(now.saturating_sub(before));
                if before == 0 {
                    let call = filter::name(number).unwrap_or("unknown");
                    warn!(
                        call,
                        number,
                        "a system call was refused by the seccomp filter; docs/confinement.md says what to do"
                    );
                }
            }
        }
    }
}
