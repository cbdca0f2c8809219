//! The log: structured events on stderr, as text for people or as one JSON object a line.
//!
//! What is an incident for a library is often an ordinary day here. The crates that parse the VMM's messages and the guest's
//! rings write an error for each malformed one, which a guest could do a million times a second. Whatever matters of it comes back
//! to us as an error value, and is counted and logged once with its context; so their own lines are off unless asked
//! for by name ([`QUIET_CRATES`]).

use std::io::{self, IsTerminal};

use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Directive;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

use crate::config::LogFormat;
use crate::metrics::LogMessages;

/// The variable that overrides the configured level.
pub const VARIABLE: &str = "VSOCK_SIDECAR_LOG";

/// Crates that are silent unless the filter names them (`info,vhost_user_backend=debug`).
pub const QUIET_CRATES: [&str; 4] = ["vhost", "vhost_user_backend", "virtio_queue", "vm_memory"];

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter makes no sense.
    #[error(
        "log filter {filter:?} of {origin}: {problem}; write a level (error, warn, info, debug, trace, off) or \
         `info,vsock_sidecar::device=debug`"
    )]
    BadFilter {
        /// The filter as written.
        filter: String,
        /// Where it was written: the configuration or the variable.
        origin: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The process has a log already.
    #[error("the log is set up twice")]
    Twice,
}

/// Sends all events from now on to stderr. `level` is the configured level or filter; `VSOCK_SIDECAR_LOG` overrides it if it
/// is set and not empty. Warnings and errors that are written are counted in `messages`.
pub fn init(format: LogFormat, level: &str, messages: LogMessages) -> Result<(), LogError> {
    let variable = std::env::var(VARIABLE)
        .ok()
        .filter(|filter| !filter.trim().is_empty());
    let filter = match &variable {
        Some(filter) => parse_filter(filter, "the variable VSOCK_SIDECAR_LOG")?,
        None => parse_filter(level, "the configuration (log.level)")?,
    };
    let subscriber = tracing_subscriber::registry().with(filter).with(Count(messages));
    let set = match format {
        LogFormat::Text => {
            let text = fmt::layer()
                .with_writer(io::stderr)
                .with_ansi(io::stderr().is_terminal());
            subscriber.with(text).try_init()
        }
        LogFormat::Json => subscriber.with(json(io::stderr)).try_init(),
    };
    set.map_err(|_| LogError::Twice)
}

/// One object a line, the event's fields beside `timestamp` (RFC 3339, UTC), `level` and `target`.
fn json<S, W>(writer: W) -> impl Layer<S>
where
    S: Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
    W: for<'w> fmt::MakeWriter<'w> + 'static,
{
    fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_span_list(false)
        .with_writer(writer)
}

/// Checks that a filter would be taken, for the configuration's sake.
pub fn check_filter(filter: &str) -> Result<(), LogError> {
    parse_filter(filter, "the configuration (log.level)").map(drop)
}

fn parse_filter(filter: &str, origin: &'static str) -> Result<EnvFilter, LogError> {
    let bad = |problem: String| LogError::BadFilter {
        filter: filter.to_owned(),
        origin,
        problem,
    };
    let mut env_filter = EnvFilter::default();
    for name in QUIET_CRATES {
        env_filter = env_filter.add_directive(directive(&format!("{name}=off")).map_err(bad)?);
    }
    let mut directives = 0;
    for part in filter.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        env_filter = env_filter.add_directive(directive(part).map_err(bad)?);
        directives += 1;
    }
    if directives == 0 {
        return Err(bad("it is empty".to_owned()));
    }
    Ok(env_filter)
}

fn directive(text: &str) -> Result<Directive, String> {
    // A bare word that is no level would be taken for a module, at every level: `inof` would silence the whole log.
    if !text.contains(['=', '[']) && text.parse::<LevelFilter>().is_err() {
        return Err(format!("{text:?} is no level"));
    }
    text.parse()
        .map_err(|error| format!("{text:?} is not understood ({error})"))
}

/// Counts warnings and errors that the filter let through.
struct Count(LogMessages);

impl<S: Subscriber> Layer<S> for Count {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        match *event.metadata().level() {
            Level::ERROR => self.0.error.inc(),
            Level::WARN => self.0.warn.inc(),
            _ => {}
        }
    }
}
