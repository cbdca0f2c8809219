//! `vsock-sidecar demo`: a service, the sidecar and a guest in one process, so that everything can be seen without a VM
//! and without privileges.
//!
//! The sidecar is the real one, started as `run` starts it; only the guest is embedded
//! ([`embedded_guest`]): it connects to the vhost-user socket as QEMU would. With `--vm` it is Linux in QEMU instead
//! ([`vm`]). Nothing is left behind: sockets live in a directory that is removed at the end, Ctrl-C included.

mod bulk;
mod embedded;
mod http;
mod interrupt;
mod report;
mod service;
mod stage;
mod terminal;
#[cfg(test)]
mod tests;
pub mod vm;

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use self::embedded::Embedded;
use self::interrupt::Interrupt;
use self::stage::{GUEST_WEB_PORT, HTTP_PORT, Stage, UNRULED_PORT, Way};
use self::terminal::Terminal;
pub use self::vm::VmError;
use crate::config::ConfigError;
use crate::terminal::takes_colour;
use crate::{app, embedded_guest};

/// What the demo does.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Options {
    /// Leave everything running at the end, until Ctrl-C.
    pub keep: bool,
    /// Boot a real guest in QEMU instead of the embedded one.
    pub vm: bool,
}

/// Why the demo could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted.
        what: String,
        /// The system's words.
        source: io::Error,
    },
    /// Standard output is gone; there is nobody to show anything to.
    #[error("cannot write to standard output: {0}")]
    Output(#[source] io::Error),
    /// The demo's own configuration was refused: a bug.
    #[error("the demo's configuration: {0}")]
    Config(#[from] ConfigError),
    /// The sidecar did not start.
    #[error("the sidecar: {0}")]
    Sidecar(#[from] app::Error),
    /// The embedded guest failed.
    #[error("the embedded guest: {0}")]
    Guest(#[from] embedded_guest::Error),
    /// Something answered otherwise than it should: a bug of the sidecar or of the demo.
    #[error("{0}")]
    Unexpected(String),
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// The real guest could not be shown.
    #[error(transparent)]
    Vm(VmError),
}

impl From<VmError> for Error {
    fn from(error: VmError) -> Error {
        match error {
            VmError::Interrupted => Error::Interrupted,
            error => Error::Vm(error),
        }
    }
}

impl Error {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io {
            what: what.into(),
            source,
        }
    }
}

/// How much the bulk run moves.
#[derive(Clone, Copy, Debug)]
struct Effort {
    /// Bytes each way.
    bytes: u64,
    /// Time each way, whichever is over first.
    time: Duration,
}

const EFFORT: Effort = Effort {
    bytes: 1 << 30,
    time: Duration::from_secs(3),
};

/// Shows the demo on standard output.
pub fn run(options: Options) -> Result<(), Error> {
    let interrupt = Interrupt::install()?;
    let (term, no_color) = (std::env::var_os("TERM"), std::env::var_os("NO_COLOR"));
    let colour = io::stdout().is_terminal() && takes_colour(term.as_deref(), no_color.as_deref());
    let mut terminal = Terminal::new(io::stdout(), io::stdout().is_terminal(), colour);
    let shown = match options.vm {
        true => vm::show(&mut terminal, &interrupt, EFFORT, options),
        false => show(&mut terminal, &interrupt, EFFORT, options),
    };
    let told = match shown {
        Err(Error::Interrupted) => terminal.line("\n  interrupted; everything is taken down"),
        other => other,
    };
    match told {
        // `demo | head`: the reader has seen enough.
        Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// The demo with the embedded guest.
fn show(t: &mut Terminal, interrupt: &Interrupt, effort: Effort, options: Options) -> Result<(), Error> {
    t.title(
        "vsock-sidecar demo",
        "a service, the sidecar and a guest in one process: no VM, no root",
    )?;
    let stage = Stage::set_up(t, |place, _| Ok(Box::new(Embedded::boot(place)?)))?;
    acts(stage, t, interrupt, effort, options)
}

/// The demo, act by act, with whatever guest is on the stage.
fn acts(
    mut stage: Stage,
    t: &mut Terminal,
    interrupt: &Interrupt,
    effort: Effort,
    options: Options,
) -> Result<(), Error> {
    let rule = format!(
        "vsock 2:{HTTP_PORT} -> rule \"http\" -> tcp://{}",
        stage.services.http
    );
    t.act(1, "The guest fetches a page from the service", &rule)?;
    let (answer, took) = stage.guest.fetch(HTTP_PORT)?;
    page(t, &answer, took)?;
    interrupt.check()?;

    let rule = format!(
        "tcp://{} -> rule \"web\" -> vsock {}:{GUEST_WEB_PORT}",
        stage.web,
        stage.guest.cid()
    );
    t.act(2, "A TCP client fetches a page from a server in the guest", &rule)?;
    let started = Instant::now();
    let answer = http::get_tcp(stage.web, "/").map_err(Error::io("fetch the guest's page"))?;
    page(t, &answer, started.elapsed())?;
    interrupt.check()?;

    t.act(
        3,
        "The guest tries a port that no rule names",
        &format!("vsock 2:{UNRULED_PORT} -> no rule"),
    )?;
    let took = stage.guest.knock(UNRULED_PORT)?;
    t.in_line("RST: connect() fails at once, no timeout", Some(took))?;

    t.act(4, "Bulk data, every byte checked", stage.guest.bulk_remark())?;
    for way in [Way::GuestToHost, Way::HostToGuest] {
        stage.guest.bulk(way, t, interrupt, effort)?;
    }

    report::negotiation(&stage, t)?;
    report::flows(&stage, t)?;
    report::where_to_look(&stage, t, options)?;
    if options.keep {
        interrupt.wait();
        t.line("")?;
    }
    stage.take_down()
}

/// A page that was got, which must be one.
fn page(t: &mut Terminal, answer: &http::Answer, took: Duration) -> Result<(), Error> {
    t.out_line("GET / HTTP/1.1")?;
    t.in_line(&answer.status, Some(took))?;
    t.in_line(&answer.first_line(), None)?;
    if answer.status.contains(" 200 ") {
        Ok(())
    } else {
        Err(Error::Unexpected(format!("expected 200, got {}", answer.status)))
    }
}
