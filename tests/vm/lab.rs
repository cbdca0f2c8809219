//! A guest, the sidecar and the services around them; and the runner of scenarios, which share one lab while all is well.

use std::fs;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::assets::{Assets, assets};
use super::qemu::{Options, Vm, complaint};
use super::service::{self, ClosedPort, Service};
use super::sidecar::Sidecar;

/// The guest's name in the configuration.
pub const GUEST: &str = "linux";
/// The guest's CID.
pub const CID: u32 = 3;
/// Size of a bulk transfer.
pub const BULK: u64 = 64 << 20;
/// What `drain.timeout` says in the configuration.
pub const DRAIN: Duration = Duration::from_secs(3);

/// Ports of the host that the guest reaches through rules.
pub mod port {
    /// Sends back what comes.
    pub const ECHO: u32 = 5000;
    /// Reads to the end.
    pub const SINK: u32 = 5001;
    /// Sends 64 MiB of pattern 21, then reads to the end.
    pub const SOURCE_THEN_SINK: u32 = 5002;
    /// Reads to the end, then sends 64 MiB of pattern 22.
    pub const SINK_THEN_SOURCE: u32 = 5003;
    /// A rule whose TCP service does not run.
    pub const NO_SERVICE: u32 = 5004;
    /// Reads only when told to.
    pub const STALLED: u32 = 5005;
    /// Sends back what comes, on a unix socket.
    pub const UNIX_ECHO: u32 = 5006;
    /// Reads to the end; for connections that a scenario keeps open.
    pub const HELD: u32 = 5007;
    /// No rule has this port.
    pub const NO_RULE: u32 = 4999;
    /// In the guest: what the first TCP listener leads to.
    pub const GUEST_A: u32 = 7000;
    /// In the guest: what the second TCP listener leads to.
    pub const GUEST_B: u32 = 7001;
}

/// Seed of what [`port::SOURCE_THEN_SINK`] sends.
pub const SOURCE_SEED: u64 = 21;
/// Seed of what [`port::SINK_THEN_SOURCE`] sends.
pub const SECOND_SOURCE_SEED: u64 = 22;

/// What a lab consists of, as far as tests differ in it.
#[derive(Clone, Debug)]
pub struct Setup {
    /// What a suite calls it, behind the kernel's version: ` behind intel-iommu`.
    pub name: &'static str,
    /// The kernel's version.
    pub kernel: &'static str,
    /// `vhostUser.accessPlatform` in the configuration.
    pub access_platform: &'static str,
    /// The machine.
    pub machine: Options,
}

impl Setup {
    /// A machine without an IOMMU.
    pub fn plain(kernel: &'static str) -> Setup {
        Setup {
            name: "",
            kernel,
            access_platform: "auto",
            machine: Options::default(),
        }
    }
}

/// Everything of one test, in an order that ends well: the machine goes before its back-end, files go last.
pub struct Lab {
    /// The machine. `None` between the end of one and the boot of the next.
    pub vm: Option<Vm>,
    /// The back-end.
    pub sidecar: Sidecar,
    /// Behind [`port::SINK`].
    pub sink: Service,
    /// Behind [`port::SOURCE_THEN_SINK`].
    pub source_then_sink: Service,
    /// Behind [`port::SINK_THEN_SOURCE`].
    pub sink_then_source: Service,
    /// Behind [`port::STALLED`].
    pub stalled: Service,
    /// Behind [`port::HELD`].
    pub held: Service,
    /// Lets one connection of `stalled` go on.
    pub go: Sender<()>,
    /// TCP ports that lead to [`port::GUEST_A`] and [`port::GUEST_B`].
    pub tcp: [u16; 2],
    /// A unix socket that speaks the `CONNECT` protocol.
    pub mux: PathBuf,
    machine: Options,
    assets: Assets,
    socket: PathBuf,
    _echoes: [Service; 2],
    _closed: ClosedPort,
    dir: tempfile::TempDir,
}

impl Lab {
    /// Starts everything and boots the guest.
    pub fn start(setup: &Setup) -> Lab {
        let assets = assets(setup.kernel);
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let (stall, go) = service::stalled();
        let (echo, sink, stalled) = (
            Service::tcp(service::echo()),
            Service::tcp(service::sink()),
            Service::tcp(stall),
        );
        let source_then_sink = Service::tcp(service::source_then_sink(BULK, SOURCE_SEED));
        let sink_then_source = Service::tcp(service::sink_then_source(BULK, SECOND_SOURCE_SEED));
        let held = Service::tcp(service::sink());
        let unix_echo = Service::unix(&path("echo.sock"), service::echo());
        let closed = ClosedPort::new();
        // Free a moment ago; the sidecar binds them at once.
        let tcp = [ClosedPort::new(), ClosedPort::new()].map(|port| port.port());

        let mut outbound = String::new();
        for (name, port, to) in [
            ("echo", port::ECHO, echo.port()),
            ("sink", port::SINK, sink.port()),
            (
                "source-then-sink",
                port::SOURCE_THEN_SINK,
                source_then_sink.port(),
            ),
            (
                "sink-then-source",
                port::SINK_THEN_SOURCE,
                sink_then_source.port(),
            ),
            ("no-service", port::NO_SERVICE, closed.port()),
            ("stalled", port::STALLED, stalled.port()),
            ("held", port::HELD, held.port()),
        ] {
            outbound += &format!("      - {{name: {name}, port: {port}, to: \"tcp://127.0.0.1:{to}\"}}\n");
        }
        let configuration = format!(
            r#"log: {{format: json, level: debug}}
drain: {{timeout: {drain}s}}
guests:
  - name: {GUEST}
    cid: {CID}
    vhostUser: {{socket: "{socket}", accessPlatform: {access_platform}}}
    outbound:
{outbound}      - {{name: unix-echo, port: {unix_port}, to: "unix://{unix_echo}"}}
    inbound:
      - {{name: a, listen: "tcp://127.0.0.1:{tcp_a}", port: {a}}}
      - {{name: b, listen: "tcp://127.0.0.1:{tcp_b}", port: {b}}}
      - {{name: mux, listen: "unix://{mux}", protocol: connect}}
"#,
            drain = DRAIN.as_secs(),
            socket = path("vhost.sock").display(),
            access_platform = setup.access_platform,
            unix_port = port::UNIX_ECHO,
            unix_echo = path("echo.sock").display(),
            tcp_a = tcp[0],
            tcp_b = tcp[1],
            a = port::GUEST_A,
            b = port::GUEST_B,
            mux = path("mux.sock").display(),
        );
        let sidecar = Sidecar::start(dir.path(), &configuration);
        let mut lab = Lab {
            vm: None,
            sidecar,
            sink,
            source_then_sink,
            sink_then_source,
            stalled,
            held,
            go,
            tcp,
            mux: path("mux.sock"),
            machine: setup.machine.clone(),
            assets,
            socket: path("vhost.sock"),
            _echoes: [echo, unix_echo],
            _closed: closed,
            dir,
        };
        lab.boot();
        lab
    }

    /// Boots a machine at the sidecar's socket.
    pub fn boot(&mut self) {
        self.boot_another(&self.machine.clone());
    }

    /// Boots a machine that differs from the lab's.
    pub fn boot_another(&mut self, machine: &Options) {
        self.vm = None;
        self.vm = Some(Vm::boot(&self.assets, &self.socket, self.dir.path(), machine));
    }

    /// The running machine.
    pub fn vm(&mut self) -> &mut Vm {
        self.vm.as_mut().expect("a machine is running")
    }

    /// The kernel that runs in the guest.
    pub fn release(&self) -> &str {
        &self.assets.release
    }

    /// Waits until the sidecar counts no open connection.
    pub fn wait_for_silence(&self) {
        super::wait_until("no connection is open", Duration::from_secs(15), || {
            self.sidecar
                .metric("vsock_connections_active", &[("guest", GUEST)])
                == 0.0
        });
    }

    /// The guest's part of `/state`.
    pub fn state(&self) -> Value {
        let (status, text) = self.sidecar.get("/state").unwrap();
        assert_eq!(status, 200, "GET /state");
        let state: Value = serde_json::from_str(&text).unwrap();
        state["guests"][0].clone()
    }

    /// What QEMU said since the first boot in this lab.
    pub fn qemu_log(&self) -> String {
        let log = fs::read(self.dir.path().join("qemu.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    fn logs(&mut self) -> String {
        let vm = self.vm.as_mut().map(Vm::logs).unwrap_or_default();
        vm + &self.sidecar.log_tail()
    }
}

/// Runs scenarios one after the other and says at the end which failed. They share a lab; a scenario that fails leaves
/// nothing to the next one, which gets a new lab.
pub struct Suite {
    setup: Setup,
    name: String,
    only: Option<String>,
    lab: Option<Lab>,
    failed: Vec<String>,
    done: usize,
}

impl Suite {
    /// Scenarios in labs of one kind. The environment variable `VSOCK_TEST_SCENARIO` picks those whose name contains it.
    pub fn new(setup: Setup) -> Suite {
        let only = std::env::var("VSOCK_TEST_SCENARIO").ok();
        Suite {
            name: format!("Linux {}{}", setup.kernel, setup.name),
            setup,
            only,
            lab: None,
            failed: Vec::new(),
            done: 0,
        }
    }

    /// Runs one.
    pub fn run(&mut self, name: &str, scenario: impl FnOnce(&mut Lab)) {
        if self
            .only
            .as_ref()
            .is_some_and(|only| !name.contains(only.as_str()))
        {
            return;
        }
        let mut lab = self.lab.take().unwrap_or_else(|| Lab::start(&self.setup));
        let begin = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| {
            scenario(&mut lab);
            let console = lab.vm.as_ref().map(Vm::console).unwrap_or_default();
            let complaint = complaint(&console);
            assert!(complaint.is_none(), "the guest's kernel complains: {complaint:?}");
            let fault = fault(&console);
            assert!(fault.is_none(), "the guest's IOMMU refused an access: {fault:?}");
        }));
        let time = begin.elapsed().as_secs_f64();
        self.done += 1;
        if result.is_ok() {
            tell(&format!("{}: {name}: ok, {time:.1} s", self.name));
            self.lab = Some(lab);
        } else {
            tell(&format!("{}: {name}: FAILED after {time:.1} s", self.name));
            eprintln!("--- logs of {name}\n{}", lab.logs());
            self.failed.push(name.to_owned());
        }
    }

    /// Panics when a scenario failed or none ran.
    pub fn finish(mut self) {
        self.lab = None;
        assert!(self.failed.is_empty(), "failed: {}", self.failed.join(", "));
        assert!(self.done > 0, "no scenario has such a name");
    }
}

/// A line of the guest's console in which its kernel tells that the IOMMU refused the device an access
/// (`dmar_fault_do_one` in Linux's drivers/iommu/intel/dmar.c, `viommu_fault_handler` in drivers/iommu/virtio-iommu.c).
fn fault(console: &str) -> Option<&str> {
    console.lines().find(|line| {
        ["DMAR: [", "fault from EP"]
            .iter()
            .any(|word| line.contains(word))
    })
}

/// A line to the terminal at once. The test harness keeps what `eprintln!` writes until a test fails, and these tests take
/// long enough for someone to wonder.
pub fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
