//! Reading the configuration again: validate, then apply the difference, or refuse the whole of it.
//!
//! # Order
//!
//! Nothing is changed before everything that can be refused has been done: the file is read and checked, what was given up at
//! start is held against what it needs, new sockets are bound, new threads started. Then (`Sidecar::run_by`) the guests are
//! told, each between two turns of its device thread, then the listeners, and last those guests go that the file has no more.
//!
//! # What is told
//!
//! A file that is refused is told once for each content, however often its directory changes; who asks by name (SIGHUP, the admin
//! server) is always answered. A file that says what runs already is no event, unless the last one was refused.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::Access;
use sha2::{Digest, Sha256};
use tracing::{debug, error, info, warn};

use super::Until;
use super::events::Cause;
use super::sidecar::Sidecar;
use super::status::{LastReload, Status, listed, unix_seconds};
use crate::admin::ReloadAnswer;
use crate::config::{Change, Config, ConfigError, Effect, Text, Warning};
use crate::confine::{OutOfReach, Policy, Surroundings};
use crate::logging::Levels;
use crate::metrics::Registry;

/// Who changes the file and then asks for a reload is told what it changed, though the change was seen and taken meanwhile.
const MEANWHILE: Duration = Duration::from_secs(30);

/// Mistakes of one file that are logged.
const MAX_TOLD: usize = 10;

/// The digest of a text.
type TextDigest = [u8; 32];

/// Reads the configuration again.
pub(super) struct Reloader {
    /// `None`: it came from standard input or a pipe, which have no more to say.
    pub(super) file: Option<PathBuf>,
    /// The text that runs.
    pub(super) applied: TextDigest,
    /// The text that was refused last, and not followed by one that was not.
    pub(super) refused: Option<TextDigest>,
    /// What was refused may be taken when a guest is gone that is on its way out.
    pub(super) waits_for_departure: bool,
    /// When a change of the file was taken that nobody has asked for yet, and what it changed.
    pub(super) untold: Option<(Instant, Vec<String>)>,
    /// What landlock keeps this process to, and from where it was found.
    pub(super) policy: Option<(Policy, Surroundings)>,
    pub(super) levels: Option<Levels>,
    pub(super) registry: Arc<Registry>,
    pub(super) status: Arc<Status>,
}

/// Why a configuration was not taken.
enum Refusal {
    File(ConfigError),
    OutOfReach(Vec<String>),
    Start(super::Error),
    Log(String),
}

/// What a reload has come to.
enum Outcome {
    /// The text is the one that runs.
    Same,
    Applied(Box<Applied>),
}

struct Applied {
    config: Config,
    changes: Vec<String>,
    pending: Vec<String>,
}

impl Reloader {
    /// Reads the file and changes the sidecar accordingly.
    pub(super) fn reload(&mut self, sidecar: &mut Sidecar, cause: Cause) -> ReloadAnswer {
        let Some(file) = self.file.clone() else {
            let why = "the configuration came from standard input or a pipe: it cannot be read again";
            warn!(cause = cause.label(), "{why}");
            return ReloadAnswer::Unavailable(why.to_owned());
        };
        let text = match Text::read_again(&file) {
            Ok(text) => text,
            Err(mut error) => {
                if let (Some(why), Some(first)) = (self.kept_out(&file), error.diagnostics.first_mut()) {
                    first.help = Some(why);
                }
                let digest = Sha256::digest(error.to_string()).into();
                return self.refuse(cause, digest, Refusal::File(error));
            }
        };
        let digest = text.digest();
        let unasked = cause == Cause::File && !self.waits_for_departure;
        if unasked && (digest == self.applied && self.refused.is_none() || self.refused == Some(digest)) {
            debug!("the configuration's directory has changed, its content has not");
            return ReloadAnswer::Unchanged;
        }
        match self.attempt(sidecar, &text) {
            Ok(outcome) => self.succeed(cause, digest, outcome),
            Err(refusal) => self.refuse(cause, digest, refusal),
        }
    }

    fn attempt(&mut self, sidecar: &mut Sidecar, text: &Text) -> Result<Outcome, Refusal> {
        if text.digest() == self.applied {
            return Ok(Outcome::Same);
        }
        let (wanted, warnings) = text.check().map_err(Refusal::File)?;
        let config = wanted.as_far_as_running(&sidecar.config_of_all());
        self.is_within_reach(&config)?;
        let before = sidecar.config().log.level.clone();
        if let Some(levels) = &self.levels
            && before != config.log.level
        {
            // What the log would not take is refused before anything has changed.
            levels
                .set(&config.log.level)
                .map_err(|error| Refusal::Log(error.to_string()))?;
        }
        let change = Change::between(sidecar.config(), &config);
        sidecar.run_by(&config).map_err(|error| {
            if let Some(levels) = &self.levels {
                // It was in use until now.
                let _ = levels.set(&before);
            }
            Refusal::Start(error)
        })?;
        tell_warnings(&warnings);
        let left = Change::between(&config, &wanted);
        Ok(Outcome::Applied(Box::new(Applied {
            changes: listed(change.differences.iter().map(ToString::to_string)),
            pending: listed(left.of(Effect::Restart).map(ToString::to_string)),
            config: wanted,
        })))
    }

    /// Why a file cannot be read whose mode allows it: a link that leads elsewhere than at start.
    fn kept_out(&self, file: &Path) -> Option<String> {
        let (policy, here) = self.policy.as_ref()?;
        if rustix::fs::access(file, Access::READ_OK).is_err() {
            return None;
        }
        let needed = Policy::of_server([], &[file], here);
        let lack = policy.lacks(&needed).into_iter().next()?;
        let whose = "the configuration's file".to_owned();
        Some(OutOfReach { whose, lack }.to_string())
    }

    /// What was given up at start cannot be had back.
    fn is_within_reach(&self, config: &Config) -> Result<(), Refusal> {
        let Some((policy, here)) = &self.policy else {
            return Ok(());
        };
        let missing = policy.out_of_reach(config, here);
        match missing.is_empty() {
            true => Ok(()),
            false => Err(Refusal::OutOfReach(listed(
                missing.iter().map(ToString::to_string),
            ))),
        }
    }

    fn succeed(&mut self, cause: Cause, digest: TextDigest, outcome: Outcome) -> ReloadAnswer {
        let now = SystemTime::now();
        self.applied = digest;
        self.refused = None;
        self.waits_for_departure = false;
        let untold = self.untold.take().filter(|(when, _)| when.elapsed() < MEANWHILE);
        if let (Outcome::Same, Some((_, changes))) = (&outcome, untold) {
            // It is that reload that this one asks for.
            self.status.reloaded(LastReload {
                at: unix_seconds(now),
                cause: cause.label(),
                result: "applied",
                error: None,
                changes: changes.clone(),
            });
            return ReloadAnswer::Applied { changes };
        }
        self.registry.reloads().succeeded(now);
        let mut last = LastReload {
            at: unix_seconds(now),
            cause: cause.label(),
            result: "unchanged",
            error: None,
            changes: Vec::new(),
        };
        match outcome {
            Outcome::Same => {
                info!(
                    cause = cause.label(),
                    "configuration read again: it says what runs already"
                );
                self.status.reloaded(last);
                ReloadAnswer::Unchanged
            }
            Outcome::Applied(applied) => {
                let Applied {
                    config,
                    mut changes,
                    pending,
                } = *applied;
                let sha256 = identity(&config);
                self.registry.set_config(&sha256);
                self.status.in_force(sha256.clone(), now, pending.clone());
                for what in &pending {
                    warn!("{what}");
                }
                changes.extend(pending);
                info!(
                    cause = cause.label(),
                    sha256 = sha256.get(..12).unwrap_or_default(),
                    changes = changes.join("; "),
                    "configuration reloaded"
                );
                last.result = "applied";
                last.changes.clone_from(&changes);
                self.status.reloaded(last);
                self.untold =
                    (cause == Cause::File && !changes.is_empty()).then(|| (Instant::now(), changes.clone()));
                match changes.is_empty() {
                    // Comments, or defaults that are written out.
                    true => ReloadAnswer::Unchanged,
                    false => ReloadAnswer::Applied { changes },
                }
            }
        }
    }

    fn refuse(&mut self, cause: Cause, digest: TextDigest, refusal: Refusal) -> ReloadAnswer {
        let has_waited = std::mem::replace(&mut self.waits_for_departure, refusal.ends_with_a_departure());
        // Once the guest is gone, another reason may show.
        let is_news = self.refused != Some(digest) || has_waited && !self.waits_for_departure;
        if !is_news && cause == Cause::File {
            return ReloadAnswer::Refused(refusal.to_string());
        }
        self.refused = Some(digest);
        self.untold = None;
        self.registry.reloads().refused();
        refusal.tell(cause);
        let text = refusal.to_string();
        self.status.reloaded(LastReload {
            at: unix_seconds(SystemTime::now()),
            cause: cause.label(),
            result: "refused",
            error: Some(text.clone()),
            changes: Vec::new(),
        });
        ReloadAnswer::Refused(text)
    }
}

impl Refusal {
    fn ends_with_a_departure(&self) -> bool {
        matches!(
            self,
            Refusal::Start(super::Error::SocketHeld {
                until: Until::Gone,
                ..
            })
        )
    }

    fn tell(&self, cause: Cause) {
        let cause = cause.label();
        const WHAT: &str = "the new configuration is refused, the one before stays in use";
        match self {
            Refusal::File(refused) => {
                let mistakes = refused.diagnostics.len();
                for mistake in refused.diagnostics.iter().take(MAX_TOLD) {
                    let (line, column) = mistake.position.unwrap_or_default();
                    error!(
                        cause, mistakes, file = %mistake.file, line, column, path = %mistake.path,
                        error = %mistake.message, help = mistake.help.as_deref().unwrap_or_default(), "{WHAT}"
                    );
                }
            }
            Refusal::OutOfReach(missing) => {
                for error in missing.iter().take(MAX_TOLD) {
                    error!(cause, error, "{WHAT}");
                }
            }
            Refusal::Start(refused) => error!(cause, error = %refused, "{WHAT}"),
            Refusal::Log(error) => error!(cause, error, "{WHAT}"),
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Refusal::File(error) => write!(f, "{error}"),
            Refusal::OutOfReach(missing) => f.write_str(&missing.join("\n")),
            Refusal::Start(error) => write!(f, "{error}"),
            Refusal::Log(error) => f.write_str(error),
        }
    }
}

/// Writes to the log what is odd about a configuration that runs.
pub(super) fn tell_warnings(warnings: &[Warning]) {
    for Warning(warning) in warnings {
        let (line, column) = warning.position.unwrap_or_default();
        warn!(file = %warning.file, line, column, path = %warning.path, "{}", warning.message);
    }
}

/// What tells two effective configurations apart: comments and defaults that are written out make no difference.
pub(super) fn identity(config: &Config) -> String {
    // A configuration can always be written: its values have been read from such a text.
    let yaml = config.to_yaml().unwrap_or_default();
    let digest = Sha256::digest(yaml);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::super::events::Event;
    use super::*;

    /// Each reload takes its time, and who asks for a drain may have asked because of what the reloads do.
    #[test]
    fn a_drain_waits_for_no_reload_that_stands_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        let socket = dir.path().join("web.sock");
        let text = format!(
            "admin: {{listen: []}}\nguests: [{{name: web, cid: 3, vhostUser: {{socket: {}}}}}]\n",
            socket.display()
        );
        std::fs::write(&file, text).unwrap();
        let read = Text::read(&file).unwrap();
        let (config, _) = read.check().unwrap();
        let registry = Arc::new(Registry::new().unwrap());
        let sidecar = Sidecar::start(&config, Arc::clone(&registry)).unwrap();
        let events = sidecar.events().sender();
        let ask = || {
            let (answer, outcome) = oneshot::channel();
            let (cause, answer) = (Cause::Request, Some(answer));
            events.send(Event::Reload { cause, answer }).unwrap();
            outcome
        };
        let asked: Vec<_> = (0..100).map(|_| ask()).collect();
        sidecar.drain_request().begin();
        let reloader = Reloader {
            status: Status::new(Some(&file), SystemTime::now()),
            file: Some(file),
            applied: read.digest(),
            refused: None,
            waits_for_departure: false,
            untold: None,
            policy: None,
            levels: None,
            registry,
        };
        sidecar.run(reloader);
        for outcome in asked {
            assert!(outcome.blocking_recv().is_err(), "nobody has read the file");
        }
        assert!(!socket.exists());
    }
}
