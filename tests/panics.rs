//! Panics of the threads that serve a guest, in a whole sidecar: each costs that guest's session, is counted and told, and the
//! next VMM is served.
//!
//! The panics are real and their places the program's own: the log is a subscriber that panics over an event when it is armed for
//! it, on the thread that logs it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use vsock_sidecar::app::Sidecar;
use vsock_sidecar::config;
use vsock_sidecar::embedded_guest::{
    DriverOptions, EmbeddedGuest, FrontEnd, GuestStream, Profile, SocketOptions, Sockets,
};
use vsock_sidecar::metrics::Registry;

const LONG: Duration = Duration::from_secs(30);

/// On which thread, over which event, and how often yet.
struct Trap {
    thread: &'static str,
    event: &'static str,
    left: usize,
}

static TRAP: Mutex<Option<Trap>> = Mutex::new(None);
/// What was logged at error.
static ERRORS: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Traps;

impl<S: Subscriber> Layer<S> for Traps {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        struct Message(String);
        impl Visit for Message {
            fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
                if field.name() == "message" {
                    self.0 = format!("{value:?}");
                }
            }
        }
        let mut message = Message(String::new());
        event.record(&mut message);
        if *event.metadata().level() == tracing::Level::ERROR {
            let mut errors = ERRORS.lock().unwrap_or_else(PoisonError::into_inner);
            errors.push(message.0.clone());
        }
        let thread = std::thread::current();
        let name = thread.name().unwrap_or_default();
        let springs = {
            let mut trap = TRAP.lock().unwrap_or_else(PoisonError::into_inner);
            let armed = trap
                .as_mut()
                .filter(|trap| trap.left > 0 && trap.thread == name && trap.event == message.0);
            armed.map(|trap| trap.left -= 1).is_some()
        };
        if springs {
            panic!("as if by a fault of {name} at {:?}", message.0);
        }
    }
}

/// One test at a time: there is one log.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    // The first one installs it for all.
    let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(Traps));
    guard
}

fn arm(thread: &'static str, event: &'static str, times: usize) {
    let trap = Trap {
        thread,
        event,
        left: times,
    };
    *TRAP.lock().unwrap_or_else(PoisonError::into_inner) = Some(trap);
}

fn is_sprung() -> bool {
    TRAP.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .as_ref()
        .is_some_and(|trap| trap.left == 0)
}

#[track_caller]
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {LONG:?}: {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// A sidecar of two guests, `web` and `db`, whose port 7 is an echo.
struct Rig {
    dir: tempfile::TempDir,
    registry: Arc<Registry>,
    sidecar: Option<Sidecar>,
    db: Sockets,
    well: GuestStream,
}

impl Rig {
    fn new() -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let echo = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = echo.local_addr().unwrap().port();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = echo.accept() {
                std::thread::spawn(move || {
                    let mut chunk = [0; 4096];
                    while let Ok(n @ 1..) = stream.read(&mut chunk) {
                        if stream.write_all(&chunk[..n]).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        let guest = |name: &str, cid: u32| {
            format!(
                "- {{name: {name}, cid: {cid}, vhostUser: {{socket: \"{}/{name}.sock\"}}, \
                 outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}], \
                 inbound: [{{name: in, listen: \"unix://{}/{name}.in\", protocol: connect}}]}}\n",
                dir.path().display(),
                dir.path().display()
            )
        };
        let file = dir.path().join("sidecar.yaml");
        let text = format!(
            "admin: {{listen: [\"unix://{}/admin.sock\"]}}\ndrain: {{timeout: 1s}}\nguests:\n{}{}",
            dir.path().display(),
            guest("web", 3),
            guest("db", 4)
        );
        std::fs::write(&file, text).unwrap();
        let (config, _) = config::load(&file).unwrap();
        let registry = Arc::new(Registry::new().unwrap());
        let sidecar = Sidecar::start(&config, Arc::clone(&registry)).unwrap();
        let db = boot(&dir.path().join("db.sock"));
        let well = db.connect(7).unwrap();
        let rig = Rig {
            dir,
            registry,
            sidecar: Some(sidecar),
            db,
            well,
        };
        rig.others_are_well();
        rig
    }

    fn boot(&self) -> Sockets {
        boot(&self.dir.path().join("web.sock"))
    }

    /// The sum of the samples of a family that have these labels of `guest`.
    #[track_caller]
    fn metric(&self, guest: &str, family: &str, labels: &[(&str, &str)]) -> f64 {
        let page = self.registry.encode().unwrap();
        let has = |line: &str, (name, value): &(&str, &str)| line.contains(&format!("{name}=\"{value}\""));
        let values: Vec<f64> = page
            .lines()
            .filter(|line| line.starts_with(&format!("{family}{{")) && has(line, &("guest", guest)))
            .filter(|line| labels.iter().all(|label| has(line, label)))
            .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
            .collect();
        assert!(!values.is_empty(), "no sample of {family} with {labels:?}");
        values.iter().sum()
    }

    #[track_caller]
    fn until_metric(&self, guest: &str, family: &str, labels: &[(&str, &str)], value: f64) {
        until(&format!("{family} {labels:?} is {value}"), || {
            self.metric(guest, family, labels) == value
        });
    }

    /// Sessions of a guest that ended by a panic, whichever thread's.
    fn until_sessions_ended(&self, guest: &str, panics: f64) {
        self.until_metric(
            guest,
            "vsock_session_errors_total",
            &[("reason", "panic")],
            panics,
        );
    }

    fn device_panics(&self, guest: &str) -> f64 {
        self.metric(guest, "vsock_device_panics_total", &[])
    }

    /// `/livez`: its status.
    fn live(&self) -> String {
        let mut stream = std::os::unix::net::UnixStream::connect(self.dir.path().join("admin.sock")).unwrap();
        stream
            .write_all(b"GET /livez HTTP/1.1\r\nHost: sidecar\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split(' ').nth(1).unwrap().to_owned()
    }

    #[track_caller]
    fn others_are_well(&self) {
        ping(&self.well);
        assert_eq!(self.metric("db", "vsock_session_errors_total", &[]), 0.0);
        assert_eq!(self.device_panics("db"), 0.0);
        assert_eq!(self.db.open_connections(), 1);
    }

    /// The session of `web` has ended by a panic; nothing is left of it, and another one works.
    #[track_caller]
    fn assert_contained(&self, panics: f64) {
        assert!(is_sprung());
        self.until_sessions_ended("web", panics);
        for family in [
            "vsock_session_active",
            "vsock_connections_active",
            "vsock_buffered_bytes",
            "vsock_vring_started",
            "vsock_memory_regions",
        ] {
            self.until_metric("web", family, &[], 0.0);
        }
        let opened = self.metric("web", "vsock_connections_opened_total", &[]);
        let lost = self.metric(
            "web",
            "vsock_connections_closed_total",
            &[("reason", "session_lost")],
        );
        assert_eq!(opened, lost, "connections that were opened and lost");
        assert_eq!(self.live(), "200");
        self.others_are_well();
        let next = self.boot();
        ping(&next.connect(7).unwrap());
        next.shut_down().unwrap();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(sidecar) = self.sidecar.take() {
            sidecar.stop();
        }
    }
}

fn boot(socket: &Path) -> Sockets {
    let options = DriverOptions {
        memory: 32 << 20,
        ..DriverOptions::default()
    };
    let booted = EmbeddedGuest::boot(socket, Profile::qemu(), options).expect("the guest boots");
    Sockets::start(booted, SocketOptions::default()).expect("the guest's sockets start")
}

#[track_caller]
fn ping(stream: &GuestStream) {
    let mut stream = stream;
    stream.set_read_timeout(Some(LONG));
    stream.write_all(b"ping").unwrap();
    let mut pong = [0; 4];
    stream.read_exact(&mut pong).unwrap();
    assert_eq!(&pong, b"ping");
}

/// No command is under way: the session learns of it all the same.
#[test]
fn a_panic_of_the_device_thread_amid_traffic_ends_the_session_and_is_counted() {
    let _alone = alone();
    let rig = Rig::new();
    let web = rig.boot();
    let first = web.connect(7).unwrap();
    ping(&first);
    arm("device-web", "connection established", 1);
    assert!(web.connect(7).is_err());
    web.with_front_end(|front_end| front_end.unwrap().wait_closed(LONG).unwrap());
    assert_eq!(rig.device_panics("web"), 1.0);
    drop(first);
    drop(web);
    rig.assert_contained(1.0);
}

/// The VMM waits for the answer, with all of its machine: it gets the end of its connection.
#[test]
fn a_panic_over_what_the_vmm_asks_for_ends_the_session_at_once() {
    let _alone = alone();
    let rig = Rig::new();
    arm("device-web", "ring started", 1);
    let web = EmbeddedGuest::boot(
        &rig.dir.path().join("web.sock"),
        Profile::qemu(),
        DriverOptions::default(),
    );
    // It may have been booted before it sees the end.
    if let Ok(web) = web {
        web.front_end.wait_closed(LONG).unwrap();
    }
    assert_eq!(rig.device_panics("web"), 1.0);
    rig.assert_contained(1.0);
}

/// A guest that has found a way must not find more: the device pauses, and so does the session.
#[test]
fn a_guest_that_brings_a_panic_about_every_time_is_held_back_and_served_in_the_end() {
    let _alone = alone();
    let rig = Rig::new();
    arm("device-web", "ring started", 4);
    until("the trap has sprung four times", || {
        let web = EmbeddedGuest::boot(
            &rig.dir.path().join("web.sock"),
            Profile::qemu(),
            DriverOptions::default(),
        );
        if let Ok(web) = web {
            web.front_end.wait_closed(LONG).unwrap();
        }
        rig.others_are_well();
        is_sprung()
    });
    assert_eq!(rig.device_panics("web"), 4.0);
    rig.assert_contained(4.0);
}

/// Nothing of the sidecar's own but the line says that a port is not served any more.
#[test]
fn a_panic_over_a_client_of_a_listener_is_told_as_the_end_of_that_listener() {
    let _alone = alone();
    let rig = Rig::new();
    arm("control", "closed an inbound client", 1);
    let mut client = std::os::unix::net::UnixStream::connect(rig.dir.path().join("web.in")).unwrap();
    client.write_all(b"HELO\n").unwrap();
    until("it is told", || {
        let errors = ERRORS.lock().unwrap_or_else(PoisonError::into_inner);
        errors
            .iter()
            .any(|error| error.starts_with("an inbound listener has failed"))
    });
    assert!(is_sprung());
    // What else the same thread does goes on.
    ping(&rig.boot().connect(7).unwrap());
    assert_eq!(rig.live(), "200");
    rig.others_are_well();
}

#[test]
fn a_panic_of_the_session_thread_ends_its_session() {
    let _alone = alone();
    let rig = Rig::new();
    let web = rig.boot();
    ping(&web.connect(7).unwrap());
    arm(
        "vhost web",
        "a second connection refused: one VMM is served at a time",
        1,
    );
    let second = FrontEnd::connect(&rig.dir.path().join("web.sock"), Profile::qemu()).unwrap();
    web.with_front_end(|front_end| front_end.unwrap().wait_closed(LONG).unwrap());
    drop((second, web));
    assert_eq!(rig.device_panics("web"), 0.0);
    rig.until_sessions_ended("web", 1.0);
    rig.others_are_well();
    let next = rig.boot();
    ping(&next.connect(7).unwrap());
}

/// Where no teardown of its own follows.
#[test]
fn a_panic_of_the_session_thread_before_its_session_runs_ends_it() {
    let _alone = alone();
    let rig = Rig::new();
    arm("vhost web", "session begins", 1);
    let failed = FrontEnd::connect(&rig.dir.path().join("web.sock"), Profile::qemu())
        .unwrap()
        .negotiate();
    assert!(failed.is_err());
    rig.assert_contained(1.0);
}

/// The thread of the protocol handler is another crate's, and its panic is reported by that.
#[test]
fn a_panic_of_the_protocol_handler_ends_its_session() {
    let _alone = alone();
    let rig = Rig::new();
    arm("crate web", "features agreed", 1);
    let web = EmbeddedGuest::boot(
        &rig.dir.path().join("web.sock"),
        Profile::qemu(),
        DriverOptions::default(),
    );
    if let Ok(web) = web {
        web.front_end.wait_closed(LONG).unwrap();
    }
    rig.assert_contained(1.0);
}
