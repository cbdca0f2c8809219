//! The embedded guest as the acts of the demo see it.

use std::io;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::interrupt::Interrupt;
use super::stage::{GUEST_PAGE, GUEST_WEB_PORT, Guest, Place, Verdict, Way};
use super::terminal::Terminal;
use super::{Effort, Error, bulk, http};
use crate::embedded_guest::{DriverOptions, EmbeddedGuest, GuestListener, Profile, SocketOptions, Sockets};

/// A guest in this process.
pub(super) struct Embedded {
    sockets: Sockets,
    server: JoinHandle<()>,
    cid: u64,
}

impl Embedded {
    /// Boots it and starts a web server in it.
    pub(super) fn boot(place: &Place<'_>) -> Result<Embedded, Error> {
        let guest = EmbeddedGuest::boot(place.vhost_user, Profile::qemu(), DriverOptions::default())?;
        let cid = guest.cid();
        let sockets = Sockets::start(guest, SocketOptions::default())?;
        let listener = sockets
            .listen(GUEST_WEB_PORT)
            .map_err(Error::io("listen in the guest"))?;
        let server = std::thread::Builder::new()
            .name("guest-server".into())
            .spawn(move || serve_in_guest(&listener))
            .map_err(Error::io("start the guest's server"))?;
        Ok(Embedded { sockets, server, cid })
    }
}

impl Guest for Embedded {
    fn cid(&self) -> u64 {
        self.cid
    }

    fn description(&self) -> String {
        "negotiates like QEMU, drives its rings like Linux".to_owned()
    }

    fn fetch(&mut self, port: u32) -> Result<(http::Answer, Duration), Error> {
        let started = Instant::now();
        let stream = self
            .sockets
            .connect(port)
            .map_err(Error::io("connect from the guest"))?;
        let answer = http::get(stream, "service", "/").map_err(Error::io("fetch the page"))?;
        Ok((answer, started.elapsed()))
    }

    fn knock(&mut self, port: u32) -> Result<Duration, Error> {
        let started = Instant::now();
        match self.sockets.connect(port) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(started.elapsed()),
            other => {
                let what = format!("a port without a rule answered {:?}", other.map(drop));
                Err(Error::Unexpected(what))
            }
        }
    }

    fn bulk(
        &mut self,
        way: Way,
        t: &mut Terminal,
        interrupt: &Interrupt,
        effort: Effort,
    ) -> Result<(), Error> {
        match way {
            Way::GuestToHost => bulk::guest_to_host(&self.sockets, t, interrupt, effort),
            Way::HostToGuest => bulk::host_to_guest(&self.sockets, t, interrupt, effort),
        }
    }

    fn bulk_remark(&self) -> &'static str {
        "64 KiB writes, one connection"
    }

    fn verdict(&self) -> Verdict {
        let violations = self.sockets.stats().violations;
        let good = violations.is_empty();
        Verdict {
            about: "standard",
            good,
            text: match good {
                true => "kept by the device".to_owned(),
                false => format!("broken by the device: {violations:?}"),
            },
            judge: "judged by the guest",
        }
    }

    fn end(self: Box<Self>) -> Result<(), Error> {
        let Embedded { sockets, server, .. } = *self;
        sockets.shut_down()?;
        let _ = server.join();
        Ok(())
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
