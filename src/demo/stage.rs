//! Everything that the demo shows, set up and taken down in the right order.

use std::fs::DirBuilder;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::interrupt::Interrupt;
use super::service::Services;
use super::terminal::Terminal;
use super::{Effort, Error, http};
use crate::app::Sidecar;
use crate::config::{self, ListenAddress};
use crate::metrics::Registry;

/// Port of the outbound rule to the HTTP service.
pub(super) const HTTP_PORT: u32 = 80;
/// Port of the outbound rule to the bulk service.
pub(super) const BULK_PORT: u32 = 5001;
/// A port that no rule names.
pub(super) const UNRULED_PORT: u32 = 4444;
/// Where a server listens in the guest.
pub(super) const GUEST_WEB_PORT: u32 = 8080;

/// What it serves.
pub(super) const GUEST_PAGE: &str = "Hello from a server in the guest that knows nothing of TCP.\n";

/// What the acts need of a guest, be it embedded or real. It connects to the host, CID 2, and has a web server of its own
/// at [`GUEST_WEB_PORT`]. Times are taken where the guest's program runs. All of these block.
pub(super) trait Guest {
    /// Its CID, as the device told it.
    fn cid(&self) -> u64;

    /// What it is, in a few words.
    fn description(&self) -> String;

    /// Gets `/` from an HTTP service behind a port of the host: the answer, and the time from connect to its end.
    fn fetch(&mut self, port: u32) -> Result<(http::Answer, Duration), Error>;

    /// Connects to a port that refuses with RST; how long that took.
    fn knock(&mut self, port: u32) -> Result<Duration, Error>;

    /// Moves data through one connection to the bulk service, has them checked and shows what came out.
    fn bulk(
        &mut self,
        way: Way,
        t: &mut Terminal,
        interrupt: &Interrupt,
        effort: Effort,
    ) -> Result<(), Error>;

    /// How it moves them, and what to think of the figures.
    fn bulk_remark(&self) -> &'static str;

    /// What it has to say of the device.
    fn verdict(&self) -> Verdict;

    /// Ends it.
    fn end(self: Box<Self>) -> Result<(), Error>;
}

/// Which way bulk data go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    GuestToHost,
    HostToGuest,
}

impl Way {
    /// For a line of figures.
    pub(super) fn label(self) -> &'static str {
        match self {
            Way::GuestToHost => "guest -> service",
            Way::HostToGuest => "service -> guest",
        }
    }
}

/// What a guest has to say of the device.
#[derive(Debug)]
pub(super) struct Verdict {
    /// One word.
    pub(super) about: &'static str,
    /// Nothing to complain of.
    pub(super) good: bool,
    /// The verdict.
    pub(super) text: String,
    /// Whose it is.
    pub(super) judge: &'static str,
}

/// Where a guest is booted.
pub(super) struct Place<'a> {
    /// The vhost-user socket, on which the sidecar listens.
    pub(super) vhost_user: &'a Path,
    /// For files of its own, removed at the end.
    pub(super) dir: &'a Path,
    /// The services that it will talk to.
    pub(super) services: &'a Services,
}

/// The running demo.
pub(super) struct Stage {
    // Fields end in this order: the guest first, its directory last.
    /// The guest.
    pub(super) guest: Box<dyn Guest>,
    sidecar: SidecarGuard,
    /// The services that the guest reaches.
    pub(super) services: Services,
    /// Where the inbound rule listens.
    pub(super) web: SocketAddr,
    /// Where the admin server listens on TCP.
    pub(super) admin: SocketAddr,
    /// Where it listens besides.
    pub(super) admin_socket: PathBuf,
    _dir: TempDir,
}

/// The demo's configuration, as an operator would write it.
fn configuration(dir: &Path, services: &Services) -> String {
    format!(
        r#"admin:
  listen: ["tcp://127.0.0.1:9464", "unix://{dir}/admin.sock"]
drain: {{timeout: 2s}}
guests:
  - name: demo
    cid: 3
    vhostUser:
      socket: {dir}/vhost-user.sock
    outbound:
      - {{name: http, port: {HTTP_PORT}, to: "tcp://{http}"}}
      - {{name: bulk, port: {BULK_PORT}, to: "tcp://{bulk}"}}
    inbound:
      - {{name: web, listen: "tcp://127.0.0.1:8080", port: {GUEST_WEB_PORT}}}
"#,
        dir = dir.display(),
        http = services.http,
        bulk = services.bulk,
    )
}

impl Stage {
    /// Starts services, sidecar and guest, in this order, and introduces them.
    pub(super) fn set_up(
        t: &mut Terminal,
        boot: impl FnOnce(&Place<'_>, &mut Terminal) -> Result<Box<dyn Guest>, Error>,
    ) -> Result<Stage, Error> {
        let dir = TempDir::create()?;
        let services = Services::start()?;
        let (mut config, _) = config::parse(&configuration(dir.path(), &services), "demo.yaml")?;
        // A configuration names its ports; the demo must not collide with a sidecar that runs already.
        let any = ListenAddress::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        config.admin.iter_mut().take(1).for_each(|a| *a = any.clone());
        let rules = config.guests.iter_mut().flat_map(|g| &mut g.inbound);
        rules.for_each(|rule| rule.listen = any.clone());

        let registry = Registry::new().map_err(|e| Error::Unexpected(format!("the metric registry: {e}")))?;
        let sidecar = Sidecar::start(&config, Arc::new(registry))?;
        let admin = tcp_of(sidecar.admin_addresses().first())?;
        let web = tcp_of(sidecar.inbound_address("demo", "web"))?;
        let sidecar = SidecarGuard(Some(sidecar));
        let vhost_user = dir.path().join("vhost-user.sock");
        t.field(
            "service",
            &format!("http://{}", services.http),
            "a small HTTP server",
        )?;
        t.field(
            "sidecar",
            &vhost_user.display().to_string(),
            "its vhost-user socket",
        )?;
        let place = Place {
            vhost_user: &vhost_user,
            dir: dir.path(),
            services: &services,
        };
        let guest = boot(&place, t)?;
        t.field("guest", &format!("CID {}", guest.cid()), &guest.description())?;
        let stage = Stage {
            guest,
            sidecar,
            services,
            web,
            admin,
            admin_socket: dir.path().join("admin.sock"),
            _dir: dir,
        };
        stage.wait_until_ready()?;
        Ok(stage)
    }

    /// A page of the admin server.
    pub(super) fn admin_page(&self, path: &str) -> Result<http::Answer, Error> {
        http::get_unix(&self.admin_socket, path).map_err(Error::io(format!("GET {path} of the admin server")))
    }

    /// Ends everything in order.
    pub(super) fn take_down(self) -> Result<(), Error> {
        let Stage {
            guest,
            sidecar,
            services,
            _dir,
            ..
        } = self;
        guest.end()?;
        drop(sidecar);
        drop(services);
        Ok(())
    }

    /// /readyz says yes once the rings run.
    fn wait_until_ready(&self) -> Result<(), Error> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let answer = self.admin_page("/readyz")?;
            if answer.status.contains(" 200 ") {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::Unexpected(format!("/readyz: {}", answer.body.trim_end())));
            }
            std::thread::yield_now();
        }
    }
}

/// Ends the sidecar as SIGTERM would.
struct SidecarGuard(Option<Sidecar>);

impl Drop for SidecarGuard {
    fn drop(&mut self) {
        if let Some(sidecar) = self.0.take() {
            sidecar.stop();
        }
    }
}

fn tcp_of(address: Option<&ListenAddress>) -> Result<SocketAddr, Error> {
    match address {
        Some(ListenAddress::Tcp(address)) => Ok(*address),
        other => Err(Error::Unexpected(format!(
            "the sidecar listens on {other:?} instead of TCP"
        ))),
    }
}

/// A directory of our own for sockets, removed at the end. Short: a socket's path has 108 bytes.
#[derive(Debug)]
struct TempDir(PathBuf);

impl TempDir {
    fn create() -> Result<TempDir, Error> {
        let base = std::env::temp_dir();
        for attempt in 0..100 {
            let path = base.join(format!("vsock-demo-{}-{attempt}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(TempDir(path)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io(format!("make {}", path.display()))(error)),
            }
        }
        Err(Error::Unexpected(format!(
            "{} is full of old directories of this demo",
            base.display()
        )))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
