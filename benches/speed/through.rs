//! A device as a process, ours or the peer's, with guests on it and services behind it.

use std::path::{Path, PathBuf};

use vsock_sidecar::embedded_guest::{DriverOptions, EmbeddedGuest, Profile, RX};

use crate::contender::Outcome;
use crate::peer::{Peer, PeerGuest};
use crate::service::{Address, Place, Service, Work};
use crate::support::Sidecar;

/// The guest's CID, or that of the first guest.
pub const CID: u32 = 3;
/// The port at which guests find the first service; the others follow.
pub const PORT: u32 = 1000;
/// Which kind of socket the device connects to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Tcp,
    Unix,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Tcp => "tcp",
            Kind::Unix => "unix",
        }
    }

    /// A place in a directory, named as the peer would look for it.
    pub fn place(self, dir: &Path, port: u32) -> Place {
        match self {
            Kind::Tcp => Place::Tcp,
            Kind::Unix => Place::Unix(dir.join(format!("service_{port}"))),
        }
    }
}

/// What stands between guests and services.
pub enum Device {
    Ours(Box<Sidecar>),
    Peer(Peer),
}

impl Device {
    pub fn pid(&self) -> u32 {
        match self {
            Device::Ours(sidecar) => sidecar.pid(),
            Device::Peer(peer) => peer.pid(),
        }
    }
}

/// How more of the guests' limits begins.
pub const LIMITS: &str = "limits";

/// How a device is set up.
#[derive(Clone)]
pub struct Wish<'w> {
    pub kind: Kind,
    /// One service each, at ports from [`PORT`] on.
    pub works: &'w [Work],
    pub guests: u32,
    pub driver: DriverOptions,
    /// More of the configuration, or of every guest's limits if it begins with [`LIMITS`]; ours only.
    pub more: &'w str,
}

/// A device that runs, with its guests. Field order: guests hang up before the device is killed.
pub struct Through {
    pub guests: Vec<EmbeddedGuest>,
    pub services: Vec<Service>,
    pub device: Device,
    _dir: tempfile::TempDir,
}

impl Through {
    pub fn ours(wish: &Wish<'_>) -> Outcome<Through> {
        let dir = tempfile::tempdir()?;
        let services = services(wish, dir.path())?;
        let (more, limits) = match wish.more.strip_prefix(LIMITS) {
            Some(limits) => ("", limits),
            None => (wish.more, ""),
        };
        let mut text = format!("{more}log: {{format: json, level: info}}\nguests:\n");
        for guest in 0..wish.guests {
            let cid = CID + guest;
            text += &format!(
                "- name: g{guest}\n  cid: {cid}\n  vhostUser: {{socket: \"{{dir}}/g{guest}.sock\"}}\n  \
                 limits: {{connections: 200000{limits}}}\n  outbound:\n"
            );
            for (index, service) in services.iter().enumerate() {
                let port = PORT + index as u32;
                text += &format!(
                    "  - {{name: s{index}, port: {port}, to: \"{}\"}}\n",
                    service.address.url()
                );
            }
        }
        let sidecar = Sidecar::start(&text);
        let sockets: Vec<_> = (0..wish.guests)
            .map(|guest| sidecar.path(&format!("g{guest}.sock")))
            .collect();
        Ok(Through {
            guests: boot(wish, &sockets)?,
            services,
            device: Device::Ours(Box::new(sidecar)),
            _dir: dir,
        })
    }

    /// The peer knows unix sockets only.
    pub fn peer(wish: &Wish<'_>, program: &Path) -> Outcome<Through> {
        if wish.kind != Kind::Unix {
            return Err("unix sockets only".into());
        }
        let dir = tempfile::tempdir()?;
        // One service for all guests: each guest's base path is a directory of links to it.
        let services = services(wish, dir.path())?;
        let mut guests = Vec::new();
        for guest in 0..wish.guests {
            let socket = dir.path().join(format!("g{guest}.sock"));
            let base = dir.path().join(format!("g{guest}"));
            for (index, service) in services.iter().enumerate() {
                let port = PORT + index as u32;
                if let Address::Unix(path) = &service.address {
                    std::os::unix::fs::symlink(path, dir.path().join(format!("g{guest}_{port}")))?;
                }
            }
            guests.push(PeerGuest {
                cid: CID + guest,
                socket,
                base,
            });
        }
        let peer = Peer::start(program, &guests)?;
        let sockets: Vec<_> = guests.into_iter().map(|guest| guest.socket).collect();
        Ok(Through {
            guests: boot(wish, &sockets)?,
            services,
            device: Device::Peer(peer),
            _dir: dir,
        })
    }
}

fn services(wish: &Wish<'_>, dir: &Path) -> Outcome<Vec<Service>> {
    let start =
        |(index, work): (usize, &Work)| Service::start(&wish.kind.place(dir, PORT + index as u32), *work);
    wish.works.iter().enumerate().map(start).collect()
}

fn boot(wish: &Wish<'_>, sockets: &[PathBuf]) -> Outcome<Vec<EmbeddedGuest>> {
    let mut guests = Vec::new();
    for socket in sockets {
        let mut guest = EmbeddedGuest::boot(socket, Profile::qemu(), wish.driver.clone())?;
        // A back-end without REPLY_ACK may still be about to enable the rings, and vhost-user-backend drops kicks until then:
        // once it has answered this it has done all that came before, and one kick more makes good for those.
        guest.front_end.config(0, 8)?;
        guest.driver.queue(RX).kick();
        guests.push(guest);
    }
    Ok(guests)
}
