//! vsock-sidecar: the operator's story. Read the arguments, load the configuration, start the log, run.
//!
//! Exit codes: 0 fine, 64 bad configuration or usage (EX_USAGE of sysexits.h), 1 the rest. What went wrong is said
//! once, on stderr.

mod cli;

use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use vsock_sidecar::config::{self, ConfigError, LogFormat, Text};
use vsock_sidecar::kubevirt::domain::Device;
use vsock_sidecar::kubevirt::{self, Hook};
use vsock_sidecar::logging::{self, LogError};
use vsock_sidecar::metrics::Registry;
use vsock_sidecar::state::Look;
use vsock_sidecar::webhook::{PullPolicy, Settings, SettingsError};
use vsock_sidecar::{app, confine, demo, probe as probes, state, terminal, webhook};

use cli::{Cli, Color, Command, Format, ProbeKind, Pull};

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
            Command::Probe(options) => probe(&options),
            Command::Webhook(options) => run_webhook(options),
            Command::Inject(options) => inject(&options),
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
    let text = Text::read(file).map_err(Failure::Config)?;
    let (config, warnings) = text.check().map_err(Failure::Config)?;
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
    let confined = confine::enter_in(&config, &here);
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
        hook,
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

fn probe(options: &cli::Probe) -> Result<(), Failure> {
    let kind = match options.what {
        ProbeKind::Startup => probes::Kind::Startup,
        ProbeKind::Ready => probes::Kind::Ready,
        ProbeKind::Live => probes::Kind::Live,
    };
    probes::run(kind, &options.admin, options.timeout).map_err(|error| Failure::Other(error.to_string()))
}

fn run_webhook(options: cli::Webhook) -> Result<(), Failure> {
    let settings = settings(&options.injection)?;
    let log_format = match options.log_format {
        Some(Format::Text) => LogFormat::Text,
        Some(Format::Json) => LogFormat::Json,
        None if io::stderr().is_terminal() => LogFormat::Text,
        None => LogFormat::Json,
    };
    let options = webhook::Options {
        listen: options.listen,
        metrics: options.metrics.0,
        certificate: webhook::Files {
            certificate: options.certificate,
            key: options.key,
        },
        certificate_interval: options.certificate_interval,
        settings,
        drain: options.drain,
        log_format,
        log_level: options.log_level,
    };
    webhook::run(options).map_err(|error| match error.is_usage() {
        true => Failure::Surroundings(error.to_string()),
        false => Failure::Other(error.to_string()),
    })
}

fn inject(options: &cli::Inject) -> Result<(), Failure> {
    let settings = settings(&options.injection)?;
    let name = options.file.display();
    let yaml = match options.file == Path::new("-") {
        true => io::read_to_string(io::stdin()),
        false => std::fs::read_to_string(&options.file),
    };
    let yaml = yaml.map_err(|error| Failure::Surroundings(format!("cannot read {name}: {error}")))?;
    let manifests = webhook::inject_manifests(&yaml, &settings)
        .map_err(|error| Failure::Surroundings(format!("{name}: {error}")))?;
    for note in &manifests.notes {
        eprintln!("{name}: {note}");
    }
    print(&manifests.yaml)
}

fn settings(options: &cli::Injection) -> Result<Settings, Failure> {
    let usage = |error: SettingsError| Failure::Surroundings(error.to_string());
    let mut settings = Settings::new(&options.image).map_err(usage)?;
    if let Some(file) = &options.config {
        settings = settings.with_file(file).map_err(usage)?;
    }
    if let Some(policy) = options.image_pull_policy {
        settings.image_pull_policy = Some(match policy {
            Pull::Always => PullPolicy::Always,
            Pull::IfNotPresent => PullPolicy::IfNotPresent,
            Pull::Never => PullPolicy::Never,
        });
    }
    Ok(settings)
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
