//! What the process gives up for good before it serves anybody.
//!
//! # Theory of operation
//!
//! Guests, VMMs and peers send bytes, and our code is what stands between these and the process. Should it ever fail at that, what
//! the process can still do decides how far the damage goes. So it keeps what a configuration needs and no more:
//!
//! | what | by | out of reach from then on |
//! |---|---|---|
//! | `noNewPrivileges` | prctl(2) | privileges by set-user-ID programs; the other two need it |
//! | `landlock` | landlock(7) | files, directories and TCP ports that the configuration does not name; signals to and abstract sockets of other processes |
//! | `seccomp` | seccomp(2) | system calls that the program has no use for, such as execve, ptrace, mount, io_uring |
//!
//! # Order
//!
//! Landlock restricts the thread that asks and those that it starts. So [`enter`] is called on the first thread, after the
//! configuration is read and before any other thread exists: before the log's writer, the control thread with its resolver
//! threads, devices and sessions. Sockets are bound after it, as a reload will have to bind some too. Seccomp comes last of the
//! three and is set for all threads of the process, whoever may have started one.
//!
//! # What happens to what is refused
//!
//! A path or port gives EACCES. A system call gives EPERM if other arguments would do and else ENOSYS, at which libraries fall back
//! to older calls; it is counted and, the first time, named in the log ([`Refusals`]). Nothing is killed: see
//! docs/adr/0008-confinement.md.
//!
//! # Invariants
//!
//! 1. Nothing of a guest, VMM or peer is read before [`enter`] has returned.
//! 2. Nothing that the kernel lacks keeps the program from running; each lack is a warning that says so.
//! 3. A [`Policy`] only depends on the configuration and the place, so that whether a new configuration fits under it can be
//!    asked before it is applied ([`Policy::out_of_reach`]).

mod filter;
mod landlock;
mod policy;
mod refusals;

pub use policy::{Lack, OutOfReach, Policy, Surroundings};
pub use refusals::Refusals;

use std::os::fd::OwnedFd;
use std::path::Path;

use serde::Serialize;
use tracing::{info, warn};

use crate::config::{Config, Confinement as Wanted, LandlockMode, SeccompMode};
use crate::sys::sigsys;
use filter::Unlisted;

/// What became of one of the three.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase", tag = "state")]
pub enum State {
    /// Works.
    Active {
        /// As the configuration has it.
        #[serde(skip_serializing_if = "Option::is_none")]
        mode: Option<&'static str>,
        /// Version of the kernel's interface (landlock).
        #[serde(skip_serializing_if = "Option::is_none")]
        abi: Option<u32>,
        /// What this kernel leaves open of it.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        lacks: Vec<&'static str>,
    },
    /// The configuration does not want it.
    Off,
    /// It cannot be had.
    Unavailable {
        /// Why, and what would help.
        why: String,
    },
}

impl State {
    /// Whether it works, in part at least.
    pub fn is_active(&self) -> bool {
        matches!(self, State::Active { .. })
    }

    fn active(mode: Option<&'static str>) -> State {
        State::Active {
            mode,
            abi: None,
            lacks: Vec::new(),
        }
    }

    fn unavailable(error: impl std::error::Error) -> State {
        State::Unavailable {
            why: error.to_string(),
        }
    }

    /// In the words of the log.
    fn describe(&self) -> String {
        match self {
            State::Active { mode, abi, .. } => {
                let mode = mode.unwrap_or("on");
                abi.map_or_else(|| mode.to_owned(), |abi| format!("{mode} (ABI {abi})"))
            }
            State::Off => "off".to_owned(),
            State::Unavailable { .. } => "unavailable".to_owned(),
        }
    }
}

/// What the process has given up.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Confinement {
    /// PR_SET_NO_NEW_PRIVS.
    pub no_new_privileges: State,
    /// The filter of system calls.
    pub seccomp: State,
    /// The limits to files and ports.
    pub landlock: State,
}

impl Confinement {
    /// That of a process that has given up nothing.
    pub const NONE: Confinement = Confinement {
        no_new_privileges: State::Off,
        seccomp: State::Off,
        landlock: State::Off,
    };

    /// The three by their names in metrics.
    pub fn by_kind(&self) -> [(&'static str, &State); 3] {
        [
            ("no_new_privs", &self.no_new_privileges),
            ("seccomp", &self.seccomp),
            ("landlock", &self.landlock),
        ]
    }

    /// Writes to the log what is active, and a warning for each thing that is wanted and cannot be had.
    pub fn announce(&self) {
        info!(
            no_new_privs = self.no_new_privileges.describe(),
            seccomp = self.seccomp.describe(),
            landlock = self.landlock.describe(),
            "the process is confined"
        );
        for (kind, state) in self.by_kind() {
            match state {
                State::Unavailable { why } => {
                    warn!(
                        kind,
                        why, "the process is less confined than the configuration asks for"
                    );
                }
                State::Active { lacks, .. } if !lacks.is_empty() => {
                    info!(
                        kind,
                        lacks = lacks.join(", "),
                        "this kernel leaves open what later ones restrict"
                    );
                }
                State::Active { .. } | State::Off => {}
            }
        }
    }
}

/// A process that was confined.
#[derive(Debug)]
pub struct Confined {
    /// What is active.
    pub confinement: Confinement,
    /// What landlock keeps to; `None` where it is not active.
    pub policy: Option<Policy>,
    /// Readable after a system call was refused; `None` where none can be.
    wake: Option<OwnedFd>,
}

impl Confined {
    /// The system calls that are refused from now on. `None` where none can be, and from the second call.
    pub fn take_refusals(&mut self) -> Option<Refusals> {
        self.wake.take().map(Refusals::new)
    }
}

/// Confines the process as `config` says, which was read from `file`. Never fails: what cannot be had is left out, and the
/// outcome says so.
///
/// To be called once in a process and **before it has a second thread**: landlock would not hold for that one.
pub fn enter(config: &Config, file: &Path) -> Confined {
    enter_in(config, &Surroundings::look(file))
}

/// As [`enter`], in surroundings that hold more than the file.
pub fn enter_in(config: &Config, here: &Surroundings) -> Confined {
    enter_with(&config.confinement, || Policy::new(config, here))
}

/// The same for a program with another policy, which is asked for if landlock is wanted.
pub fn enter_with(wanted: &Wanted, policy: impl FnOnce() -> Policy) -> Confined {
    let mut confined = Confined {
        confinement: Confinement::NONE,
        policy: None,
        wake: None,
    };
    if wanted.no_new_privileges {
        confined.confinement.no_new_privileges = match rustix::thread::set_no_new_privs(true) {
            Ok(()) => State::active(None),
            Err(errno) => State::unavailable(errno),
        };
    }
    confined.confinement.landlock = match wanted.landlock {
        LandlockMode::Off => State::Off,
        LandlockMode::Enforce | LandlockMode::Files => {
            let policy = policy();
            let mode = match wanted.landlock {
                LandlockMode::Files => "files",
                _ => "enforce",
            };
            match landlock::restrict(&policy) {
                Ok(landlock::Outcome::Restricted { abi, lacks }) => {
                    confined.policy = Some(policy);
                    State::Active {
                        mode: Some(mode),
                        abi: Some(abi),
                        lacks,
                    }
                }
                Ok(landlock::Outcome::Unrestricted(why)) => State::Unavailable { why: why.to_owned() },
                Err(error) => State::unavailable(error),
            }
        }
    };
    // The last of the three: it refuses what the others are set with.
    confined.confinement.seccomp = match wanted.seccomp {
        SeccompMode::Off => State::Off,
        SeccompMode::Log => filtered(Unlisted::Logged, "log"),
        // Before the filter, so that there is no moment at which a refusal kills.
        SeccompMode::Enforce => match sigsys::handle(filter::partly_allowed()) {
            Ok(wake) => {
                confined.wake = Some(wake);
                filtered(Unlisted::Trapped, "enforce")
            }
            Err(error) => State::unavailable(error),
        },
    };
    confined
}

fn filtered(unlisted: Unlisted, mode: &'static str) -> State {
    match filter::apply(unlisted) {
        Ok(()) => State::active(Some(mode)),
        Err(error) => State::unavailable(error),
    }
}
