//! The running sidecar, which one thread owns: what it runs by is changed by that thread only.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use rustix::process::{Resource, getrlimit};
use tracing::{debug, info, warn};

use super::control::Control;
use super::draining::{self, Watched};
use super::events::{Cause, DrainRequest, Event, Events};
use super::guests::{BoundGuest, Departure, RunningGuest, StartedGuest, Surroundings, callers};
use super::listeners::Listeners;
use super::reload::Reloader;
use super::source::{AdminSource, GuestView};
use super::status::Status;
use super::{Error, Until, capture};
use crate::admin::{self, Admin, AdminHandle, AdminServer, Readiness};
use crate::config::{Config, Guest, ListenAddress};
use crate::confine::Confinement;
use crate::device::{Command, Rules, Sibling, Siblings};
use crate::drain::Drain;
use crate::host::dial::Dialer;
use crate::metrics::{self, Registry, TotalsSample};
use crate::quota::{Descriptors, Pool, Quota};

/// How long a device may take to take other rules. Its turns are milliseconds; one that takes longer gets them when it can.
const DEVICE_PATIENCE: Duration = Duration::from_secs(2);

/// The guests, for readers on other threads: replaced as a whole.
#[derive(Clone, Default)]
pub(super) struct Views(Arc<RwLock<Arc<[GuestView]>>>);

impl Views {
    /// As they are now.
    pub(super) fn now(&self) -> Arc<[GuestView]> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn set(&self, views: Arc<[GuestView]>) {
        let before = std::mem::replace(
            &mut *self.0.write().unwrap_or_else(PoisonError::into_inner),
            views,
        );
        // Not under the lock: series of rules end with their last holder.
        drop(before);
    }
}

/// Who gets how many of the process's descriptors depends on these.
struct DescriptorBudget {
    limit: u64,
    open: u64,
    admin: u64,
}

impl DescriptorBudget {
    /// What is open now is counted, before any guest has anything.
    fn look(admin_listeners: usize) -> DescriptorBudget {
        let admin = admin_listeners.saturating_mul(admin::Limits::default().connections);
        DescriptorBudget {
            limit: getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX),
            // Without /proc: a few more than there are.
            open: metrics::open_descriptors().unwrap_or(64),
            admin: admin as u64,
        }
    }

    /// What connections may have beside so many guests.
    fn of(&self, guests: usize) -> u64 {
        let plan = Descriptors::plan(self.limit, self.open, self.admin, guests as u64);
        let Descriptors {
            limit,
            open,
            reserve,
            budget: connections,
            is_short,
        } = plan;
        if is_short {
            warn!(
                limit,
                open,
                reserve,
                connections,
                "the limit of open files (RLIMIT_NOFILE) is low for this configuration: raise it, or connections are refused"
            );
        } else {
            debug!(limit, open, reserve, connections, "file descriptors");
        }
        connections
    }
}

/// The running program.
pub struct Sidecar {
    // In the order in which they end.
    admin: Option<AdminHandle>,
    admin_addresses: Vec<ListenAddress>,
    guests: Vec<RunningGuest>,
    listeners: Listeners,
    views: Views,
    with: Surroundings,
    descriptors: DescriptorBudget,
    pub(super) control: Control,
    pub(super) drain: Drain,
    events: Events,
    status: Arc<Status>,
    /// What runs: of keys that need a restart, what they were at start.
    config: Config,
    departures: u64,
}

impl Sidecar {
    /// Binds everything, then starts everything. On an error nothing is left behind.
    pub fn start(config: &Config, registry: Arc<Registry>) -> Result<Sidecar, Error> {
        Sidecar::start_on(
            Control::start()?,
            config,
            registry,
            Confinement::NONE,
            Status::new(None, SystemTime::now()),
        )
    }

    pub(super) fn start_on(
        control: Control,
        config: &Config,
        registry: Arc<Registry>,
        confinement: Confinement,
        status: Arc<Status>,
    ) -> Result<Sidecar, Error> {
        let started = SystemTime::now();
        for (kind, state) in confinement.by_kind() {
            registry.set_confinement(kind, state.is_active());
        }
        registry.reloads().started(started);
        let admin_server = AdminServer::bind(&config.admin)?;
        let admin_addresses = admin_server.addresses();

        let drain = Drain::new();
        let startup = Readiness::new();
        let starting_up = startup.latch("guests and listeners have started");
        let quota = Quota {
            connections: Pool::new(None),
            memory: Pool::new(None),
            descriptors: Pool::new(None),
        };
        let shared = quota.clone();
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
            guests: Vec::new(),
            listeners: Listeners::default(),
            views: Views::default(),
            with: Surroundings {
                registry: Arc::clone(&registry),
                dialer: Dialer::new(control.handle.clone()),
                siblings: Siblings::default(),
                quota,
            },
            descriptors: DescriptorBudget::look(config.admin.len()),
            control,
            drain,
            events: Events::new(),
            status,
            config: Config {
                guests: Vec::new(),
                ..config.clone()
            },
            departures: 0,
        };
        sidecar.run_by(config)?;
        drop(starting_up);

        let source = AdminSource {
            registry,
            captures: capture::Places::in_all(),
            guests: sidecar.views.clone(),
            drain: sidecar.drain.watch(),
            events: sidecar.events.sender(),
            drain_request: sidecar.drain_request(),
            status: Arc::clone(&sidecar.status),
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

    /// What runs now.
    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    /// What runs now, with the guests that the configuration has no more and that are not gone.
    pub(super) fn config_of_all(&self) -> Config {
        let leaving = self.guests.iter().filter(|guest| guest.leaving.is_some());
        let mut all = self.config.clone();
        all.guests
            .extend(leaving.map(|guest| Guest::clone(&guest.config)));
        all
    }

    /// Changes what runs into `config`, whose keys that need a restart are those of the start. What can be refused comes first, and
    /// on an error everything is as before. Connections go on, whatever becomes of their rules.
    pub(super) fn run_by(&mut self, config: &Config) -> Result<(), Error> {
        let bound = self.bind_new_guests(config)?;
        let plan = self.listeners.plan(&config.guests, &self.admin_addresses)?;
        let started = bound
            .into_iter()
            .map(|guest| {
                let callers = callers(&config.guests, guest.name());
                guest.start_device(&callers, &self.with)
            })
            .collect::<Result<Vec<_>, _>>()
            .inspect_err(|_| self.forget_new_guests(config))?;
        let next = self.next_rules(config);
        self.introduce(config, &next, &started);
        let budget = self.descriptors.of(config.guests.len());
        let new = started
            .into_iter()
            .map(StartedGuest::start_session)
            .collect::<Result<Vec<_>, _>>()
            .inspect_err(|_| self.undo_introduction(config))?;

        // From here on nothing is refused.
        let limits = &config.limits;
        let quota = &self.with.quota;
        quota
            .connections
            .set_limit(limits.connections.map(|count| count as u64));
        quota.memory.set_limit(limits.memory);
        quota.descriptors.set_limit(Some(budget));
        self.reconfigure(config, next);
        for guest in new {
            self.export_session(&guest);
            self.guests.push(guest);
        }
        self.listeners.carry_out(
            plan,
            &self.guests,
            &self.control.handle,
            &self.with.quota.descriptors,
            &self.drain.watch(),
        );
        self.config = config.clone();
        self.let_go_of_others();
        self.in_order();
        self.publish();
        Ok(())
    }

    fn bind_new_guests(&self, config: &Config) -> Result<Vec<BoundGuest>, Error> {
        let is_new = |guest: &&Guest| self.guest(&guest.name).is_none();
        let new = config.guests.iter().filter(is_new);
        new.map(|guest| {
            let path = &guest.vhost_user.socket;
            let holder = self
                .guests
                .iter()
                .find(|other| other.config.vhost_user.socket == *path);
            match holder {
                None => BoundGuest::bind(guest),
                Some(holder) => {
                    let name = &holder.config.name;
                    let stays = config.guests.iter().any(|guest| guest.name == *name);
                    Err(Error::SocketHeld {
                        guest: guest.name.clone(),
                        socket: path.clone(),
                        holder: name.clone(),
                        until: match holder.leaving {
                            _ if stays => Until::Restart,
                            Some(_) => Until::Gone,
                            None => Until::Removed,
                        },
                    })
                }
            }
        })
        .collect()
    }

    fn guest(&self, name: &str) -> Option<&RunningGuest> {
        self.guests.iter().find(|guest| guest.config.name == name)
    }

    /// The rules of guests that run and stay.
    fn next_rules(&self, config: &Config) -> HashMap<String, Arc<Rules>> {
        let next = config.guests.iter().filter_map(|guest| {
            let running = self.guest(&guest.name)?;
            let callers = callers(&config.guests, &guest.name);
            Some((guest.name.clone(), running.next_rules(guest, &callers)))
        });
        next.collect()
    }

    /// Makes the guests of `config` known to each other, before any of them has a rule that leads to another.
    fn introduce(&self, config: &Config, next: &HashMap<String, Arc<Rules>>, started: &[StartedGuest]) {
        let staying = self.guests.iter().filter_map(|guest| {
            let rules = next.get(&guest.config.name)?;
            Some((guest.config.name.clone(), guest.device.handle.clone(), rules))
        });
        let new = started
            .iter()
            .map(|guest| (guest.config().name.clone(), guest.handle().clone(), &guest.rules));
        let siblings = staying
            .chain(new)
            .map(|(name, handle, rules)| (name, Sibling::new(handle, Arc::clone(rules))));
        self.with.siblings.replace(siblings.collect());
        debug!(guests = config.guests.len(), "the guests know each other");
    }

    /// A configuration was refused after its guests were introduced.
    fn undo_introduction(&self, refused: &Config) {
        let before = self.guests.iter().filter(|guest| guest.leaving.is_none());
        let siblings = before.map(|guest| {
            let sibling = Sibling::new(guest.device.handle.clone(), Arc::clone(&guest.rules));
            (guest.config.name.clone(), sibling)
        });
        self.with.siblings.replace(siblings.collect());
        self.forget_new_guests(refused);
    }

    fn forget_new_guests(&self, refused: &Config) {
        for guest in &refused.guests {
            if self.guest(&guest.name).is_none() {
                self.with.registry.remove_guest(&guest.name);
            }
        }
    }

    /// Tells the guests that stay. All are told before the first answer is awaited.
    fn reconfigure(&mut self, config: &Config, mut next: HashMap<String, Arc<Rules>>) {
        let mut asked = Vec::new();
        for guest in &config.guests {
            let running = self
                .guests
                .iter_mut()
                .find(|running| running.config.name == guest.name);
            let (Some(running), Some(rules)) = (running, next.remove(&guest.name)) else {
                continue;
            };
            let settings = running.adopt(Arc::new(guest.clone()), rules);
            let handle = running.device.handle.clone();
            let name = guest.name.clone();
            asked.push(self.control.handle.spawn(async move {
                let told = handle.ask(|done| Command::Reconfigure { settings, done }, DEVICE_PATIENCE);
                if told.await.is_err() {
                    // It is in its queue, or what it is made anew from.
                    warn!(
                        guest = name,
                        "the device thread has not answered, and takes its new rules when it can"
                    );
                }
            }));
        }
        for answer in asked {
            let _ = self.control.handle.block_on(answer);
        }
    }

    fn export_session(&self, guest: &RunningGuest) {
        let (watch, gauges, draining) = (
            Arc::clone(&guest.watch),
            Arc::clone(&guest.device.gauges),
            self.drain.watch(),
        );
        self.with.registry.add_session(&guest.config.name, move || {
            super::source::sample(&watch, &gauges, draining.is_draining())
        });
    }

    /// Guests that the configuration has no more: their connections may end by themselves, as in a drain.
    fn let_go_of_others(&mut self) {
        let stays: BTreeSet<&str> = self
            .config
            .guests
            .iter()
            .map(|guest| guest.name.as_str())
            .collect();
        for guest in &mut self.guests {
            if guest.leaving.is_some() || stays.contains(guest.config.name.as_str()) {
                continue;
            }
            self.departures += 1;
            let number = self.departures;
            let _ = guest.device.handle.send(Command::Drain);
            let watched = Watched::of(guest, self.config.drain.linger);
            let timeout = self.config.drain.timeout;
            let events = self.events.sender();
            let name = guest.config.name.clone();
            info!(
                guest = name,
                ?timeout,
                "guest removed: its connections may go on for a while"
            );
            let watching = self.control.handle.spawn(async move {
                // Whether in time or not, it has to go now.
                let _ = tokio::time::timeout(timeout, draining::is_over(watched, |_| {})).await;
                let _ = events.send(Event::Departed { name, number });
            });
            guest.leaving = Some(Departure::new(number, watching.abort_handle()));
        }
    }

    /// A guest that was removed has no more to do, or its time is over.
    fn departed(&mut self, name: &str, number: u64) {
        let gone = |guest: &RunningGuest| {
            guest.config.name == name
                && guest
                    .leaving
                    .as_ref()
                    .is_some_and(|leaving| leaving.number == number)
        };
        let Some(index) = self.guests.iter().position(gone) else {
            return;
        };
        let guest = self.guests.remove(index);
        self.publish();
        end_guest(guest);
        self.with.registry.remove_guest(name);
        info!(guest = name, "guest gone");
    }

    /// The guests in the order of the file, those that leave last.
    fn in_order(&mut self) {
        let order: HashMap<&str, usize> = self
            .config
            .guests
            .iter()
            .enumerate()
            .map(|(index, guest)| (guest.name.as_str(), index))
            .collect();
        self.guests.sort_by_key(|guest| {
            order
                .get(guest.config.name.as_str())
                .copied()
                .unwrap_or(usize::MAX)
        });
    }

    fn publish(&self) {
        self.views
            .set(self.guests.iter().map(RunningGuest::view).collect());
        self.status
            .set_require_session(self.config.readiness.require_session);
    }

    /// Where the admin server listens, with the ports that the kernel chose.
    pub fn admin_addresses(&self) -> &[ListenAddress] {
        &self.admin_addresses
    }

    /// Where an inbound rule listens, with the port that the kernel chose.
    pub fn inbound_address(&self, guest: &str, rule: &str) -> Option<&ListenAddress> {
        self.listeners.address(guest, rule)
    }

    /// Begins the drain of a sidecar that [`super::run`] runs.
    pub fn drain_request(&self) -> DrainRequest {
        self.events.drain_request()
    }

    pub(super) fn events(&self) -> &Events {
        &self.events
    }

    /// Does what is asked for, one after the other, until a drain is asked for; then drains.
    pub(super) fn run(mut self, mut reloader: Reloader) {
        // An error cannot be: we have a sender ourselves.
        while let Ok(event) = self.events.inbox.recv() {
            match event {
                Event::Drain { cause } => {
                    info!(cause, "draining; a second signal ends it at once");
                    break;
                }
                // Whoever waits for an answer hears that there is none.
                Event::Reload { .. } if self.events.is_drain_asked() => {}
                Event::Reload { cause, answer } => {
                    let outcome = reloader.reload(&mut self, cause);
                    if let Some(answer) = answer {
                        // Who asked may have gone.
                        let _ = answer.send(outcome);
                    }
                }
                Event::Departed { name, number } => {
                    self.departed(&name, number);
                    if reloader.waits_for_departure {
                        reloader.reload(&mut self, Cause::File);
                    }
                }
            }
        }
        self.stop();
    }

    /// Drains within the configured time, ends what is left, and everything else.
    pub fn stop(self) {
        let report = draining::drain(
            &self.drain,
            &self.config.drain,
            &self.guests,
            &self.control.handle,
        );
        if report.is_complete() {
            info!(%report, "drained");
        } else {
            warn!(%report, "drain period is over");
        }
        let Sidecar {
            admin,
            guests,
            control,
            views,
            ..
        } = self;
        // All at once, so that the slowest decides and not the sum.
        guests.iter().for_each(|guest| guest.device.stop());
        guests.into_iter().for_each(end_guest);
        if let Some(admin) = admin {
            admin.shutdown();
        }
        drop(views);
        drop(control);
        info!("ended");
    }
}

fn end_guest(guest: RunningGuest) {
    // The rings must not be pulled from under the last packets, so the device ends first.
    if guest.device.join().is_err() {
        warn!(guest = guest.config.name, "the device thread had panicked");
    }
    guest.session.shutdown();
}
