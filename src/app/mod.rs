//! Builds the program from its configuration: guests, listeners, admin server; starts it, drains it, ends it.
//!
//! Everything that can be refused is bound before anything runs, so that a start that fails leaves nothing behind.
//!
//! # Order
//!
//! Start: the process is confined already, see [`crate::confine`]; vhost-user sockets, inbound listeners and admin addresses are bound; device threads start, then sessions, then
//! the listeners accept, then the admin server answers. Each step has a latch on `/startupz`.
//!
//! Drain: listeners stop accepting, devices refuse new inbound connections, `/readyz` says no; what is open goes on until it
//! ends by itself or the grace period is over. Then devices end what is left with RST, and everything is dropped.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tracing::{debug, error, info, warn};

mod capture;
mod events;
mod source;

pub use events::DrainRequest;

use crate::admin::{self, Admin, AdminError, AdminHandle, AdminServer, Readiness};
use crate::config::{AccessPlatform, Config, Guest, ListenAddress, Target, VhostUserMode};
use crate::confine::{Confined, Confinement};
use crate::device::{self, Command, DeviceConfig, DeviceHandle, Router, RunningDevice, Siblings};
use crate::drain::{self, Drain, Report};
use crate::guest::RingFault;
use crate::host::dial::Dialer;
use crate::host::listen::{InboundSpec, Incoming, ListenError, Listener, Rejected, Rejection};
use crate::metrics::{self, GuestMetrics, LabelSets, Registry, RuleNames, TotalsSample};
use crate::quota::{Descriptors, Pool, Quota};
use crate::sys::sigbus;
use crate::vhost_user::{self, Endpoint, NegotiationWatch, Session, SessionConfig, SessionHandle};
use crate::vsock::{CloseReason, Misbehavior, RefuseReason};
use events::{Event, Events};
use source::{AdminSource, GuestView};

/// How often a drain looks whether connections are left.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// Why the program could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The vhost-user socket of a guest cannot be had.
    #[error("guest {guest}: {source}")]
    VhostUser {
        /// The guest.
        guest: String,
        /// What is wrong and what to do.
        source: vhost_user::BindError,
    },
    /// The listener of an inbound rule cannot be had.
    #[error("guest {guest}: inbound rule {rule}: {source}")]
    Listen {
        /// The guest.
        guest: String,
        /// The rule.
        rule: String,
        /// What is wrong and what to do.
        source: ListenError,
    },
    /// An admin address cannot be had.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// A thread, a runtime or a signal handler could not be set up.
    #[error("cannot start {what}: {source}")]
    Start {
        /// What could not be started.
        what: &'static str,
        /// The system's words.
        source: std::io::Error,
    },
}

impl Error {
    /// Whether the configuration or its surroundings are to blame, and not this process's resources.
    pub fn is_configuration(&self) -> bool {
        !matches!(self, Error::Start { .. })
    }
}

fn starting(what: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Start { what, source }
}

/// Something that runs beside the sidecar in its process: called on the main thread once everything is bound and runs, and
/// must not block.
pub type Companion = Box<dyn FnOnce(DrainRequest) + Send>;

/// What a process runs.
pub struct Program {
    /// The configuration.
    pub config: Config,
    /// All metrics.
    pub registry: Arc<Registry>,
    /// What [`crate::confine::enter`] made of this process, before it had threads.
    pub confined: Confined,
    /// What runs beside the sidecar.
    pub companions: Vec<Companion>,
}

/// Runs until SIGTERM or SIGINT, or until a [`DrainRequest`]; then drains. A second signal ends the drain.
pub fn run(program: Program) -> Result<(), Error> {
    let Program {
        config,
        registry,
        mut confined,
        companions,
    } = program;
    raise_descriptor_limit();
    if let Err(error) = sigbus::install() {
        warn!(%error, "cannot handle SIGBUS: a VMM that truncates guest memory would end this process");
    }
    let control = Control::start()?;
    // Before anything is bound: a signal that comes meanwhile would end us with socket files left behind, or, as the
    // first process of a container, be lost.
    let (mut terminate, mut interrupt) = {
        let _in_runtime = control.handle.enter();
        (
            signal(SignalKind::terminate()).map_err(starting("the SIGTERM handler"))?,
            signal(SignalKind::interrupt()).map_err(starting("the SIGINT handler"))?,
        )
    };
    if let Some(refusals) = confined.take_refusals() {
        let counter = registry.refused_system_calls();
        control.handle.spawn(async move {
            if let Err(error) = refusals.report(|calls| counter.inc_by(calls)).await {
                error!(%error, "system calls that are refused are not told of any more");
            }
        });
    }
    let sidecar = Sidecar::start_on(control, &config, registry, confined.confinement.clone())?;
    // Not earlier: a start that fails says one thing.
    confined.confinement.announce();
    let shortcut = sidecar.drain.shortcut();
    let request = sidecar.drain_request();
    sidecar.control.handle.spawn(async move {
        let mut seen = 0;
        loop {
            let name = tokio::select! {
                Some(()) = terminate.recv() => "SIGTERM",
                Some(()) = interrupt.recv() => "SIGINT",
                else => return,
            };
            seen += 1;
            if seen == 1 {
                request.begin_for(name);
            } else {
                warn!(signal = name, "ending at once");
                shortcut.cut();
            }
        }
    });
    for companion in companions {
        companion(sidecar.drain_request());
    }
    sidecar.run();
    Ok(())
}

/// Every connection is a descriptor; the soft limit of most systems (1024) is for programs that use `select`.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current < limit.maximum || limit.maximum.is_none() {
        let raised = Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            warn!(%error, soft = ?limit.current, hard = ?limit.maximum, "cannot raise the limit of open files");
        }
    }
}

/// What the guests share, once everything is bound and nothing runs.
fn quota(config: &Config) -> Quota {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    // Without /proc: a few more than there are.
    let open = metrics::open_descriptors().unwrap_or(64);
    let admin = config
        .admin
        .len()
        .saturating_mul(admin::Limits::default().connections);
    let plan = Descriptors::plan(limit, open, admin as u64, config.guests.len() as u64);
    if plan.is_short {
        warn!(
            limit,
            open,
            reserve = plan.reserve,
            connections = plan.budget,
            "the limit of open files (RLIMIT_NOFILE) is low for this configuration: raise it, or connections are refused"
        );
    } else {
        debug!(
            limit,
            open,
            reserve = plan.reserve,
            connections = plan.budget,
            "file descriptors"
        );
    }
    Quota {
        connections: Pool::new(config.limits.connections.map(|count| count as u64)),
        memory: Pool::new(config.limits.memory),
        descriptors: Pool::new(Some(plan.budget)),
    }
}

/// The thread and runtime for names, dials, accepts and signals.
struct Control {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    fn start() -> Result<Control, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name("resolver")
            .build()
            .map_err(starting("the control runtime"))?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                // Ends when the sender is used or dropped.
                let _ = runtime.block_on(stopped);
                // A name that is still being looked up must not hold up the exit.
                runtime.shutdown_background();
            })
            .map_err(starting("the control thread"))?;
        Ok(Control {
            handle,
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct RunningGuest {
    name: String,
    device: RunningDevice,
    session: SessionHandle,
}

/// What is bound of a guest before it runs.
struct BoundGuest {
    config: Arc<Guest>,
    session_config: SessionConfig,
    endpoint: Endpoint,
    listeners: Vec<Listener>,
}

impl BoundGuest {
    fn bind(config: &Guest) -> Result<BoundGuest, Error> {
        let session_config = SessionConfig {
            guest: config.name.clone(),
            cid: config.cid,
            socket: config.vhost_user.socket.clone(),
            mode: match config.vhost_user.mode {
                VhostUserMode::Server => vhost_user::Mode::Server,
                VhostUserMode::Client => vhost_user::Mode::Client,
            },
            access_platform: match config.vhost_user.access_platform {
                AccessPlatform::Auto => vhost_user::AccessPlatform::Auto,
                AccessPlatform::Iotlb => vhost_user::AccessPlatform::Iotlb,
                AccessPlatform::Identity => vhost_user::AccessPlatform::Identity,
                AccessPlatform::Off => vhost_user::AccessPlatform::Off,
            },
        };
        let endpoint = Endpoint::bind(&session_config).map_err(|source| Error::VhostUser {
            guest: config.name.clone(),
            source,
        })?;
        let mut listeners = Vec::with_capacity(config.inbound.len());
        for rule in &config.inbound {
            let listener =
                Listener::bind(&rule.listen, rule.socket_type).map_err(|source| Error::Listen {
                    guest: config.name.clone(),
                    rule: rule.name.clone(),
                    source,
                })?;
            listeners.push(listener.only_from(rule.allow.clone()));
        }
        Ok(BoundGuest {
            config: Arc::new(config.clone()),
            session_config,
            endpoint,
            listeners,
        })
    }
}

/// What all devices share.
struct Surroundings {
    dialer: Dialer,
    siblings: Siblings,
    quota: Quota,
}

/// The names of the guests whose rules lead to the guest `name`.
fn callers(guests: &[Guest], name: &str) -> Vec<String> {
    let leads_there = |guest: &&Guest| {
        guest
            .outbound
            .iter()
            .any(|rule| matches!(&rule.target, Target::Guest { name: to, .. } if to == name))
    };
    guests
        .iter()
        .filter(leads_there)
        .map(|guest| guest.name.clone())
        .collect()
}

/// The running program.
pub struct Sidecar {
    // In the order in which they end.
    admin: Option<AdminHandle>,
    admin_addresses: Vec<ListenAddress>,
    inbound_addresses: BTreeMap<(String, String), ListenAddress>,
    guests: Vec<RunningGuest>,
    control: Control,
    drain: Drain,
    grace: Duration,
    events: Events,
}

impl Sidecar {
    /// Binds everything, then starts everything. On an error nothing is left behind.
    pub fn start(config: &Config, registry: Arc<Registry>) -> Result<Sidecar, Error> {
        Sidecar::start_on(Control::start()?, config, registry, Confinement::NONE)
    }

    fn start_on(
        control: Control,
        config: &Config,
        registry: Arc<Registry>,
        confinement: Confinement,
    ) -> Result<Sidecar, Error> {
        let started = SystemTime::now();
        for (kind, state) in confinement.by_kind() {
            registry.set_confinement(kind, state.is_active());
        }
        let admin_server = AdminServer::bind(&config.admin)?;
        let admin_addresses = admin_server.addresses();
        let bound = config
            .guests
            .iter()
            .map(BoundGuest::bind)
            .collect::<Result<Vec<_>, _>>()?;

        let drain = Drain::new();
        let startup = Readiness::new();
        let starting_up = startup.latch("guests and listeners have started");
        let surroundings = Surroundings {
            dialer: Dialer::new(control.handle.clone()),
            siblings: Siblings::default(),
            quota: quota(config),
        };
        let shared = surroundings.quota.clone();
        registry.set_totals(move || {
            let sample = |pool: &Pool| (pool.used(), pool.limit());
            TotalsSample {
                connections: sample(&shared.connections),
                memory: sample(&shared.memory),
                descriptors: sample(&shared.descriptors),
            }
        });
        let mut sidecar = Sidecar {
            admin: None,
            admin_addresses,
            inbound_addresses: BTreeMap::new(),
            guests: Vec::with_capacity(bound.len()),
            control,
            drain,
            grace: config.drain_timeout,
            events: Events::new(),
        };
        let mut views = Vec::with_capacity(bound.len());
        for guest in bound {
            let callers = callers(&config.guests, &guest.config.name);
            views.push(sidecar.start_guest(guest, &callers, &registry, &surroundings)?);
        }
        drop(starting_up);

        let source = AdminSource {
            registry,
            captures: capture::Places::in_all(),
            guests: views,
            drain: sidecar.drain.watch(),
            confinement,
            started,
        };
        let admin = Admin {
            source: Arc::new(source),
            startup,
            ready: Readiness::new(),
            drain: sidecar.drain.watch(),
        };
        if !sidecar.admin_addresses.is_empty() {
            sidecar.admin = Some(admin_server.spawn(admin)?);
        }
        info!(
            version = env!("CARGO_PKG_VERSION"),
            guests = sidecar.guests.len(),
            admin = ?sidecar.admin_addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "vsock-sidecar is up"
        );
        Ok(sidecar)
    }

    fn start_guest(
        &mut self,
        guest: BoundGuest,
        callers: &[String],
        registry: &Registry,
        surroundings: &Surroundings,
    ) -> Result<GuestView, Error> {
        let config = guest.config;
        let rules = RuleNames {
            outbound: config.outbound.iter().map(|rule| rule.name.clone()).collect(),
            // No rule can have a name with a colon.
            inbound: (config.inbound.iter().map(|rule| rule.name.clone()))
                .chain(callers.iter().map(|caller| format!("guest://{caller}")))
                .collect(),
        };
        let metrics = registry.guest(&config.name, &rules, &LABELS);
        let device = device::spawn(DeviceConfig {
            name: config.name.clone(),
            cid: config.cid,
            limits: config.limits.clone(),
            router: Router::new(config.outbound.clone()),
            dialer: surroundings.dialer.clone(),
            siblings: surroundings.siblings.clone(),
            inbound_rules: config.inbound.len(),
            inbound_limits: config.inbound.iter().map(|rule| rule.connections).collect(),
            quota: surroundings.quota.clone(),
            metrics: Arc::clone(&metrics),
        })
        .map_err(starting("a device thread"))?;
        let handle = device.handle.clone();
        surroundings.siblings.add(&config.name, handle.clone(), callers);

        let watch = NegotiationWatch::new(&guest.session_config);
        let (sampled, gauges, draining) =
            (Arc::clone(&watch), Arc::clone(&device.gauges), self.drain.watch());
        registry.add_session(&config.name, move || {
            source::sample(&sampled, &gauges, draining.is_draining())
        });
        let session = Session::spawn(guest.endpoint, handle.clone(), Arc::clone(&watch))
            .map_err(starting("a session thread"))?;

        for (index, (listener, rule)) in guest.listeners.into_iter().zip(&config.inbound).enumerate() {
            self.inbound_addresses.insert(
                (config.name.clone(), rule.name.clone()),
                listener.address().clone(),
            );
            let spec = InboundSpec {
                rule: index,
                protocol: rule.protocol,
                handshake_timeout: config.limits.guest_timeout,
                wait_for_guest: rule.wait_for_guest,
                socket_type: rule.guest_socket_type(),
                framing: rule.framing,
            };
            self.control.handle.spawn(serve_inbound(
                listener.within(Arc::clone(&surroundings.quota.descriptors)),
                spec,
                InboundSink {
                    guest: Arc::clone(&config),
                    device: handle.clone(),
                    metrics: Arc::clone(&metrics),
                },
                self.drain.watch(),
            ));
        }
        self.guests.push(RunningGuest {
            name: config.name.clone(),
            device,
            session,
        });
        Ok(GuestView {
            config,
            device: handle,
            session: watch,
            metrics,
            captures: capture::Places::of_a_guest(),
        })
    }

    /// Where the admin server listens, with the ports that the kernel chose.
    pub fn admin_addresses(&self) -> &[ListenAddress] {
        &self.admin_addresses
    }

    /// Where an inbound rule listens, with the port that the kernel chose.
    pub fn inbound_address(&self, guest: &str, rule: &str) -> Option<&ListenAddress> {
        self.inbound_addresses.get(&(guest.to_owned(), rule.to_owned()))
    }

    /// Begins the drain of a sidecar that [`Sidecar::run`] runs.
    pub fn drain_request(&self) -> DrainRequest {
        self.events.drain_request()
    }

    /// Waits until a drain is asked for, and drains.
    fn run(self) {
        // An error cannot be: we have a sender ourselves.
        if let Ok(Event::Drain { cause }) = self.events.inbox.recv() {
            info!(cause, "draining; a second signal ends it at once");
        }
        self.stop();
    }

    /// Drains within the configured time, ends what is left, and everything else.
    pub fn stop(self) {
        let report = self.drain_connections();
        if report.is_complete() {
            info!(%report, "drained");
        } else {
            warn!(%report, "drain period is over");
        }
        let Sidecar {
            admin,
            guests,
            control,
            ..
        } = self;
        // All at once, so that the slowest decides and not the sum.
        guests.iter().for_each(|guest| guest.device.stop());
        for guest in guests {
            // The rings must not be pulled from under the last packets, so the device ends first.
            if guest.device.join().is_err() {
                warn!(guest = guest.name, "the device thread had panicked");
            }
            guest.session.shutdown();
        }
        if let Some(admin) = admin {
            admin.shutdown();
        }
        drop(control);
        info!("ended");
    }

    fn drain_connections(&self) -> Report {
        self.drain.begin();
        for guest in &self.guests {
            let _ = guest.device.handle.send(Command::Drain);
            let guard = self.drain.watch().guard(format!("guest {}", guest.name));
            let gauges = Arc::clone(&guest.device.gauges);
            self.control
                .handle
                .spawn(watch_connections(guest.device.handle.clone(), gauges, guard));
        }
        self.drain.wait(self.grace)
    }
}

/// Where the clients of a guest's inbound rules go.
struct InboundSink {
    guest: Arc<Guest>,
    device: DeviceHandle,
    metrics: Arc<GuestMetrics>,
}

impl InboundSink {
    fn take(&self, client: Result<Incoming, Rejected>) {
        match client {
            Ok(incoming) => {
                // A device that is gone closes the client by dropping it.
                let _ = self.device.send(Command::Incoming(incoming));
            }
            Err(rejected) => {
                let reason = match rejected.why {
                    Rejection::NotAllowed => RefuseReason::Acl,
                    Rejection::NoDescriptors => RefuseReason::Descriptors,
                    _ => RefuseReason::BadHandshake,
                };
                let Some(rule) = self.metrics.inbound.get(rejected.rule) else {
                    return;
                };
                if let Some(counter) = rule.refused.get(reason as usize) {
                    counter.inc();
                }
                debug!(
                    guest = self.guest.name, rule = rule.name, peer = rejected.peer, reason = reason.label(),
                    detail = %rejected.why, "inbound client refused"
                );
            }
        }
    }
}

/// Serves one inbound listener until the drain begins.
async fn serve_inbound(listener: Listener, spec: InboundSpec, sink: InboundSink, drain: drain::Watch) {
    let rule = spec.rule;
    if let Err(error) = listener
        .serve(spec, |client| sink.take(client), drain.draining())
        .await
    {
        let name = sink.guest.inbound.get(rule).map_or("?", |rule| &rule.name);
        error!(guest = sink.guest.name, rule = name, %error, "an inbound listener has failed");
    }
}

/// Holds the drain up while connections of one guest are open.
async fn watch_connections(device: DeviceHandle, gauges: Arc<device::DeviceGauges>, guard: drain::Guard) {
    loop {
        // After an answer, the gauges are those of a turn that knew of the drain. Without one nothing is known, and the
        // grace period decides.
        let answered = device.ask(Command::Ping, Duration::from_secs(1)).await.is_ok();
        tokio::time::sleep(DRAIN_POLL).await;
        if answered {
            let open = gauges.open_connections();
            guard.set_remaining(open as u64);
            if open == 0 {
                return;
            }
        }
    }
}

/// The label values that come from enums of the modules that count.
const LABELS: LabelSets = LabelSets {
    refused: RefuseReason::LABELS,
    closed: CloseReason::LABELS,
    misbehavior: Misbehavior::LABELS,
    ring_errors: RingFault::LABELS,
};
