//! `vsock-sidecar demo`: a service, the sidecar and a guest in one process, so that everything can be seen without a VM
//! and without privileges.
//!
//! The sidecar is the real one, started as `run` starts it; only the guest is embedded
//! ([`embedded_guest`]): it connects to the vhost-user socket as QEMU would. Nothing is left
//! behind: sockets live in a directory that is removed at the end, Ctrl-C included.

mod bulk;
mod http;
mod interrupt;
mod report;
mod service;
mod stage;
mod terminal;
#[cfg(test)]
mod tests;
mod vm;

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use self::interrupt::Interrupt;
use self::stage::{GUEST_WEB_PORT, HTTP_PORT, Stage, UNRULED_PORT};
use self::terminal::Terminal;
pub use self::vm::VmError;
use crate::config::ConfigError;
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
    Vm(#[from] VmError),
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
    if options.vm {
        return Ok(vm::run(options.keep)?);
    }
    let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let mut terminal = Terminal::new(io::stdout(), io::stdout().is_terminal(), colour);
    let shown = show(&mut terminal, &interrupt, EFFORT, options.keep);
    match shown {
        Err(Error::Interrupted) => terminal.line("\n  interrupted; everything is taken down"),
        // `demo | head`: the reader has seen enough.
        Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// The demo, act by act.
fn show(t: &mut Terminal, interrupt: &Interrupt, effort: Effort, keep: bool) -> Result<(), Error> {
    t.title(
        "vsock-sidecar demo",
        "a service, the sidecar and a guest in one process: no VM, no root",
    )?;
    let stage = Stage::set_up()?;
    t.field(
        "service",
        &format!("http://{}", stage.services.http),
        "a small HTTP server",
    )?;
    t.field(
        "sidecar",
        &stage.vhost_user.display().to_string(),
        "its vhost-user socket",
    )?;
    t.field(
        "guest",
        &format!("CID {}", stage.cid),
        "negotiates like QEMU, drives its rings like Linux",
    )?;

    let rule = format!(
        "vsock 2:{HTTP_PORT} -> rule \"http\" -> tcp://{}",
        stage.services.http
    );
    t.act(1, "The guest fetches a page from the service", &rule)?;
    let started = Instant::now();
    let stream = stage
        .guest
        .connect(HTTP_PORT)
        .map_err(Error::io("connect from the guest"))?;
    let answer = http::get(stream, "service", "/").map_err(Error::io("fetch the page"))?;
    let took = started.elapsed();
    t.out_line("GET / HTTP/1.1")?;
    t.in_line(&answer.status, Some(took))?;
    t.in_line(&answer.first_line(), None)?;
    expect_ok(&answer)?;
    interrupt.check()?;

    let rule = format!(
        "tcp://{} -> rule \"web\" -> vsock {}:{GUEST_WEB_PORT}",
        stage.web, stage.cid
    );
    t.act(2, "A TCP client fetches a page from a server in the guest", &rule)?;
    let started = Instant::now();
    let answer = http::get_tcp(stage.web, "/").map_err(Error::io("fetch the guest's page"))?;
    let took = started.elapsed();
    t.out_line("GET / HTTP/1.1")?;
    t.in_line(&answer.status, Some(took))?;
    t.in_line(&answer.first_line(), None)?;
    expect_ok(&answer)?;
    interrupt.check()?;

    t.act(
        3,
        "The guest tries a port that no rule names",
        &format!("vsock 2:{UNRULED_PORT} -> no rule"),
    )?;
    let started = Instant::now();
    match stage.guest.connect(UNRULED_PORT) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
            t.in_line(
                "RST: connect() fails at once, no timeout",
                Some(started.elapsed()),
            )?;
        }
        other => {
            let what = format!("a port without a rule answered {:?}", other.map(drop));
            return Err(Error::Unexpected(what));
        }
    }

    t.act(
        4,
        "Bulk data, every byte checked",
        "64 KiB writes, one connection",
    )?;
    bulk::guest_to_host(&stage, t, interrupt, effort)?;
    bulk::host_to_guest(&stage, t, interrupt, effort)?;

    report::negotiation(&stage, t)?;
    report::flows(&stage, t)?;
    report::where_to_look(&stage, t, keep)?;
    if keep {
        interrupt.wait();
        t.line("")?;
    }
    stage.take_down()
}

fn expect_ok(answer: &http::Answer) -> Result<(), Error> {
    if answer.status.contains(" 200 ") {
        Ok(())
    } else {
        Err(Error::Unexpected(format!("expected 200, got {}", answer.status)))
    }
}
