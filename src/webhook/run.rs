//! The program: load, confine, listen, serve, drain.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_rustls::{TlsAcceptor, rustls};
use tracing::{error, info, warn};

use super::body::Budget;
use super::certificate::{CertificateError, Files, Keeper, Look};
use super::routes::{Desk, Rarely};
use super::server::{self, Begin};
use super::{Limits, Settings};
use crate::config::{self, LandlockMode, LogFormat, SeccompMode};
use crate::confine::{self, Policy, Surroundings};
use crate::logging::{self, LogError};
use crate::metrics::WebhookRegistry;

/// Requests that are under way have so long to end at shutdown.
const LINGER: Duration = Duration::from_secs(5);
/// A certificate that ends within this time is a warning: whoever should have renewed it has not.
const SOON: i64 = 24 * 3600;
/// The certificate is looked at no more often.
const MIN_INTERVAL: Duration = Duration::from_millis(10);

/// What the program is started with.
#[derive(Clone, PartialEq, Debug)]
pub struct Options {
    /// Where the API server finds it.
    pub listen: SocketAddr,
    /// Where Prometheus finds it; `None`: nowhere.
    pub metrics: Option<SocketAddr>,
    /// The server's certificate.
    pub certificate: Files,
    /// How often its files are looked at. SIGHUP looks at once.
    pub certificate_interval: Duration,
    /// What is put into pods.
    pub settings: Settings,
    /// How long SIGTERM is only a word: the API server learns late that this replica goes, and would find nobody.
    pub drain: Duration,
    /// The log's form.
    pub log_format: LogFormat,
    /// The log's level, or a filter.
    pub log_level: String,
}

/// Why the webhook does not run. One line each.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing to serve with.
    #[error("webhook: {0}")]
    Certificate(#[from] CertificateError),
    /// rustls does not take its own defaults.
    #[error("webhook: cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// An address cannot be had.
    #[error("webhook: cannot listen on {address} ({option}): {source}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Where it comes from.
        option: &'static str,
        /// The system's words.
        source: io::Error,
    },
    /// The log.
    #[error("webhook: {0}")]
    Log(#[from] LogError),
    /// The metrics.
    #[error("webhook: cannot set up metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The runtime.
    #[error("webhook: cannot set up the server: {0}")]
    Runtime(#[source] io::Error),
}

impl Error {
    /// Whether what was asked for is the reason.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Error::Certificate(_) | Error::Listen { .. } | Error::Log(LogError::BadFilter { .. })
        )
    }
}

/// Serves until SIGTERM or SIGINT. Blocks. To be called **before the process has a second thread**.
///
/// # Errors
/// If it cannot start.
pub fn run(options: Options) -> Result<(), Error> {
    let (keeper, not_after) = Keeper::new(options.certificate.clone())?;
    let mut confined = confine::enter_with(&WANTED, || policy(&options));
    let metrics = WebhookRegistry::new()?;
    let _written_at_the_end = logging::init(options.log_format, &options.log_level, metrics.log_messages())
        .map_err(|error| match error {
        // Where it comes from here.
        LogError::BadFilter { filter, problem, .. } if filter == options.log_level => LogError::BadFilter {
            filter,
            problem,
            origin: "--log-level",
        },
        error => error,
    })?;
    confined.confinement.announce();
    for (kind, state) in confined.confinement.by_kind() {
        metrics.set_confinement(kind, state.is_active());
    }
    let desk = Arc::new(Desk {
        settings: options.settings.clone(),
        limits: Limits::DEFAULT,
        bodies: Budget::new(Limits::DEFAULT.all_bodies),
        draining: AtomicBool::new(false),
        told_of_malformed: Rarely::default(),
        told_of_handshakes: Rarely::default(),
        metrics,
    });
    use_certificate(&desk, not_after);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    runtime.block_on(async {
        if let Some(refusals) = confined.take_refusals() {
            let counter = desk.metrics.refused_system_calls();
            tokio::spawn(refusals.report(move |count| counter.inc_by(count)));
        }
        serve(&options, keeper, desk).await
    })
}

/// All of it: there is nothing that this program needs and the sidecar does not.
const WANTED: config::Confinement = config::Confinement {
    no_new_privileges: true,
    seccomp: SeccompMode::Enforce,
    landlock: LandlockMode::Enforce,
    paths: Vec::new(),
};

fn policy(options: &Options) -> Policy {
    let Files { certificate, key } = &options.certificate;
    let ports = [Some(options.listen), options.metrics];
    let ports = ports.into_iter().flatten().map(|address| address.port());
    Policy::of_server(ports, &[key], &Surroundings::look(certificate))
}

async fn serve(options: &Options, mut keeper: Keeper, desk: Arc<Desk>) -> Result<(), Error> {
    // Before the listeners, so that whoever waits for these can send signals.
    let mut hangup = signal(SignalKind::hangup()).map_err(Error::Runtime)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Runtime)?;
    let (stop, stopped) = watch::channel(false);
    let mut servers = JoinSet::new();
    let admission = listen(options.listen, "--listen")?;
    let address = admission.local_addr().map_err(Error::Runtime)?;
    let begin = Begin::Tls(TlsAcceptor::from(keeper.tls()?));
    servers.spawn(server::serve(admission, begin, desk.clone(), stopped.clone()));
    let mut metrics_address = None;
    if let Some(metrics) = options.metrics {
        let metrics = listen(metrics, "--metrics")?;
        metrics_address = metrics.local_addr().ok();
        servers.spawn(server::serve(metrics, Begin::Plain, desk.clone(), stopped));
    }
    info!(
        %address,
        metrics = metrics_address.map(tracing::field::display),
        image = options.settings.image,
        "the webhook serves"
    );

    // An interval of nothing is a panic.
    let mut looks = interval(options.certificate_interval.max(MIN_INTERVAL));
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    looks.reset();
    loop {
        tokio::select! {
            _ = looks.tick() => look(&mut keeper, &desk),
            _ = hangup.recv() => look(&mut keeper, &desk),
            () = any(&mut terminate, &mut interrupt) => break,
        }
    }
    desk.draining.store(true, Ordering::Relaxed);
    info!(
        seconds = options.drain.as_secs_f64(),
        "shutting down; a second signal ends it at once"
    );
    tokio::select! {
        () = sleep(options.drain) => {}
        () = any(&mut terminate, &mut interrupt) => return Ok(()),
    }
    stop.send_replace(true);
    tokio::select! {
        ended = timeout(LINGER, async { while servers.join_next().await.is_some() {} }) => if ended.is_err() {
            warn!("connections were cut off that had not ended after {} s", LINGER.as_secs());
        },
        () = any(&mut terminate, &mut interrupt) => {}
    }
    info!("the webhook has ended");
    Ok(())
}

async fn any(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

fn listen(address: SocketAddr, option: &'static str) -> Result<TcpListener, Error> {
    server::bind(address)
        .and_then(TcpListener::from_std)
        .map_err(|source| Error::Listen {
            address,
            option,
            source,
        })
}

fn look(keeper: &mut Keeper, desk: &Desk) {
    match keeper.look(unix_time()) {
        Look::Same => {}
        Look::New { not_after } => {
            desk.metrics.certificate_reloads.inc();
            info!("new connections get the new certificate");
            use_certificate(desk, not_after);
        }
        Look::Bad(problem) => {
            desk.metrics.certificate_reload_failures.inc();
            desk.metrics.certificate_current.set(0);
            error!(%problem, "the certificate has changed and cannot be used; the one before goes on");
        }
    }
}

fn use_certificate(desk: &Desk, not_after: i64) {
    desk.metrics.certificate_current.set(1);
    desk.metrics.certificate_expiry.set(not_after as f64);
    let left = not_after.saturating_sub(unix_time());
    if left <= 0 {
        error!(
            not_after,
            "the certificate has expired; no API server will take it"
        );
    } else if left < SOON {
        warn!(not_after, "the certificate expires within a day");
    }
}

/// In seconds; 0 for clocks before 1970.
fn unix_time() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
