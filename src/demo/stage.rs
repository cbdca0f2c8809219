//! Everything that the demo shows, set up and taken down in the right order.

use std::fs::DirBuilder;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::service::Services;
use super::{Error, http};
use crate::app::Sidecar;
use crate::config::{self, ListenAddress};
use crate::embedded_guest::{
    DriverOptions, EmbeddedGuest, GuestListener, Profile, SocketOptions, Sockets, Violations,
};
use crate::metrics::Registry;

/// Port of the outbound rule to the HTTP service.
pub(super) const HTTP_PORT: u32 = 80;
/// Port of the outbound rule to the bulk service.
pub(super) const BULK_PORT: u32 = 5001;
/// A port that no rule names.
pub(super) const UNRULED_PORT: u32 = 4444;
/// Where a server listens in the guest.
pub(super) const GUEST_WEB_PORT: u32 = 8080;

const GUEST_PAGE: &str = "Hello from a server in the guest that knows nothing of TCP.\n";

/// The running demo.
pub(super) struct Stage {
    // Fields end in this order: the guest first, its directory last.
    /// The guest's sockets.
    pub(super) guest: Sockets,
    server: Option<JoinHandle<()>>,
    sidecar: SidecarGuard,
    /// The services that the guest reaches.
    pub(super) services: Services,
    /// The guest's CID, as the device told it.
    pub(super) cid: u64,
    /// Where the inbound rule listens.
    pub(super) web: SocketAddr,
    /// Where the admin server listens on TCP.
    pub(super) admin: SocketAddr,
    /// Where it listens besides.
    pub(super) admin_socket: PathBuf,
    /// The vhost-user socket.
    pub(super) vhost_user: PathBuf,
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
    /// Starts services, sidecar and guest, in this order.
    pub(super) fn set_up() -> Result<Stage, Error> {
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
        let guest = EmbeddedGuest::boot(&vhost_user, Profile::qemu(), DriverOptions::default())?;
        let cid = guest.cid();
        let guest = Sockets::start(guest, SocketOptions::default())?;
        let listener = guest
            .listen(GUEST_WEB_PORT)
            .map_err(Error::io("listen in the guest"))?;
        let server = std::thread::Builder::new()
            .name("guest-server".into())
            .spawn(move || serve_in_guest(&listener))
            .map_err(Error::io("start the guest's server"))?;
        let stage = Stage {
            guest,
            server: Some(server),
            sidecar,
            services,
            cid,
            web,
            admin,
            admin_socket: dir.path().join("admin.sock"),
            vhost_user,
            _dir: dir,
        };
        stage.wait_until_ready()?;
        Ok(stage)
    }

    /// A page of the admin server.
    pub(super) fn admin_page(&self, path: &str) -> Result<http::Answer, Error> {
        http::get_unix(&self.admin_socket, path).map_err(Error::io(format!("GET {path} of the admin server")))
    }

    /// The rules of the standard that the device broke, as the guest saw it.
    pub(super) fn violations(&self) -> Violations {
        self.guest.stats().violations
    }

    /// Ends everything in order.
    pub(super) fn take_down(self) -> Result<(), Error> {
        let Stage {
            guest,
            server,
            sidecar,
            services,
            _dir,
            ..
        } = self;
        guest.shut_down()?;
        if let Some(server) = server {
            let _ = server.join();
        }
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

/// The guest's server: one page, until the guest ends.
fn serve_in_guest(listener: &GuestListener) {
    while let Ok(stream) = listener.accept() {
        stream.set_read_timeout(Some(Duration::from_secs(10)));
        // A client that goes away early concerns nobody else.
        let _ = http::serve(stream, GUEST_PAGE);
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
