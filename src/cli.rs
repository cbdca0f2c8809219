//! The command line.

use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vsock_sidecar::kubevirt;
use vsock_sidecar::state::Address;

/// The name by which KubeVirt's sidecar-shim calls its hook.
const ON_DEFINE_DOMAIN: &str = "onDefineDomain";

/// Connects a virtual machine to TCP services through virtio-vsock.
///
/// vsock-sidecar is a vhost-user vsock backend: the VMM connects to its unix socket, applications in the guest use
/// AF_VSOCK, and the configuration says which ports lead to which services.
#[derive(Parser, Debug)]
#[command(
    name = "vsock-sidecar",
    version,
    max_term_width = 100,
    arg_required_else_help = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run the sidecar until SIGTERM
    Run {
        /// Configuration in YAML; `-` reads standard input
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
        /// Serve KubeVirt's hooks on this unix socket, once the guest's socket listens
        #[arg(long, value_name = "SOCKET")]
        kubevirt_hook: Option<PathBuf>,
        /// The guest's socket as QEMU sees it, if that is not what KubeVirt's volumes make of it
        #[arg(long, value_name = "PATH", requires = "kubevirt_hook")]
        kubevirt_socket: Option<PathBuf>,
    },
    /// Check a configuration and print it with every default filled in
    Check {
        /// Configuration in YAML; `-` reads standard input
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Print the JSON Schema of the configuration (draft 2020-12), for editors and CI
    Schema,
    /// Give virtual machines of KubeVirt a vsock (docs/kubevirt.md)
    #[command(subcommand, name = "kubevirt")]
    KubeVirt(KubeVirt),
    /// Show what a running sidecar has negotiated, found odd and moved, as tables
    State(State),
    /// Ask a running sidecar whether it has started, is ready, or is alive; for exec probes. Ends with 0 or 1
    Probe(Probe),
    /// Put the sidecar into pods that ask for it, for the Kubernetes API server (docs/webhook.md)
    Webhook(Webhook),
    /// Print Kubernetes manifests with the sidecar put into the pods that ask for it
    Inject(Inject),
    /// Show everything in one process: a service, the sidecar and an embedded guest; no VM, no root
    Demo(Demo),
}

/// What is done for KubeVirt.
#[derive(Subcommand, Debug)]
pub enum KubeVirt {
    /// Print a domain of libvirt with the vsock device and shared memory; the same if it has both
    ///
    /// Also the program by the name of `onDefineDomain`, as KubeVirt's sidecar-shim calls it.
    OnDefineDomain(OnDefineDomain),
}

/// Options of the edit of a domain.
#[derive(Args, Clone, Debug)]
pub struct OnDefineDomain {
    /// The VirtualMachineInstance, JSON
    #[arg(long, value_name = "JSON", default_value = "")]
    pub vmi: String,
    /// The domain, XML; `-` reads standard input
    #[arg(long, value_name = "XML", allow_hyphen_values = true)]
    pub domain: String,
    /// The sidecar's socket as QEMU sees it
    #[arg(long, value_name = "PATH", env = "VSOCK_SIDECAR_KUBEVIRT_SOCKET", default_value = kubevirt::DEFAULT_SOCKET)]
    pub socket: PathBuf,
}

/// Options of the demo.
#[derive(Args, Clone, Debug)]
pub struct Demo {
    /// Leave it running at the end, to look at /metrics and /state
    #[arg(long)]
    pub keep: bool,
    /// Boot a real Linux guest in QEMU instead of the embedded one
    #[arg(long)]
    pub vm: bool,
}

/// Which sidecar's state is shown, and how.
#[derive(Args, Clone, Debug)]
pub struct State {
    /// Where the sidecar's admin server is: `http://HOST:PORT`, or `tcp://HOST:PORT` and `unix:///PATH` as in its
    /// admin.listen
    #[arg(long, value_name = "URL", env = "VSOCK_SIDECAR_ADMIN", default_value = Address::DEFAULT)]
    pub admin: Address,
    /// Print the document of /state as it is, for programs
    #[arg(long)]
    pub json: bool,
    /// Only this guest
    #[arg(long, value_name = "NAME")]
    pub guest: Option<String>,
    /// Print the last messages between VMM and sidecar, too
    #[arg(long, conflicts_with = "json")]
    pub messages: bool,
    /// When to use colour; `auto` does on a terminal, unless NO_COLOR is set
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub color: Color,
}

/// Which sidecar is asked what.
#[derive(Args, Clone, Debug)]
pub struct Probe {
    /// The question
    #[arg(value_name = "WHAT")]
    pub what: ProbeKind,
    /// Where the sidecar's admin server is: `http://HOST:PORT`, or `tcp://HOST:PORT` and `unix:///PATH` as in its
    /// admin.listen
    #[arg(long, value_name = "URL", env = "VSOCK_SIDECAR_ADMIN", default_value = Address::DEFAULT)]
    pub admin: Address,
    /// How long to wait for the answer, such as 500ms or 2s. Stay below the kubelet's timeoutSeconds
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    pub timeout: Duration,
}

/// What a probe asks.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProbeKind {
    /// The configuration is valid and every socket is bound.
    Startup,
    /// Clients may come.
    Ready,
    /// Every thread answers.
    Live,
}

/// What is put into pods.
#[derive(Args, Clone, Debug)]
pub struct Injection {
    /// The sidecar's image
    #[arg(long, value_name = "REF")]
    pub image: String,
    /// When the kubelet pulls it; the cluster decides if it is left out
    #[arg(long, value_name = "POLICY")]
    pub image_pull_policy: Option<Pull>,
    /// Settings in YAML: imagePullPolicy, resources, guaranteedResources
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// When the kubelet pulls an image.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
#[value(rename_all = "PascalCase")]
pub enum Pull {
    /// Each time that a container starts.
    Always,
    /// Where the node does not have it.
    IfNotPresent,
    /// It has to be on the node.
    Never,
}

/// How the webhook serves.
#[derive(Args, Clone, Debug)]
pub struct Webhook {
    /// Where the API server finds it (TLS): POST /mutate, GET /healthz
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8443")]
    pub listen: SocketAddr,
    /// The server's certificate, its issuers after it (PEM); may be replaced at any time
    #[arg(long, value_name = "FILE")]
    pub certificate: PathBuf,
    /// The certificate's private key (PEM)
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// How often certificate and key are looked at; SIGHUP looks at once
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub certificate_interval: Duration,
    /// Where Prometheus finds it (no TLS): GET /metrics, /healthz; `none` for nowhere
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:9464", value_parser = address_or_none)]
    pub metrics: MetricsAddress,
    /// How long it goes on after SIGTERM, since the API server learns late that it goes
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub drain: Duration,
    /// Form of the log; text if stderr is a terminal, or else json
    #[arg(long, value_name = "FORM")]
    pub log_format: Option<Format>,
    /// Level of the log, or a filter
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: String,
    /// What is put into pods
    #[command(flatten)]
    pub injection: Injection,
}

/// Where metrics are served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MetricsAddress(pub Option<SocketAddr>);

/// The form of a log.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Which manifests get the sidecar.
#[derive(Args, Clone, Debug)]
pub struct Inject {
    /// Manifests in YAML or JSON; `-` reads standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// What is put into pods
    #[command(flatten)]
    pub injection: Injection,
}

/// When there is colour.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Color {
    /// On a terminal.
    Auto,
    /// Even into a pipe.
    Always,
    /// Not at all.
    Never,
}

impl Cli {
    /// Reads the arguments of the process. `Err` is what to print and whether it is the user's mistake; `--help` and
    /// `--version` are none.
    pub fn from_args(args: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
        let mut args = args.into_iter().peekable();
        let called = args.peek().map(Path::new).and_then(Path::file_name);
        if called != Some(OsStr::new(ON_DEFINE_DOMAIN)) {
            return Cli::try_parse_from(args);
        }
        let subcommand = ["vsock-sidecar", "kubevirt", "on-define-domain"].map(OsString::from);
        Cli::try_parse_from(subcommand.into_iter().chain(args.skip(1)))
    }
}

/// A length of time as in the configuration: a whole number with the unit ms, s or m, up to a day.
fn duration(text: &str) -> Result<Duration, String> {
    let (number, millis) = [("ms", 1), ("s", 1000), ("m", 60_000)]
        .into_iter()
        .find_map(|(unit, millis)| Some((text.strip_suffix(unit)?, millis)))
        .ok_or("give a whole number with the unit ms, s or m, such as 500ms or 5s")?;
    let digits = !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit());
    digits
        .then(|| number.parse::<u64>().ok()?.checked_mul(millis))
        .flatten()
        .filter(|millis| *millis <= 86_400_000)
        .map(Duration::from_millis)
        .ok_or_else(|| "give a whole number with the unit ms, s or m, up to a day".to_owned())
}

fn address_or_none(text: &str) -> Result<MetricsAddress, String> {
    match text {
        "none" => Ok(MetricsAddress(None)),
        _ => text
            .parse()
            .map(|address| MetricsAddress(Some(address)))
            .map_err(|_| {
                "give an IP address and a port, such as 0.0.0.0:9464 or [::]:9464, or none".to_owned()
            }),
    }
}
