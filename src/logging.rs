//! The log: structured events on stderr, as text for people or as one JSON object a line.
//!
//! What is an incident for a library is often an ordinary day here. The crates that parse the VMM's messages,
//! the guest's rings and HTTP/2 write an error for each malformed one, which a guest could do a million times a
//! second. Whatever matters of it comes back to us as an error value, and is counted and logged once with its
//! context; so their own lines are off unless asked for by name ([`QUIET_CRATES`]).
//!
//! Events are written by a thread of their own. Stderr is a pipe whose reader may stall, and a device thread
//! that waits for it would be a guest that waits for it. A queue that is full drops events, counts them, and
//! says so when it can. The first event after a pause is written at once; those behind it are gathered for `GATHER` and
//! leave together: a guest that connects in a loop makes one a connection, and a wake-up and a system call for each would
//! take a processor from those who do the work.

use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::time::{Duration, Instant};

use prometheus::IntCounter;

use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Directive;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt, reload};

use crate::config::LogFormat;
use crate::metrics::LogMessages;

/// The variable that overrides the configured level.
pub const VARIABLE: &str = "VSOCK_SIDECAR_LOG";

/// Crates that are silent unless the filter names them (`info,vhost_user_backend=debug`).
pub const QUIET_CRATES: [&str; 5] = ["h2", "vhost", "vhost_user_backend", "virtio_queue", "vm_memory"];

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
    /// The thread that writes could not be made.
    #[error("cannot start the log's thread: {0}")]
    Thread(io::Error),
    /// The process has a log already.
    #[error("the log is set up twice")]
    Twice,
}

/// Sends all events from now on to stderr. `level` is the configured level or filter; `VSOCK_SIDECAR_LOG`
/// overrides it if it is set and not empty. Warnings and errors that pass are counted in `messages`. What was
/// logged is written at the latest when the guard is dropped.
pub fn init(format: LogFormat, level: &str, messages: LogMessages) -> Result<(LogGuard, Levels), LogError> {
    let variable = std::env::var(VARIABLE)
        .ok()
        .filter(|filter| !filter.trim().is_empty());
    let filter = match &variable {
        Some(filter) => parse_filter(filter, "the variable VSOCK_SIDECAR_LOG")?,
        None => parse_filter(level, "the configuration (log.level)")?,
    };
    let (queue, guard) = Queue::start(messages.dropped.clone()).map_err(LogError::Thread)?;
    let (filter, handle) = reload::Layer::new(filter);
    let levels = Levels {
        handle,
        overridden: variable.is_some(),
    };
    let subscriber = tracing_subscriber::registry().with(filter).with(Count(messages));
    let set = match format {
        LogFormat::Text => {
            let text = fmt::layer()
                .with_writer(queue)
                .with_ansi(io::stderr().is_terminal());
            subscriber.with(text).try_init()
        }
        LogFormat::Json => {
            // One flat object: the event's fields beside `timestamp` (RFC 3339, UTC), `level` and `target`.
            let json = fmt::layer()
                .json()
                .flatten_event(true)
                .with_current_span(false)
                .with_span_list(false);
            subscriber.with(json.with_writer(queue)).try_init()
        }
    };
    set.map_err(|_| LogError::Twice)?;
    Ok((guard, levels))
}

/// Changes what is written of the log that [`init`] has set up.
#[derive(Clone, Debug)]
pub struct Levels {
    handle: reload::Handle<EnvFilter, tracing_subscriber::Registry>,
    overridden: bool,
}

impl Levels {
    /// Whether `VSOCK_SIDECAR_LOG` decides and not the configuration.
    pub fn are_overridden(&self) -> bool {
        self.overridden
    }

    /// Writes what the configured level or filter lets through from now on, unless the variable decides.
    pub fn set(&self, level: &str) -> Result<(), LogError> {
        let filter = parse_filter(level, "the configuration (log.level)")?;
        if !self.overridden {
            // An error is a log that is gone, which nobody could be told.
            let _ = self.handle.reload(filter);
        }
        Ok(())
    }
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
    // A bare word that is no level would be taken for a module, at every level: `inof` would silence the whole
    // log.
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

/// Events that wait to be written; one is a few hundred bytes.
const QUEUE: usize = 4096;
/// How long events are gathered once one was written. A queue that fills up meanwhile would mean [`QUEUE`] events in this time, which
/// is more than they could be made in.
const GATHER: Duration = Duration::from_millis(5);
/// Bytes that are written at a time, unless one event is longer.
const WRITE: usize = 64 * 1024;
/// How long the end of the program waits for a reader that stalls.
const PATIENCE: Duration = Duration::from_secs(1);

enum Line {
    Event(Vec<u8>),
    /// Somebody waits for a flush.
    Wake,
}

/// The way to the thread that writes. Never blocks.
struct Queue {
    lines: SyncSender<Line>,
    dropped: IntCounter,
}

/// Sees to it that the log is complete: keep it until the end of the program.
#[must_use = "events that wait to be written are lost if it is not kept"]
#[derive(Debug)]
pub struct LogGuard {
    lines: SyncSender<Line>,
    /// Whoever sends a sender is answered when the queue has been written.
    flushes: Sender<SyncSender<()>>,
}

impl Queue {
    fn start(dropped: IntCounter) -> io::Result<(Queue, LogGuard)> {
        let (lines, queue) = sync_channel(QUEUE);
        let (flushes, waiting) = channel();
        let counted = dropped.clone();
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_lines(&queue, &waiting, &counted))?;
        Ok((
            Queue {
                lines: lines.clone(),
                dropped,
            },
            LogGuard { lines, flushes },
        ))
    }
}

impl Write for &Queue {
    /// One whole event: the formatting layers write each with one call.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        if let Err(TrySendError::Full(_)) = self.lines.try_send(Line::Event(event.to_vec())) {
            self.dropped.inc();
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> fmt::MakeWriter<'a> for Queue {
    type Writer = &'a Queue;

    fn make_writer(&'a self) -> &'a Queue {
        self
    }
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        let (done, flushed) = sync_channel(1);
        // A full queue needs no wake-up: the thread is writing, and looks here when it has written all.
        if self.flushes.send(done).is_ok() {
            let _ = self.lines.try_send(Line::Wake);
            let _ = flushed.recv_timeout(PATIENCE);
        }
    }
}

fn write_lines(queue: &Receiver<Line>, flushes: &Receiver<SyncSender<()>>, dropped: &IntCounter) {
    let (mut reported, mut reported_at) = (0, Instant::now());
    loop {
        let first = match queue.recv_timeout(PATIENCE) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let written = first.is_some();
        write_together(first.into_iter().chain(queue.try_iter()), &mut io::stderr());
        for done in flushes.try_iter() {
            // Who waits has lost patience.
            let _ = done.try_send(());
        }
        if dropped.get() > reported && reported_at.elapsed() >= PATIENCE {
            let events = dropped.get() - reported;
            (reported, reported_at) = (reported + events, Instant::now());
            tracing::warn!(
                events,
                "log events were dropped, since the log was not read fast enough"
            );
        }
        // Nobody wakes this thread while it sleeps.
        if written {
            std::thread::sleep(GATHER);
        }
    }
}

/// Writes events, as many as fit at a time.
fn write_together(lines: impl Iterator<Item = Line>, to: &mut impl Write) {
    let mut together = Vec::new();
    // Where the log cannot be written there is nobody to tell.
    for line in lines {
        let Line::Event(event) = line else { continue };
        if together.is_empty() {
            together = event;
        } else if together.len() + event.len() <= WRITE {
            together.extend_from_slice(&event);
        } else {
            let _ = to.write_all(&together);
            together = event;
        }
    }
    if !together.is_empty() {
        let _ = to.write_all(&together);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What it was given, a call each.
    #[derive(Default)]
    struct Calls(Vec<Vec<u8>>);

    impl Write for Calls {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.push(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn events_are_written_together_and_none_is_cut() {
        let line = |byte: u8, len: usize| Line::Event(vec![byte; len]);
        let mut calls = Calls::default();
        let lines = [
            line(b'a', 10),
            Line::Wake,
            line(b'b', 20),
            line(b'c', WRITE),
            line(b'd', 2 * WRITE),
            line(b'e', 1),
        ];
        write_together(lines.into_iter(), &mut calls);
        let lengths: Vec<_> = calls.0.iter().map(Vec::len).collect();
        assert_eq!(lengths, [30, WRITE, 2 * WRITE, 1]);
        let first = [[b'a'; 10].as_slice(), &[b'b'; 20]].concat();
        assert_eq!(calls.0[0], first, "in their order");
        write_together([Line::Wake].into_iter(), &mut calls);
        assert_eq!(calls.0.len(), 4, "nothing is not written");
    }

    #[test]
    fn levels_and_module_filters_are_taken() {
        for filter in [
            "info",
            "WARN",
            "off",
            "info,vsock_sidecar::device=debug",
            " debug , vhost_user_backend=trace",
            "x[span]=info",
        ] {
            check_filter(filter).unwrap_or_else(|error| panic!("{error}"));
        }
    }

    /// `inof` would be the name of a module, and everything else would be silent.
    #[test]
    fn a_filter_with_a_typo_is_refused_by_name() {
        for (filter, part) in [
            ("inof", "inof"),
            ("info,debgu", "debgu"),
            ("a=b=c", "a=b=c"),
            ("vsock=lots", "vsock=lots"),
        ] {
            let error = check_filter(filter).unwrap_err().to_string();
            assert!(
                error.contains(&format!("{filter:?}")) && error.contains(&format!("{part:?}")),
                "{error}"
            );
            assert!(error.contains("log.level"), "{error}");
        }
        for filter in ["", " ", ","] {
            assert!(
                check_filter(filter)
                    .unwrap_err()
                    .to_string()
                    .contains("it is empty")
            );
        }
    }
}
