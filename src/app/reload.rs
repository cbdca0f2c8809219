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

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use sha2::{Digest, Sha256};
use tracing::{debug, error, info, warn};

use super::events::Cause;
use super::sidecar::Sidecar;
use super::status::{LastReload, Status, listed, unix_seconds};
use crate::admin::ReloadAnswer;
use crate::config::{Change, Config, ConfigError, Effect, Text, Warning};
use crate::confine::{Policy, Surroundings};
use crate::logging::Levels;
use crate::metrics::Registry;

/// Mistakes of one file that are logged.
const MAX_TOLD: usize = 10;

/// The digest of a text.
type TextDigest = [u8; 32];

/// Reads the configuration again.
pub(super) struct Reloader {
    /// `None`: it came from standard input, which has no more to say.
    pub(super) file: Option<PathBuf>,
    /// The text that runs.
    pub(super) applied: TextDigest,
    /// The text that was refused last, and not followed by one that was not.
    pub(super) refused: Option<TextDigest>,
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
            let why = "the configuration came from standard input: it cannot be read again";
            warn!(cause = cause.label(), "{why}");
            return ReloadAnswer::Unavailable(why.to_owned());
        };
        let text = match Text::read(&file) {
            Ok(text) => text,
            Err(error) => {
                return self.refuse(
                    cause,
                    Sha256::digest(error.to_string()).into(),
                    Refusal::File(error),
                );
            }
        };
        let digest = text.digest();
        let unasked = cause == Cause::File;
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
        let config = wanted.as_far_as_running(sidecar.config());
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
                match changes.is_empty() {
                    // Comments, or defaults that are written out.
                    true => ReloadAnswer::Unchanged,
                    false => ReloadAnswer::Applied { changes },
                }
            }
        }
    }

    fn refuse(&mut self, cause: Cause, digest: TextDigest, refusal: Refusal) -> ReloadAnswer {
        let is_news = self.refused != Some(digest);
        if !is_news && cause == Cause::File {
            return ReloadAnswer::Refused(refusal.to_string());
        }
        self.refused = Some(digest);
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
