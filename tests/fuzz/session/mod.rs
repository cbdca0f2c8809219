//! Whole sessions: our session thread, the crate's and a device thread with rings in shared memory; the VMM is the case.
//!
//! Whatever a VMM says, its session ends or goes on, and the next one works: after each case a well-formed QEMU boots,
//! behind an IOMMU where the policy allows it, and a packet of its guest is answered. Everything is waited for with a
//! deadline, so that a hang is a failure.

mod vmm;

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vsock_sidecar::config::Limits;
use vsock_sidecar::device::{self, Command, DeviceConfig, Rules, RunningDevice};
use vsock_sidecar::guest::RingFault;
use vsock_sidecar::host::dial::Dialer;
use vsock_sidecar::metrics::{GuestMetrics, LabelSets};
use vsock_sidecar::vhost_user::{
    AccessPlatform, Endpoint, Mode, NegotiationWatch, Session, SessionConfig, SessionHandle,
};
use vsock_sidecar::vsock::{CloseReason, Misbehavior, RefuseReason};

use super::steps::{Case, Step};
use vmm::Vmm;

/// How long anything may take: less than the 10 s after which a session gives a device up, so that this is seen too.
pub const PATIENCE: Duration = Duration::from_secs(9);

/// Waits until there is something, or fails saying what was waited for.
pub fn wait_for<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    wait_for_all(|| what.to_owned(), look)
}

/// The same, for something that takes work to describe.
fn wait_for_all<T>(what: impl Fn() -> String, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "timed out waiting for {}", what());
        std::thread::park_timeout(Duration::from_micros(200));
    }
}

/// A device that lives through all cases, and the sessions that serve it.
pub struct Live {
    device: RunningDevice,
    /// What the device counts.
    metrics: Arc<GuestMetrics>,
    directory: tempfile::TempDir,
    /// One for each policy, in server mode.
    servers: Vec<Served>,
    /// Sessions of VMMs so far.
    sessions: u64,
    /// How the session of the last case ended.
    last_end: String,
    /// What the process had open when everything had been used once.
    baseline: Option<usize>,
    _runtime: tokio::runtime::Runtime,
}

/// A session thread and how to reach it.
pub struct Served {
    config: SessionConfig,
    watch: Arc<NegotiationWatch>,
    pub handle: SessionHandle,
    /// In client mode, where it connects to.
    pub listener: Option<UnixListener>,
}

impl Live {
    pub fn new() -> Live {
        // Nothing is ever dialled.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let second = Duration::from_secs(1);
        let labels = LabelSets {
            refused: RefuseReason::LABELS,
            closed: CloseReason::LABELS,
            misbehavior: Misbehavior::LABELS,
            ring_errors: RingFault::LABELS,
        };
        let metrics = GuestMetrics::detached(&labels);
        let device = device::spawn(DeviceConfig {
            name: "web".into(),
            cid: 3,
            limits: Limits {
                connections: 64,
                buffer: 4096,
                connect_timeout: second,
                guest_timeout: second,
                idle_timeout: Duration::ZERO,
                busy_poll: Duration::ZERO,
                ..Limits::default()
            },
            rules: Arc::new(Rules::new(&[], &[], &[], &metrics, None)),
            siblings: Default::default(),
            quota: Default::default(),
            dialer: Dialer::new(runtime.handle().clone()),
            metrics: Arc::clone(&metrics),
        })
        .expect("a device");
        Live {
            device,
            metrics,
            directory: tempfile::tempdir().expect("a directory"),
            servers: Vec::new(),
            sessions: 0,
            last_end: String::new(),
            baseline: None,
            _runtime: runtime,
        }
    }

    /// Runs a case, and the session after it; panics where one of them hangs or the second does not work.
    pub fn run(&mut self, case: &Case) {
        let (policy, mode) = (case.policy, case.mode);
        let ended = self.with_session(policy, mode, |mut vmm| {
            for step in &case.steps {
                if !vmm.is_open() {
                    break;
                }
                vmm.step(step);
            }
            let well_formed = !case.steps.iter().any(|step| matches!(step, Step::Bytes(_)));
            if well_formed {
                vmm.wait_served();
            }
            vmm.has_spoken()
        });
        self.last_end = ended.map(|(_, detail)| detail).unwrap_or_default();
        let next = self.with_session(policy, mode, |mut vmm| {
            vmm.boot_and_be_answered(policy, mode);
            true
        });
        let next = next.map(|(reason, _)| reason);
        assert_eq!(next, Some("vmm_closed"), "the session after the case");
        self.check_device();
    }

    /// Has a VMM connected, and waits for the end of its session once it is gone; how it ended, if it ever began.
    fn with_session(
        &mut self,
        policy: AccessPlatform,
        mode: Mode,
        vmm: impl FnOnce(Vmm) -> bool,
    ) -> Option<(&'static str, String)> {
        let started = match mode {
            Mode::Server => {
                let at = match self
                    .servers
                    .iter()
                    .position(|served| served.config.access_platform == policy)
                {
                    Some(at) => at,
                    None => {
                        let served = self.serve(policy, mode);
                        self.servers.push(served);
                        self.servers.len() - 1
                    }
                };
                self.servers.swap_remove(at)
            }
            // Anew for each VMM: the thread pauses before it connects again.
            Mode::Client => self.serve(policy, mode),
        };
        let before = started.watch.snapshot().session;
        let stream = match &started.listener {
            None => UnixStream::connect(&started.config.socket).expect("the session listens"),
            Some(listener) => {
                listener.set_nonblocking(true).expect("a listener");
                wait_for("the session to connect", || listener.accept().ok()).0
            }
        };
        let began = vmm(Vmm::new(stream));
        let end = began.then(|| {
            wait_for("the end of the session", || {
                started
                    .watch
                    .snapshot()
                    .last_end
                    .filter(|end| end.session > before)
            })
        });
        if let Some(end) = &end {
            self.sessions += 1;
            assert!(!end.detail.contains("panicked"), "{}", end.detail);
            assert!(!end.detail.contains("device thread"), "{}", end.detail);
        }
        assert_eq!(
            self.metrics.device_panics.get(),
            0,
            "contained panics of the device"
        );
        assert!(!started.handle.is_finished(), "the session thread has ended");
        match mode {
            Mode::Server => self.servers.push(started),
            Mode::Client => started.handle.shutdown(),
        }
        end.map(|end| (end.reason, end.detail))
    }

    /// A session thread of this device.
    pub fn serve(&self, policy: AccessPlatform, mode: Mode) -> Served {
        let socket: PathBuf = self.directory.path().join(format!("{policy:?}-{mode:?}"));
        let listener = (mode == Mode::Client).then(|| {
            let _ = std::fs::remove_file(&socket);
            UnixListener::bind(&socket).expect("a listener")
        });
        let config = SessionConfig {
            guest: "web".into(),
            cid: 3,
            socket,
            mode,
            access_platform: policy,
        };
        let watch = NegotiationWatch::new(&config);
        let endpoint = Endpoint::bind(&config).expect("an endpoint");
        let handle = Session::spawn(endpoint, self.device.handle.clone(), watch.clone()).expect("a session");
        Served {
            config,
            watch,
            handle,
            listener,
        }
    }

    /// The device lives, and now and then, that nothing has been left open.
    fn check_device(&mut self) {
        let (done, mut pong) = tokio::sync::oneshot::channel();
        assert_eq!(self.device.handle.send(Command::Ping(done)), Ok(()));
        wait_for("the device", || pong.try_recv().ok());
        if self.sessions % 64 < 2 {
            self.check_leaks();
        }
    }

    /// Nothing that sessions open stays open: descriptors, threads, and the files beside the socket.
    pub fn check_leaks(&mut self) {
        let open = || {
            ["/proc/self/fd", "/proc/self/task"]
                .into_iter()
                .map(|directory| std::fs::read_dir(directory).map_or(0, Iterator::count))
                .sum::<usize>()
        };
        let held = || -> Vec<String> {
            let names = |directory: &str, name: &dyn Fn(&std::path::Path) -> String| -> Vec<String> {
                let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
                entries.map(|entry| name(&entry.path())).collect()
            };
            let target =
                |path: &std::path::Path| std::fs::read_link(path).unwrap_or_default().display().to_string();
            let comm =
                |path: &std::path::Path| std::fs::read_to_string(path.join("comm")).unwrap_or_default();
            [names("/proc/self/fd", &target), names("/proc/self/task", &comm)].concat()
        };
        // A server has its thread, its listener, its lock, its wake descriptor, and the private socket with the path to it.
        const OF_A_SERVER: usize = 6;
        match self.baseline {
            None => self.baseline = Some(open() + (4 - self.servers.len().min(4)) * OF_A_SERVER),
            // Threads and descriptors of a session that has just ended may take a moment.
            Some(baseline) => {
                let what = || {
                    format!(
                        "descriptors to be closed: {} and not {baseline}, {:?}",
                        open(),
                        held()
                    )
                };
                wait_for_all(what, || (open() <= baseline).then_some(()));
            }
        }
        let files = std::fs::read_dir(self.directory.path()).map_or(0, Iterator::count);
        assert!(files <= 3 * 8, "{files} files beside the sockets");
    }

    /// How the session of the last case ended, in words; nothing if it never began.
    pub fn last_end(&self) -> &str {
        &self.last_end
    }

    /// Sessions of VMMs so far.
    pub fn sessions(&self) -> u64 {
        self.sessions
    }
}
