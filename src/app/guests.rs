//! The guests: how each is bound, started, changed, and let go of.

use std::sync::Arc;

use tokio::task::AbortHandle;

use super::capture::Places;
use super::source::GuestView;
use super::{Error, LABELS, starting};
use crate::config::{AccessPlatform, Guest, Target, VhostUserMode};
use crate::device::{self, DeviceConfig, Rules, RunningDevice, Settings, Siblings};
use crate::host::dial::Dialer;
use crate::metrics::{GuestMetrics, Registry};
use crate::quota::Quota;
use crate::vhost_user::{
    self, Endpoint, NegotiationWatch, Session, SessionConfig, SessionHandle, SessionTerms,
};

/// What all devices share.
pub(super) struct Surroundings {
    pub(super) registry: Arc<Registry>,
    pub(super) dialer: Dialer,
    pub(super) siblings: Siblings,
    pub(super) quota: Quota,
}

/// A guest that runs.
pub(super) struct RunningGuest {
    pub(super) config: Arc<Guest>,
    pub(super) device: RunningDevice,
    pub(super) session: SessionHandle,
    pub(super) watch: Arc<NegotiationWatch>,
    pub(super) metrics: Arc<GuestMetrics>,
    pub(super) rules: Arc<Rules>,
    captures: Arc<Places>,
    /// Set: the configuration has it no more, and its connections may end by themselves for a while.
    pub(super) leaving: Option<Departure>,
}

/// A guest on its way out; dropped when that is called off.
pub(super) struct Departure {
    /// Tells it from an earlier one that was called off when its end had been told of already.
    pub(super) number: u64,
    watching: AbortHandle,
}

impl Departure {
    /// `watching` tells of its end.
    pub(super) fn new(number: u64, watching: AbortHandle) -> Departure {
        Departure { number, watching }
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        self.watching.abort();
    }
}

/// What is bound of a guest before it runs.
pub(super) struct BoundGuest {
    config: Arc<Guest>,
    session_config: SessionConfig,
    endpoint: Endpoint,
}

impl BoundGuest {
    pub(super) fn bind(config: &Guest) -> Result<BoundGuest, Error> {
        let session_config = SessionConfig {
            guest: config.name.clone(),
            cid: config.cid,
            socket: config.vhost_user.socket.clone(),
            mode: match config.vhost_user.mode {
                VhostUserMode::Server => vhost_user::Mode::Server,
                VhostUserMode::Client => vhost_user::Mode::Client,
            },
            access_platform: access_platform(config.vhost_user.access_platform),
        };
        let endpoint = Endpoint::bind(&session_config).map_err(|source| Error::VhostUser {
            guest: config.name.clone(),
            source,
        })?;
        Ok(BoundGuest {
            config: Arc::new(config.clone()),
            session_config,
            endpoint,
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.config.name
    }

    /// Starts its device thread.
    pub(super) fn start_device(self, callers: &[String], with: &Surroundings) -> Result<StartedGuest, Error> {
        let config = self.config;
        let metrics = with.registry.guest(&config.name, &LABELS);
        let rules = Arc::new(Rules::new(
            &config.outbound,
            &config.inbound,
            callers,
            &metrics,
            None,
        ));
        let device = device::spawn(DeviceConfig {
            name: config.name.clone(),
            cid: config.cid,
            limits: config.limits.clone(),
            rules: Arc::clone(&rules),
            dialer: with.dialer.clone(),
            siblings: with.siblings.clone(),
            quota: with.quota.clone(),
            metrics: Arc::clone(&metrics),
        })
        .map_err(starting("a device thread"));
        if device.is_err() {
            with.registry.remove_guest(&config.name);
        }
        Ok(StartedGuest {
            watch: NegotiationWatch::new(&self.session_config),
            endpoint: self.endpoint,
            device: device?,
            config,
            metrics,
            rules,
        })
    }
}

/// A guest whose device runs, and that no VMM reaches yet.
pub(super) struct StartedGuest {
    config: Arc<Guest>,
    endpoint: Endpoint,
    device: RunningDevice,
    watch: Arc<NegotiationWatch>,
    metrics: Arc<GuestMetrics>,
    pub(super) rules: Arc<Rules>,
}

impl StartedGuest {
    pub(super) fn config(&self) -> &Arc<Guest> {
        &self.config
    }

    pub(super) fn handle(&self) -> &device::DeviceHandle {
        &self.device.handle
    }

    /// Serves VMMs from now on.
    pub(super) fn start_session(self) -> Result<RunningGuest, Error> {
        let session = Session::spawn(self.endpoint, self.device.handle.clone(), Arc::clone(&self.watch))
            .map_err(starting("a session thread"))?;
        Ok(RunningGuest {
            config: self.config,
            device: self.device,
            session,
            watch: self.watch,
            metrics: self.metrics,
            rules: self.rules,
            captures: Arc::new(Places::of_a_guest()),
            leaving: None,
        })
    }
}

impl RunningGuest {
    /// The rules of another configuration of this guest, with what goes on of the present ones.
    pub(super) fn next_rules(&self, config: &Guest, callers: &[String]) -> Arc<Rules> {
        let (outbound, inbound) = (&config.outbound, &config.inbound);
        Arc::new(Rules::new(
            outbound,
            inbound,
            callers,
            &self.metrics,
            Some(&self.rules),
        ))
    }

    /// Runs by another configuration from now on; what the device has to be told of it. Sessions hear of it when they begin.
    pub(super) fn adopt(&mut self, config: Arc<Guest>, rules: Arc<Rules>) -> Settings {
        self.session.terms().set(SessionTerms {
            cid: config.cid,
            access_platform: access_platform(config.vhost_user.access_platform),
        });
        self.leaving = None;
        self.rules = Arc::clone(&rules);
        self.config = config;
        Settings {
            limits: self.config.limits.clone(),
            rules,
        }
    }

    /// As readers see it.
    pub(super) fn view(&self) -> GuestView {
        GuestView {
            config: Arc::clone(&self.config),
            device: self.device.handle.clone(),
            session: Arc::clone(&self.watch),
            terms: Arc::clone(self.session.terms()),
            rules: Arc::clone(&self.rules),
            captures: Arc::clone(&self.captures),
            is_leaving: self.leaving.is_some(),
        }
    }
}

/// The names of the guests whose rules lead to the guest `name`.
pub(super) fn callers(guests: &[Guest], name: &str) -> Vec<String> {
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

fn access_platform(wanted: AccessPlatform) -> vhost_user::AccessPlatform {
    match wanted {
        AccessPlatform::Auto => vhost_user::AccessPlatform::Auto,
        AccessPlatform::Iotlb => vhost_user::AccessPlatform::Iotlb,
        AccessPlatform::Identity => vhost_user::AccessPlatform::Identity,
        AccessPlatform::Off => vhost_user::AccessPlatform::Off,
    }
}
