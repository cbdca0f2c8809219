//! vsock-sidecar: the operator's story. Read the arguments, load the configuration, start the log, run.
//!
//! Exit codes: 0 fine, 64 bad configuration or usage (EX_USAGE of sysexits.h), 1 the rest. What went wrong is said
//! once, on stderr.

mod cli;

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use vsock_sidecar::config::{self, ConfigError, Text};
use vsock_sidecar::logging::{self, LogError};
use vsock_sidecar::metrics::Registry;
use vsock_sidecar::state::Look;
use vsock_sidecar::{app, confine, demo, state, terminal};

use cli::{Cli, Color, Command};

fn main() -> ExitCode {
    let outcome = Cli::from_args(std::env::args_os())
        .map_err(Failure::Usage)
        .and_then(|cli| match cli.command {
            Command::Run { config } => run(&config),
            Command::Check { file } => check(&file),
            Command::Schema => schema(),
            Command::State(options) => show_state(options),
            Command::Demo(cli::Demo { keep, vm }) => {
                demo::run(demo::Options { keep, vm }).map_err(|error| Failure::Other(error.to_string()))
            }
        });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(file: &Path) -> Result<(), Failure> {
    let text = Text::read(file).map_err(Failure::Config)?;
    let (config, warnings) = text.check().map_err(Failure::Config)?;
    // Before anything that starts a thread, the log included.
    let confined = confine::enter(&config, file);
    let registry = Arc::new(Registry::new().map_err(Failure::other)?);
    let (_written_at_the_end, levels) =
        logging::init(config.log.format, &config.log.level, registry.log_messages()).map_err(|error| {
            match error {
                LogError::BadFilter { .. } => Failure::Surroundings(describe(&error)),
                error => Failure::other(error),
            }
        })?;
    let program = app::Program {
        file: file.to_owned(),
        text,
        config,
        warnings,
        registry,
        confined,
        levels,
        companions: Vec::new(),
    };
    app::run(program).map_err(|error| match error.is_configuration() {
        true => Failure::Surroundings(describe(&error)),
        false => Failure::other(error),
    })
}

fn check(file: &Path) -> Result<(), Failure> {
    let (config, warnings) = config::load(file).map_err(Failure::Config)?;
    for warning in warnings {
        eprintln!("{warning}");
    }
    let yaml = config.to_yaml().map_err(Failure::other)?;
    print(&yaml)
}

fn schema() -> Result<(), Failure> {
    let schema = serde_json::to_string_pretty(&config::json_schema()).map_err(Failure::other)?;
    print(&(schema + "\n"))
}

fn show_state(options: cli::State) -> Result<(), Failure> {
    let is_terminal = io::stdout().is_terminal();
    let (term, no_color) = (std::env::var_os("TERM"), std::env::var_os("NO_COLOR"));
    let look = Look {
        width: width(),
        colour: match options.color {
            Color::Auto => is_terminal && terminal::takes_colour(term.as_deref(), no_color.as_deref()),
            Color::Always => true,
            Color::Never => false,
        },
        messages: options.messages,
    };
    let text = state::show(&state::Options {
        admin: options.admin,
        json: options.json,
        guest: options.guest,
        look,
    });
    match text {
        Ok(text) => print(&text),
        Err(error) if error.is_usage() => Err(Failure::Surroundings(error.to_string())),
        Err(error) => Err(Failure::Other(error.to_string())),
    }
}

/// Columns of the terminal: what COLUMNS says, or the terminal itself; `None` where there is neither.
fn width() -> Option<usize> {
    let said = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok());
    said.or_else(|| {
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
        Some(usize::from(size.ws_col))
    })
    .filter(|columns| *columns > 0)
}

/// Prints to stdout; a reader that has read enough (`| head`) is no failure.
fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::other(error)),
        _ => Ok(()),
    }
}

/// Why the program ends with a code other than 0.
enum Failure {
    Usage(clap::Error),
    Config(ConfigError),
    /// The configuration asks for what cannot be had here: an address that is taken, a directory that is missing.
    Surroundings(String),
    Other(String),
}

/// An error and its sources, which are part of the one line that the operator gets.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

impl Failure {
    fn other(error: impl std::error::Error) -> Failure {
        Failure::Other(describe(&error))
    }

    fn report(self) -> ExitCode {
        const BAD_USAGE: u8 = 64;
        match self {
            Failure::Usage(error) => {
                // Nothing is left to do when even stderr is closed.
                let _ = error.print();
                if error.use_stderr() {
                    ExitCode::from(BAD_USAGE)
                } else {
                    ExitCode::SUCCESS
                }
            }
            Failure::Config(error) => {
                let _ = writeln!(io::stderr(), "{error}");
                ExitCode::from(BAD_USAGE)
            }
            Failure::Surroundings(text) => {
                let _ = writeln!(io::stderr(), "vsock-sidecar: {text}");
                ExitCode::from(BAD_USAGE)
            }
            Failure::Other(text) => {
                let _ = writeln!(io::stderr(), "vsock-sidecar: {text}");
                ExitCode::FAILURE
            }
        }
    }
}
