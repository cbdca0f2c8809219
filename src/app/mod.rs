//! Builds the program from its configuration: guests, listeners, admin server; starts it, changes it, drains it, ends it.
//!
//! Everything that can be refused is bound before anything runs, so that a start that fails leaves nothing behind, and a reload
//! that fails leaves everything as it was.
//!
//! # Order
//!
//! Start: the process is confined already, see [`crate::confine`]; vhost-user sockets, inbound listeners and admin addresses are
//! bound; device threads start, then sessions, then the listeners accept, then the admin server answers. Each step has a latch on
//! `/startupz`.
//!
//! Reload: see `reload`. The start is a reload of nothing.
//!
//! Drain: listeners stop accepting, devices refuse new inbound connections, `/readyz` says no; what is open goes on until it
//! ends by itself or the grace period is over, see `draining`. Then devices end what is left with RST, and everything is dropped.
//!
//! # Threads
//!
//! One thread, the one that [`run`] is called on, owns the [`Sidecar`] and does one thing after the other that others ask it for
//! (`events`): reloads, and the drain at the end. The rest sees values (`sidecar::Views`, `status`).

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, warn};

mod capture;
mod control;
mod draining;
mod events;
mod guests;
mod listeners;
mod reload;
mod sidecar;
mod source;
mod status;
mod watch;

pub use events::DrainRequest;
pub use sidecar::Sidecar;

use crate::admin::AdminError;
use crate::config::{Config, Text, Warning};
use crate::confine::{Confined, Surroundings};
use crate::guest::RingFault;
use crate::host::listen::ListenError;
use crate::kubevirt;
use crate::logging::Levels;
use crate::metrics::{LabelSets, Registry};
use crate::sys::sigbus;
use crate::vhost_user;
use crate::vsock::{CloseReason, Misbehavior, RefuseReason};
use control::Control;
use events::{Cause, Event};
use reload::Reloader;
use status::Status;

/// Why the program could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The vhost-user socket of a guest cannot be had.
    #[error("guest {guest}: {source}")]
    VhostUser {
        /// The guest.
        guest: String,
        /// What is wrong and what to do.
        source: vhost_user::BindError,
    },
    /// The vhost-user socket of a new guest is that of one that runs.
    #[error("guest {guest}: the vhost-user socket {} serves guest {holder}, {until}, or give guest {guest} another socket",
        socket.display())]
    SocketHeld {
        /// The new guest.
        guest: String,
        /// The socket.
        socket: PathBuf,
        /// The guest that has it.
        holder: String,
        /// For how long.
        until: Until,
    },
    /// The listener of an inbound rule cannot be had.
    #[error("guest {guest}: inbound rule {rule}: {source}{}", held.as_ref().map(|why| format!("; {why}")).unwrap_or_default())]
    Listen {
        /// The guest.
        guest: String,
        /// The rule.
        rule: String,
        /// What is wrong and what to do.
        source: Box<ListenError>,
        /// What to do about a listener of our own that is in the way.
        held: Option<String>,
    },
    /// An admin address cannot be had.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// KubeVirt's hook cannot be served.
    #[error(transparent)]
    KubeVirt(#[from] kubevirt::HookError),
    /// A thread, a runtime or a signal handler could not be set up.
    #[error("cannot start {what}: {source}")]
    Start {
        /// What could not be started.
        what: &'static str,
        /// The system's words.
        source: std::io::Error,
    },
}

/// For how long a guest keeps its socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Until {
    /// It has been removed, and goes with its connections.
    Gone,
    /// This configuration is the first that has it no more.
    Removed,
    /// The configuration has another socket for it, which needs a restart.
    Restart,
}

impl std::fmt::Display for Until {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Until::Gone => "which was removed and goes with its connections: wait until it is gone",
            Until::Removed => {
                "which goes with its connections and not before: remove that guest, reload, and add the new one then"
            }
            Until::Restart => "which keeps it until the sidecar is restarted: restart it",
        })
    }
}

impl Error {
    /// Whether the configuration or its surroundings are to blame, and not this process's resources.
    pub fn is_configuration(&self) -> bool {
        !matches!(
            self,
            Error::Start { .. } | Error::KubeVirt(kubevirt::HookError::Thread(_))
        )
    }
}

fn starting(what: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Start { what, source }
}

/// What a process runs.
pub struct Program {
    /// Where the configuration was read, `-` for standard input; it is read again when it changes.
    pub file: PathBuf,
    /// What was read there.
    pub text: Text,
    /// What the text says.
    pub config: Config,
    /// What is odd about it.
    pub warnings: Vec<Warning>,
    /// All metrics.
    pub registry: Arc<Registry>,
    /// What [`crate::confine::enter`] made of this process, before it had threads.
    pub confined: Confined,
    /// What is written of the log.
    pub levels: Levels,
    /// KubeVirt's hook, which is served once everything else runs, and whose Shutdown is as good as a SIGTERM.
    pub hook: Option<kubevirt::Hook>,
}

/// Runs until SIGTERM or SIGINT, or until a [`DrainRequest`]; then drains. A second signal ends the drain. The configuration is
/// read again when it changes and on SIGHUP.
pub fn run(program: Program) -> Result<(), Error> {
    let Program {
        file,
        text,
        config,
        warnings,
        registry,
        mut confined,
        levels,
        hook,
    } = program;
    reload::tell_warnings(&warnings);
    raise_descriptor_limit();
    if let Err(error) = sigbus::install() {
        warn!(%error, "cannot handle SIGBUS: a VMM that truncates guest memory would end this process");
    }
    let control = Control::start()?;
    // Before anything is bound: a signal that comes meanwhile would end us with socket files left behind, or, as the
    // first process of a container, be lost.
    let (mut terminate, mut interrupt, mut hangup) = {
        let _in_runtime = control.handle.enter();
        (
            signal(SignalKind::terminate()).map_err(starting("the SIGTERM handler"))?,
            signal(SignalKind::interrupt()).map_err(starting("the SIGINT handler"))?,
            signal(SignalKind::hangup()).map_err(starting("the SIGHUP handler"))?,
        )
    };
    if let Some(refusals) = confined.take_refusals() {
        let counter = registry.refused_system_calls();
        control.handle.spawn(async move {
            if let Err(error) = refusals.report(|calls| counter.inc_by(calls)).await {
                error!(%error, "system calls that are refused are not told of any more");
            }
        });
    }
    let file = Some(file).filter(|file| can_be_read_again(file));
    let status = Status::new(file.as_deref(), SystemTime::now());
    let sha256 = reload::identity(&config);
    registry.set_config(&sha256);
    status.in_force(sha256, SystemTime::now(), Vec::new());
    let sidecar = Sidecar::start_on(
        control,
        &config,
        Arc::clone(&registry),
        confined.confinement.clone(),
        Arc::clone(&status),
    )?;
    // Not earlier: a start that fails says one thing.
    confined.confinement.announce();
    let shut_down = sidecar.drain_request();
    let served = hook.map(|hook| hook.serve(move || shut_down.begin_for("KubeVirt's Shutdown")));
    let hook = match served.transpose() {
        Ok(hook) => hook,
        Err(error) => {
            sidecar.stop();
            return Err(error.into());
        }
    };
    let shortcut = sidecar.drain.shortcut();
    let request = sidecar.drain_request();
    let events = sidecar.events().sender();
    sidecar.control.handle.spawn(async move {
        let mut seen = 0;
        loop {
            let name = tokio::select! {
                Some(()) = terminate.recv() => "SIGTERM",
                Some(()) = interrupt.recv() => "SIGINT",
                Some(()) = hangup.recv() => {
                    let (cause, answer) = (Cause::Signal, None);
                    // A main thread that is gone has drained.
                    let _ = events.send(Event::Reload { cause, answer });
                    continue;
                }
                else => return,
            };
            seen += 1;
            if seen == 1 {
                request.begin_for(name);
            } else {
                warn!(signal = name, "ending at once");
                shortcut.cut();
            }
        }
    });
    if let Some(file) = &file {
        let events = sidecar.events().sender();
        watch::spawn(file.clone(), events).map_err(starting("the thread that watches the configuration"))?;
    }
    let policy = confined.policy.zip(file.as_deref().map(Surroundings::look));
    let reloader = Reloader {
        file,
        applied: text.digest(),
        refused: None,
        waits_for_departure: false,
        untold: None,
        policy,
        levels: Some(levels),
        registry,
        status,
    };
    sidecar.run(reloader);
    // Last: KubeVirt tells of the end of the virtual machine, for which the drain may have waited.
    drop(hook);
    Ok(())
}

/// Standard input has no more to say, nor have pipes: of `--config <(...)` nothing is left.
fn can_be_read_again(file: &Path) -> bool {
    let is_pipe = |file: &Path| std::fs::metadata(file).is_ok_and(|about| about.file_type().is_fifo());
    file != Path::new("-") && !is_pipe(file)
}

/// Every connection is a descriptor; the soft limit of most systems (1024) is for programs that use `select`.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current < limit.maximum || limit.maximum.is_none() {
        let raised = Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            warn!(%error, soft = ?limit.current, hard = ?limit.maximum, "cannot raise the limit of open files");
        }
    }
}

/// The label values that come from enums of the modules that count.
const LABELS: LabelSets = LabelSets {
    refused: RefuseReason::LABELS,
    closed: CloseReason::LABELS,
    misbehavior: Misbehavior::LABELS,
    ring_errors: RingFault::LABELS,
};
