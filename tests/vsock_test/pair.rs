//! Two guests of one sidecar, with a cable between them for what the tests have to agree about.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vsock_sidecar::demo::vm::text;

use crate::programs::fetch;
use crate::vm::assets::{Assets, assets};
use crate::vm::extra::add;
use crate::vm::qemu::{Options, Vm};
use crate::vm::sidecar::Sidecar;
use crate::vm::wait_until;

/// The guests' kernel, and the source that the tests are from.
pub const KERNEL: &str = "6.12";

/// A place for one end of a test.
#[derive(Clone, Copy, Debug)]
pub struct Seat {
    /// Which of the machines.
    pub machine: usize,
    /// What the other end calls it.
    pub cid: u32,
    /// Where the other end finds it for the control connection.
    pub address: &'static str,
}

/// The first guest.
pub const A: Seat = Seat {
    machine: 0,
    cid: 3,
    address: "192.168.77.3",
};
/// The second one.
pub const B: Seat = Seat {
    machine: 1,
    cid: 4,
    address: "192.168.77.4",
};
/// Either end, when both are in one guest. The CID is `VMADDR_CID_LOCAL`.
pub const SELF: Seat = Seat {
    machine: 0,
    cid: 1,
    address: "127.0.0.1",
};

/// Machines that run Linux's tests, and their sidecar.
pub struct Pair {
    /// One or two.
    pub machines: Vec<Vm>,
    /// Behind the machines' vsock devices.
    pub sidecar: Sidecar,
    /// The package that the tests are from.
    pub release: String,
    _dir: tempfile::TempDir,
}

impl Pair {
    /// Two guests that reach each other through the sidecar.
    pub fn start() -> Pair {
        let rules = |to: &str| {
            format!("    outbound: [{{name: to-{to}, ports: 1-4294967294, to: \"guest://{to}\"}}]\n")
        };
        let mut pair = Pair::boot(&[rules("b"), rules("a")], |module| module != "vsock_loopback");
        for seat in [A, B] {
            let address = format!("address eth0 {}", seat.address);
            pair.machines[seat.machine].ok(&address);
        }
        pair
    }

    /// One guest that reaches itself, through its kernel alone.
    pub fn alone() -> Pair {
        let mut pair = Pair::boot(&[String::new()], |_| true);
        pair.machines[0].ok(&format!("address lo {}", SELF.address));
        pair
    }

    /// A machine for each of these configurations.
    fn boot(guests: &[String], modules: impl Fn(&str) -> bool) -> Pair {
        let mut assets = assets(KERNEL);
        let (programs, release) = fetch(&assets.cache, KERNEL);
        let programs =
            ["vsock_test", "vsock_diag_test", "vsock_uring_test", "vsock_perf"].map(|p| programs.join(p));
        add(&mut assets, modules, &programs);
        let dir = tempfile::tempdir().unwrap();
        let mut configuration = "log: {format: json, level: debug}\nguests:\n".to_owned();
        for ((name, cid), rules) in [("a", A.cid), ("b", B.cid)].iter().zip(guests) {
            let socket = socket(dir.path(), name);
            configuration += &format!(
                "  - name: {name}\n    cid: {cid}\n    vhostUser: {{socket: \"{}\"}}\n{rules}",
                socket.display()
            );
        }
        let sidecar = Sidecar::start(dir.path(), &configuration);
        let machines = ["a", "b"].iter().take(guests.len());
        let machines = machines.map(|name| machine(dir.path(), name, &assets)).collect();
        Pair {
            machines,
            sidecar,
            release,
            _dir: dir,
        }
    }

    /// Everything that may explain a failure.
    pub fn logs(&mut self) -> String {
        let machines: String = self.machines.iter_mut().map(Vm::logs).collect();
        machines + &self.sidecar.log_tail()
    }
}

fn socket(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.sock"))
}

/// Boots a guest. Its network card is plugged to the other one's: the first machine that is started listens, so they come
/// one after the other.
fn machine(dir: &Path, name: &str, assets: &Assets) -> Vm {
    let own = dir.join(name);
    std::fs::create_dir(&own).unwrap();
    let cable = dir.join("cable.sock");
    let server = if cable.exists() { "off" } else { "on" };
    let options = Options {
        arguments: [
            "-netdev".to_owned(),
            format!(
                "stream,id=cable,server={server},addr.type=unix,addr.path={}",
                cable.display()
            ),
            "-device".to_owned(),
            // Without a boot ROM, which is in a package of its own.
            format!(
                "virtio-net-pci,netdev=cable,romfile=,mac=52:54:00:00:00:0{}",
                if name == "a" { A.cid } else { B.cid }
            ),
        ]
        .into(),
        ..Options::default()
    };
    Vm::boot(assets, &socket(dir, name), &own, &options)
}

/// A program that runs or has run in a guest.
pub struct Program {
    name: &'static str,
    machine: usize,
    /// `running`, or how it ended: `exited-0`.
    pub state: String,
    /// What it has written.
    pub text: String,
    /// When it last wrote something.
    spoke: Instant,
}

impl Program {
    /// Starts one of Linux's programs. Of programs with one name, a guest has one at a time.
    pub fn start(
        machines: &mut [Vm],
        machine: usize,
        name: &'static str,
        program: &str,
        arguments: &str,
    ) -> Program {
        machines[machine].ok(&format!("spawn {name} /bin/{program} {arguments}"));
        Program {
            name,
            machine,
            state: "running".to_owned(),
            text: String::new(),
            spoke: Instant::now(),
        }
    }

    /// None: what has ended already.
    pub fn ended() -> Program {
        Program {
            name: "none",
            machine: 0,
            state: "exited-0".to_owned(),
            text: String::new(),
            spoke: Instant::now(),
        }
    }

    /// Whether it still runs; takes notice of what it wrote.
    pub fn runs(&mut self, machines: &mut [Vm]) -> bool {
        while self.state == "running" {
            let command = format!("output {} {}", self.name, self.text.len());
            let answer = machines[self.machine].ok(&command);
            let bytes = text::decode(answer.text("text")).expect("encoded by the guest");
            let piece = String::from_utf8(bytes).expect("the programs speak ASCII");
            if piece.is_empty() {
                self.state = answer.text("state").to_owned();
                break;
            }
            self.spoke = Instant::now();
            self.text += &piece;
        }
        self.state == "running"
    }

    /// Waits until it has written this.
    pub fn wait_for(&mut self, machines: &mut [Vm], words: &str) {
        wait_until(words, Duration::from_secs(20), || {
            let runs = self.runs(machines);
            assert!(
                runs || self.text.contains(words),
                "{} {}: {}",
                self.name,
                self.state,
                self.text
            );
            self.text.contains(words)
        });
    }

    /// Kills it if it runs.
    pub fn kill(&mut self, machines: &mut [Vm]) {
        if self.state == "running" {
            machines[self.machine].ok(&format!("kill {}", self.name));
            self.state = "killed".to_owned();
        }
    }
}

/// Waits until both programs have ended; kills them when both have been silent for so long. The tests' own patience ends
/// after 10 s (`TIMEOUT` in Linux's tools/testing/vsock/timeout.h), but some cases wait without it.
pub fn wait_for_both(machines: &mut [Vm], programs: [&mut Program; 2], patience: Duration) {
    let [one, other] = programs;
    // Each is asked at each turn.
    while one.runs(machines) | other.runs(machines) {
        if one.spoke.max(other.spoke).elapsed() > patience {
            one.kill(machines);
            other.kill(machines);
        }
        // Not more often: every question costs the guest an interrupt for each of its letters.
        std::thread::sleep(Duration::from_millis(100));
    }
}
