//! The command line.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

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
