//! vsock-sidecar: the operator's story. Read the arguments, load the configuration, start the log, run.
//!
//! Exit codes: 0 fine, 64 bad configuration or usage (EX_USAGE of sysexits.h), 1 the rest. What went wrong is said
//! once, on stderr.

mod cli;

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;
use vsock_sidecar::config::{self, Config, ConfigError, Log, LogFormat, Warning};

use cli::{Cli, Command};

// PLACEHOLDERS: the only place to change when `vsock_sidecar::app` and `vsock_sidecar::demo` exist. Remove the two
// modules and add `use vsock_sidecar::{app, demo};`.
mod app {
    #[derive(Debug, thiserror::Error)]
    #[error("this build cannot run guests yet")]
    pub struct Error;

    pub fn run(_config: super::Config) -> Result<(), Error> {
        Err(Error)
    }
}
mod demo {
    #[derive(Debug, thiserror::Error)]
    #[error("this build has no demo yet")]
    pub struct Error;

    pub fn run(_options: super::cli::Demo) -> Result<(), Error> {
        Err(Error)
    }
}

fn main() -> ExitCode {
    let outcome = Cli::from_args(std::env::args_os())
        .map_err(Failure::Usage)
        .and_then(|cli| match cli.command {
            Command::Run { config } => run(&config),
            Command::Check { file } => check(&file),
            Command::Schema => schema(),
            Command::Demo(options) => demo::run(options).map_err(Failure::other),
        });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(file: &Path) -> Result<(), Failure> {
    let (config, warnings) = config::load(file).map_err(Failure::Config)?;
    start_log(&config.log)?;
    for Warning(warning) in &warnings {
        let (line, column) = warning.position.unwrap_or_default();
        tracing::warn!(file = %warning.file, line, column, path = %warning.path, "{}", warning.message);
    }
    app::run(config).map_err(Failure::other)
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

/// Prints to stdout; a reader that has read enough (`| head`) is no failure.
fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::other(error)),
        _ => Ok(()),
    }
}

/// Sends log events to stderr in the configured form.
fn start_log(log: &Log) -> Result<(), Failure> {
    let filter = EnvFilter::try_new(&log.level).map_err(Failure::other)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    match log.format {
        LogFormat::Text => builder.with_ansi(io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(|error| Failure::Other(error.to_string()))
}

/// Why the program ends with a code other than 0.
enum Failure {
    Usage(clap::Error),
    Config(ConfigError),
    Other(String),
}

impl Failure {
    fn other(error: impl std::error::Error) -> Failure {
        // The sources of an error are part of the one line that the operator gets.
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            if !text.contains(&cause_text) {
                text = format!("{text}: {cause_text}");
            }
            source = cause.source();
        }
        Failure::Other(text)
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
            Failure::Other(text) => {
                let _ = writeln!(io::stderr(), "vsock-sidecar: {text}");
                ExitCode::FAILURE
            }
        }
    }
}
