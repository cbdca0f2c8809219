//! vsock-sidecar: the operator's story. Read the arguments, load the configuration, start the log, run.
//!
//! Exit codes: 0 fine, 64 bad configuration or usage (EX_USAGE of sysexits.h), 1 the rest. What went wrong is said
//! once, on stderr.

mod cli;

use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use vsock_sidecar::config::{self, Config, ConfigError, Warning};
use vsock_sidecar::kubevirt::domain::Device;
use vsock_sidecar::kubevirt::{self, Hook};
use vsock_sidecar::logging::{self, LogError};
use vsock_sidecar::metrics::Registry;
use vsock_sidecar::state::Look;
use vsock_sidecar::{app, confine, demo, state, terminal};

use cli::{Cli, Color, Command};

fn main() -> ExitCode {
    let outcome = Cli::from_args(std::env::args_os())
        .map_err(Failure::Usage)
        .and_then(|cli| match cli.command {
            Command::Run {
                config,
                kubevirt_hook,
                kubevirt_socket,
            } => run(&config, kubevirt_hook.as_deref(), kubevirt_socket.as_deref()),
            Command::Check { file } => check(&file),
            Command::Schema => schema(),
            Command::KubeVirt(cli::KubeVirt::OnDefineDomain(options)) => on_define_domain(&options),
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

fn run(file: &Path, hook: Option<&Path>, qemu_socket: Option<&Path>) -> Result<(), Failure> {
    // Before the configuration, which may only name directories that exist.
    hook.map_or(Ok(()), kubevirt::make_user_directory)
        .map_err(Failure::surroundings)?;
    let (config, warnings) = config::load(file).map_err(Failure::Config)?;
    let container = std::env::var_os("CONTAINER_NAME");
    let hook = hook
        .map(|socket| Hook::new(socket, &config.guests, qemu_socket, container.as_deref()))
        .transpose()
        .map_err(Failure::surroundings)?;
    let mut here = confine::Surroundings::look(file);
    if let Some(hook) = &hook {
        here = here.with_listener(&hook.socket);
    }
    // Before anything that starts a thread, the log included.
    let confined = confine::enter_with(&config, &here);
    let registry = Arc::new(Registry::new().map_err(Failure::other)?);
    let _written_at_the_end = logging::init(config.log.format, &config.log.level, registry.log_messages())
        .map_err(|error| match error {
            LogError::BadFilter { .. } => Failure::Surroundings(describe(&error)),
            error => Failure::other(error),
        })?;
    for Warning(warning) in &warnings {
        let (line, column) = warning.position.unwrap_or_default();
        tracing::warn!(file = %warning.file, line, column, path = %warning.path, "{}", warning.message);
    }
    registry.set_config(&identity(&config)?);
    app::run(&config, registry, confined, hook).map_err(|error| match error.is_configuration() {
        true => Failure::Surroundings(describe(&error)),
        false => Failure::other(error),
    })
}

/// What tells two effective configurations apart: comments and defaults that are written out make no difference.
fn identity(config: &Config) -> Result<String, Failure> {
    let yaml = config.to_yaml().map_err(Failure::other)?;
    Ok(Sha256::digest(yaml)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
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

/// Unreadable or refused input is the caller's mistake, as a bad configuration is.
fn on_define_domain(options: &cli::OnDefineDomain) -> Result<(), Failure> {
    let device = Device::at(&options.socket).map_err(Failure::surroundings)?;
    let mut domain = options.domain.as_bytes().to_vec();
    if options.domain == "-" {
        // One byte more than is taken, so that too much is seen as such.
        let most = u64::try_from(kubevirt::domain::MAX_LENGTH)
            .unwrap_or(u64::MAX)
            .saturating_add(1);
        domain.clear();
        io::stdin()
            .take(most)
            .read_to_end(&mut domain)
            .map_err(Failure::other)?;
    }
    let defined =
        kubevirt::define(&domain, options.vmi.as_bytes(), &device).map_err(Failure::surroundings)?;
    for warning in &defined.warnings {
        // stdout has the domain, and a closed stderr is no reason not to have one.
        let _ = writeln!(io::stderr(), "vsock-sidecar: warning: {warning}");
    }
    print(&defined.domain)
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
    fn surroundings(error: impl std::error::Error) -> Failure {
        Failure::Surroundings(describe(&error))
    }

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
