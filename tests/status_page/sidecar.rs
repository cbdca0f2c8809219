//! An admin server in front of a sidecar that says what a test wants it to say.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use vsock_sidecar::admin::{Admin, AdminHandle, AdminServer, Answer, Check, Limits, Readiness, Source};
use vsock_sidecar::config::ListenAddress;
use vsock_sidecar::drain::Drain;

/// A state and what pictures and failures call it.
pub type Named = (&'static str, fn() -> Value);

/// A guest that waits for its VMM.
pub fn waiting() -> Value {
    serde_json::from_str(include_str!("fixtures/waiting.json")).unwrap()
}

/// A guest of QEMU with an IOMMU, and traffic.
pub fn running() -> Value {
    serde_json::from_str(include_str!("fixtures/running.json")).unwrap()
}

/// A guest about which much is to be said.
pub fn finding() -> Value {
    serde_json::from_str(include_str!("fixtures/finding.json")).unwrap()
}

/// All of these guests, and more.
pub fn many() -> Value {
    let mut state = running();
    let guests = state["guests"].as_array_mut().unwrap();
    guests.push(finding()["guests"][0].clone());
    for number in 0..8 {
        let mut guest = if number % 3 == 0 { waiting() } else { running() }["guests"][0].clone();
        guest["name"] = format!("worker-{number}").into();
        guest["cid"] = (100 + number).into();
        guests.push(guest);
    }
    state
}

/// The running guest, while the sidecar shuts down.
pub fn draining() -> Value {
    let mut state = running();
    state["draining"] = true.into();
    state
}

/// The running guest, with a file that was refused and something that waits for a restart.
pub fn reloaded() -> Value {
    let mut state = running();
    state["config"] = json!({
        "file": "/etc/vsock-sidecar/config.yaml",
        "sha256": "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "since": 1795370000.0,
        "lastReload": {
            "at": 1795379400.0, "cause": "file", "result": "refused", "changes": [],
            "error": "error: /etc/vsock-sidecar/config.yaml:3:9: guests: `7` is of the wrong type\n  3 | guests: <b>7</b>\n"
        },
        "pending": ["log.format: text -> json (needs a restart of the sidecar)"],
    });
    state
}

/// The running guest, whose device thread does not answer.
pub fn device_silent() -> Value {
    let mut state = running();
    state["guests"][0]["device"] = Value::Null;
    state
}

type Saying = Box<dyn FnMut(usize) -> Value + Send>;

struct Program {
    /// What is answered to the n-th question.
    says: Mutex<Saying>,
    asked: AtomicUsize,
    hangs: AtomicBool,
}

impl Source for Program {
    fn metrics(&self) -> Result<String, String> {
        Ok(String::new())
    }

    fn state(&self) -> Answer<'_, Value> {
        let state = (self.says.lock().unwrap())(self.asked.fetch_add(1, Ordering::SeqCst));
        let hangs = self.hangs.load(Ordering::SeqCst);
        Box::pin(async move {
            if hangs {
                std::future::pending::<()>().await;
            }
            state
        })
    }

    fn live(&self) -> Answer<'_, Vec<Check>> {
        Box::pin(async { Vec::new() })
    }
}

/// A running admin server.
pub struct Sidecar {
    program: Arc<Program>,
    /// `http://127.0.0.1:…`
    pub origin: String,
    handle: Option<AdminHandle>,
}

impl Sidecar {
    /// One that always says the same.
    pub fn saying(state: Value) -> Sidecar {
        Sidecar::start(Box::new(move |_| state.clone()))
    }

    /// One whose answer depends on how often it was asked before.
    pub fn start(says: Saying) -> Sidecar {
        let program = Arc::new(Program {
            says: Mutex::new(says),
            asked: AtomicUsize::new(0),
            hangs: AtomicBool::new(false),
        });
        let address = [ListenAddress::Tcp((Ipv4Addr::LOCALHOST, 0).into())];
        let limits = Limits {
            answer: Duration::from_millis(100),
            ..Limits::default()
        };
        let server = AdminServer::bind(&address).unwrap().with_limits(limits);
        let ListenAddress::Tcp(tcp) = server.addresses()[0] else {
            panic!("the address is TCP")
        };
        let admin = Admin {
            source: program.clone(),
            startup: Readiness::new(),
            ready: Readiness::new(),
            drain: Drain::new().watch(),
        };
        Sidecar {
            program,
            origin: format!("http://{tcp}"),
            handle: Some(server.spawn(admin).unwrap()),
        }
    }

    /// From now on it says this.
    pub fn says(&self, state: Value) {
        *self.program.says.lock().unwrap() = Box::new(move |_| state.clone());
    }

    /// Whether questions are left without an answer, which the server says for the sidecar.
    pub fn hangs(&self, hangs: bool) {
        self.program.hangs.store(hangs, Ordering::SeqCst);
    }

    /// How often somebody asked.
    pub fn asked(&self) -> usize {
        self.program.asked.load(Ordering::SeqCst)
    }

    /// Nobody answers at this address any more.
    pub fn stop(&mut self) {
        self.handle = None;
    }
}

/// `state` after `n` polls of two seconds with traffic that rises and falls.
pub fn with_traffic(mut state: Value, n: usize) -> Value {
    let ticks = n as f64;
    state["now"] = json!(state["now"].as_f64().unwrap() + 2.0 * ticks);
    for (index, guest) in state["guests"].as_array_mut().unwrap().iter_mut().enumerate() {
        if guest["session"]["state"] != "running" {
            continue;
        }
        // The integral of a rate that is never negative.
        let moved =
            |rate: f64, period: f64| (rate * (2.0 * ticks - period * (2.0 * ticks / period).sin())) as u64;
        for (list, weight) in [("outbound", 1.0), ("inbound", 0.02)] {
            for (at, rule) in guest[list].as_array_mut().unwrap().iter_mut().enumerate() {
                let weight = weight * 1e7 / (1.0 + (at * 4 + index) as f64);
                let traffic = &mut rule["traffic"];
                for (key, period, share) in [
                    ("bytesGuestToHost", 23.0 + at as f64, 1.0),
                    ("bytesHostToGuest", 11.0, 2.3),
                ] {
                    let before = traffic[key].as_u64().unwrap();
                    if before > 0 {
                        traffic[key] = json!(before + moved(weight * share, period));
                    }
                }
            }
        }
        let open = guest["device"]["connectionCount"].as_u64().unwrap() as f64;
        guest["device"]["connectionCount"] =
            json!((open * (1.0 + 0.4 * (ticks / 17.0).sin())).round() as u64);
    }
    state
}
