//! From what the user wrote to what the program runs: values held against each other, and what follows from them
//! filled in. Every rule here reports and goes on.

mod inbound;
mod limits;
mod listeners;
mod outbound;

use std::collections::{HashMap, HashSet};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use self::listeners::{Families, TcpListeners};
use super::diagnostic::{Report, quoted};
use super::document::{Document, NodeId};
use super::files::Socket;
use super::given::Given;
use super::path::Directory;
use super::{
    Config, Confinement, Drain, Guest, LandlockMode, ListenAddress, Log, LogFormat, Readiness, SeccompMode,
    Target, VhostUser, schema,
};

const MAX_DRAIN: Duration = Duration::from_secs(3600);

/// The outcome: a configuration unless something is in the report, and what to ask the file system.
pub(super) struct Resolved {
    pub(super) config: Option<Config>,
    pub(super) sockets: Vec<Socket>,
}

pub(super) fn resolve(file: &Given<schema::File>, document: &Document, report: &mut Report<'_>) -> Resolved {
    let mut resolver = Resolver {
        document,
        report,
        tcp: TcpListeners::default(),
        unix: HashMap::new(),
        vsock: HashMap::new(),
        sockets: Vec::new(),
        names: HashMap::new(),
        cids: HashMap::new(),
        siblings: file.value().map(siblings).unwrap_or_default(),
        dialled: file.value().map(dialled).unwrap_or_default(),
    };
    let config = file.located().and_then(|(file, at)| resolver.file(file, at));
    let sockets = resolver.sockets;
    // A rule that reported a mistake may still have made a value to go on with.
    Resolved {
        config: config.filter(|_| !report.has_errors()),
        sockets,
    }
}

/// What the rules need to know of what came before, over the whole file.
struct Resolver<'a, 't> {
    document: &'a Document,
    report: &'a mut Report<'t>,
    tcp: TcpListeners,
    /// Unix sockets that are listened on or belong to a VMM, by path without `.` and doubled `/`.
    unix: HashMap<PathBuf, NodeId>,
    /// AF_VSOCK ports that are listened on.
    vsock: HashMap<u32, NodeId>,
    sockets: Vec<Socket>,
    names: HashMap<String, NodeId>,
    cids: HashMap<u32, NodeId>,
    /// The CIDs of all guests by name, also of those that come later: `None` where that is missing or wrong.
    siblings: HashMap<String, Option<u32>>,
    /// The names of guests that a rule of another one leads to.
    dialled: HashSet<String>,
}

/// What the rules of a guest need to know of it; `None` is what is reported.
struct Owner {
    name: Option<String>,
    cid: Option<u32>,
    buffer: Option<u32>,
    connections: Option<usize>,
}

impl Resolver<'_, '_> {
    fn file(&mut self, file: &schema::File, at: NodeId) -> Option<Config> {
        let admin = file.admin.value().and_then(|admin| self.admin(admin));
        let log = file.log.value().and_then(log);
        let drain = file.drain.value().and_then(|drain| self.drain(drain));
        let readiness = (file.readiness.value()).and_then(|readiness| {
            Some(Readiness {
                require_session: *readiness.require_session.value()?,
            })
        });
        let limits = file.limits.value().and_then(|limits| self.sidecar_limits(limits));
        let confinement = file
            .confinement
            .value()
            .and_then(|confinement| self.confinement(confinement));
        let guests = self.guests(&file.guests, at);
        Some(Config {
            admin: admin?,
            log: log?,
            drain: drain?,
            readiness: readiness?,
            limits: limits?,
            confinement: confinement?,
            guests: guests?,
        })
    }

    fn admin(&mut self, admin: &schema::Admin) -> Option<Vec<ListenAddress>> {
        let listen = admin.listen.value()?;
        let takes_ipv4 = |port: u16| {
            listen.iter().any(|other| match other.value() {
                Some(ListenAddress::Tcp(other)) => other.is_ipv4() && other.port() == port,
                _ => false,
            })
        };
        let addresses: Vec<_> = listen
            .iter()
            .map(|listen| match listen.located()? {
                (ListenAddress::Vsock(_), at) => {
                    let message = "the admin server speaks on TCP and unix sockets only";
                    let help = "give an address such as tcp://127.0.0.1:9464 or unix:///run/vsock-sidecar/admin.sock";
                    self.error(at, message, help);
                    None
                }
                // As src/admin/listen.rs binds it.
                (ListenAddress::Tcp(tcp), _) if !takes_ipv4(tcp.port()) => self.listen(listen, Families::Both),
                _ => self.listen(listen, Families::Own),
            })
            .collect();
        addresses.into_iter().collect()
    }

    fn drain(&mut self, drain: &schema::Drain) -> Option<Drain> {
        let timeout = self.bounded(&drain.timeout, Duration::ZERO..=MAX_DRAIN, "the drain period");
        let linger = self.bounded(
            &drain.linger,
            Duration::ZERO..=MAX_DRAIN,
            "the time that a VMM is served in a drain",
        );
        if let (Some((linger, at)), Some(timeout)) = (drain.linger.located(), timeout)
            && linger.0 > timeout
        {
            let message = format!(
                "{linger} is longer than the drain period ({})",
                super::values::Period(timeout)
            );
            let help = "the drain period ends it: raise `drain.timeout`, or lower this";
            self.report.warning(self.document, at, message, help);
        }
        Some(Drain {
            timeout: timeout?,
            linger: linger?,
        })
    }

    fn confinement(&mut self, confinement: &schema::Confinement) -> Option<Confinement> {
        let resolved = Confinement {
            no_new_privileges: *confinement.no_new_privileges.value()?,
            seccomp: *confinement.seccomp.value()?,
            landlock: *confinement.landlock.value()?,
            paths: self.confinement_paths(&confinement.paths)?,
        };
        let on = match (resolved.seccomp, resolved.landlock) {
            (SeccompMode::Off, LandlockMode::Off) => None,
            (_, LandlockMode::Off) => Some("seccomp"),
            (SeccompMode::Off, _) => Some("landlock"),
            (_, _) => Some("seccomp and landlock"),
        };
        // The kernel takes neither from a process that may still gain privileges, unless it has CAP_SYS_ADMIN.
        if let (Some(on), Some((false, at))) = (on, confinement.no_new_privileges.located()) {
            self.error(
                at,
                format!("{on} cannot be had with `noNewPrivileges: false`"),
                "remove this line, or add `seccomp: off` and `landlock: off`",
            );
        }
        Some(resolved)
    }

    fn confinement_paths(&mut self, paths: &Given<Vec<Given<Directory>>>) -> Option<Vec<PathBuf>> {
        let list = paths.value()?;
        if let Some((_, at)) = paths.located()
            && list.len() > schema::MAX_PATHS
        {
            let message = format!("{} directories are more than {}", list.len(), schema::MAX_PATHS);
            self.error(at, message, "name a directory above them");
            return None;
        }
        let paths = list.iter().map(|path| Some(PathBuf::from(&path.value()?.0)));
        paths.collect()
    }

    fn guests(&mut self, guests: &Given<Vec<Given<schema::Guest>>>, file: NodeId) -> Option<Vec<Guest>> {
        let list = self.required(
            guests,
            file,
            "guests",
            "guests: [{name: web, cid: 3, vhostUser: {socket: /run/web.sock}}]",
        )?;
        if let Some((_, at)) = guests.located() {
            if list.is_empty() {
                self.error(at, "there is no guest", "at least one guest is needed");
            }
            if list.len() > schema::MAX_GUESTS {
                let message = format!("{} guests are more than {}", list.len(), schema::MAX_GUESTS);
                self.error(at, message, "split them over several sidecars");
                return None;
            }
        }
        let guests: Vec<_> = list
            .iter()
            .map(|guest| {
                let (guest, at) = guest.located()?;
                self.guest(guest, at)
            })
            .collect();
        guests.into_iter().collect()
    }

    fn guest(&mut self, guest: &schema::Guest, at: NodeId) -> Option<Guest> {
        let name = self
            .required(&guest.name, at, "name", "name: web")
            .map(|name| name.0.clone());
        if let (Some(name), Some((_, at))) = (&name, guest.name.located())
            && let Some(first) = insert_first(&mut self.names, name.clone(), at)
        {
            let message = format!(
                "the name {} belongs to the guest on line {}",
                quoted(name),
                self.document.line(first)
            );
            self.error(at, message, "give each guest a name of its own");
        }
        let cid = self.required(&guest.cid, at, "cid", "cid: 3").map(|cid| cid.0);
        if let (Some(cid), Some((_, at))) = (cid, guest.cid.located())
            && let Some(first) = insert_first(&mut self.cids, cid, at)
        {
            let message = format!(
                "the CID {cid} belongs to the guest on line {}",
                self.document.line(first)
            );
            self.error(at, message, "give each guest a CID of its own");
        }
        let vhost_user = self
            .required(
                &guest.vhost_user,
                at,
                "vhostUser",
                "vhostUser: {socket: /run/web.sock}",
            )
            .and_then(|vhost_user| self.vhost_user(vhost_user, guest.vhost_user.located()?.1));
        let limits = guest.limits.value().and_then(|limits| self.limits(limits));
        let owner = Owner {
            name,
            cid,
            buffer: limits.as_ref().map(|limits| limits.buffer),
            connections: limits.as_ref().map(|limits| limits.connections),
        };
        let outbound = self.outbound_rules(&guest.outbound, &owner);
        let inbound = self.inbound_rules(&guest.inbound, &owner);

        let has_no_rules = |rules: Option<usize>| rules == Some(0);
        if has_no_rules(guest.outbound.value().map(Vec::len))
            && has_no_rules(guest.inbound.value().map(Vec::len))
            && !guest
                .name
                .value()
                .is_some_and(|name| self.dialled.contains(&name.0))
        {
            let help = "add rules under `outbound` or `inbound`";
            self.report.warning(
                self.document,
                at,
                "this guest has no rules: it can reach nothing and nothing reaches it",
                help,
            );
        }
        Some(Guest {
            name: owner.name?,
            cid: cid?,
            vhost_user: vhost_user?,
            outbound: outbound?,
            inbound: inbound?,
            limits: limits?,
        })
    }

    fn vhost_user(&mut self, vhost_user: &schema::VhostUser, at: NodeId) -> Option<VhostUser> {
        let socket = self
            .required(&vhost_user.socket, at, "socket", "socket: /run/web.sock")
            .map(|path| PathBuf::from(&path.0));
        if let (Some(socket), Some((_, at))) = (&socket, vhost_user.socket.located()) {
            self.claim_unix(socket, at);
        }
        Some(VhostUser {
            socket: socket?,
            mode: *vhost_user.mode.value()?,
            access_platform: *vhost_user.access_platform.value()?,
        })
    }

    /// A listener of the admin server or of an inbound rule, which no other may be in the way of.
    fn listen(&mut self, listen: &Given<ListenAddress>, families: Families) -> Option<ListenAddress> {
        let (address, at) = listen.located()?;
        match address {
            ListenAddress::Tcp(tcp) => {
                if let Some((other, first)) = self.tcp.insert(*tcp, families, at) {
                    let line = self.document.line(first);
                    let message = if other == *tcp {
                        format!("tcp://{tcp} is listened on already, on line {line}")
                    } else {
                        format!("tcp://{tcp} and tcp://{other} on line {line} take the same port")
                    };
                    self.error(at, message, "give each listener an address of its own");
                }
            }
            ListenAddress::Unix(path) => self.claim_unix(path, at),
            ListenAddress::Vsock(port) => {
                if let Some(first) = insert_first(&mut self.vsock, *port, at) {
                    let line = self.document.line(first);
                    let message = format!("vsock://{port} is listened on already, on line {line}");
                    self.error(at, message, "give each listener a port of its own");
                }
            }
        }
        Some(address.clone())
    }

    fn claim_unix(&mut self, path: &Path, at: NodeId) {
        self.sockets.push(Socket {
            path: path.to_owned(),
            at,
        });
        // `components` leaves out `.` and doubled slashes; links are for `files` to see.
        if let Some(first) = insert_first(&mut self.unix, path.components().collect(), at) {
            let message = format!(
                "the socket {} is in use on line {}",
                quoted(&path.display().to_string()),
                self.document.line(first)
            );
            self.error(at, message, "give each socket a path of its own");
        }
    }

    fn rule_list<'g, R>(&mut self, rules: &'g Given<Vec<Given<R>>>) -> Option<&'g [Given<R>]> {
        let list = rules.value()?;
        if let Some((_, at)) = rules.located()
            && list.len() > schema::MAX_RULES
        {
            let message = format!("{} rules are more than {}", list.len(), schema::MAX_RULES);
            self.error(
                at,
                message,
                "join rules to ranges of ports, or split the guest's services",
            );
            return None;
        }
        Some(list)
    }

    /// The names of a list of rules: those given, which must differ, and for the rest one made of `basis`.
    fn names<R, B>(
        &mut self,
        list: &[Given<R>],
        bases: &[Option<B>],
        given: impl Fn(&R) -> &Given<super::values::Name>,
        default: impl Fn(&B) -> String,
    ) -> Vec<Option<String>> {
        let mut taken: HashMap<String, NodeId> = HashMap::new();
        for rule in list {
            let Some((name, at)) = rule.value().and_then(|rule| given(rule).located()) else {
                continue;
            };
            if let Some(first) = insert_first(&mut taken, name.0.clone(), at) {
                let message = format!(
                    "the name {} belongs to the rule on line {}",
                    quoted(&name.0),
                    self.document.line(first)
                );
                self.error(at, message, "give each rule of this list a name of its own");
            }
        }
        let mut used: HashSet<String> = taken.into_keys().collect();
        // Two listeners may lead to one port: the later ones count on.
        let mut counts: HashMap<String, u32> = HashMap::new();
        list.iter()
            .zip(bases)
            .map(|(rule, basis)| match given(rule.value()?) {
                Given::Right(name, _) => Some(name.0.clone()),
                Given::Wrong => None,
                Given::Absent => {
                    let base = default(basis.as_ref()?);
                    let count = counts.entry(base.clone()).or_insert(0);
                    loop {
                        *count += 1;
                        let name = if *count == 1 {
                            base.clone()
                        } else {
                            format!("{base}-{count}")
                        };
                        if used.insert(name.clone()) {
                            return Some(name);
                        }
                    }
                }
            })
            .collect()
    }

    fn required<'g, T>(
        &mut self,
        given: &'g Given<T>,
        parent: NodeId,
        key: &str,
        example: &str,
    ) -> Option<&'g T> {
        if given.is_absent() {
            self.missing(parent, key, &format!("for example `{example}`"));
        }
        given.value()
    }

    fn missing(&mut self, parent: NodeId, key: &str, help: &str) {
        let path = self.document.path_of_key(parent, key);
        self.report.error_at(
            self.document.span(parent),
            path,
            format!("the key `{key}` is missing"),
            help,
        );
    }

    fn error(&mut self, at: NodeId, message: impl Into<String>, help: impl Into<String>) {
        self.report.error(self.document, at, message, help);
    }
}

/// What stands under a key that may be left out; `None` when it cannot be read.
fn optional<T: Copy>(given: &Given<T>) -> Option<Option<T>> {
    match given {
        Given::Absent => Some(None),
        Given::Wrong => None,
        Given::Right(value, _) => Some(Some(*value)),
    }
}

fn log(log: &schema::Log) -> Option<Log> {
    let format = match &log.format {
        Given::Absent if std::io::stderr().is_terminal() => LogFormat::Text,
        Given::Absent => LogFormat::Json,
        format => *format.value()?,
    };
    Some(Log {
        format,
        level: log.level.value()?.0.clone(),
    })
}

fn siblings(file: &schema::File) -> HashMap<String, Option<u32>> {
    let mut siblings = HashMap::new();
    for guest in file.guests.value().into_iter().flatten().filter_map(Given::value) {
        if let Some(name) = guest.name.value() {
            let cid = guest.cid.value().map(|cid| cid.0);
            siblings.entry(name.0.clone()).or_insert(cid);
        }
    }
    siblings
}

fn dialled(file: &schema::File) -> HashSet<String> {
    let guests = file.guests.value().into_iter().flatten().filter_map(Given::value);
    guests
        .filter_map(|guest| guest.outbound.value())
        .flatten()
        .filter_map(Given::value)
        .filter_map(|rule| match rule.to.value() {
            Some(Target::Guest { name, .. }) => Some(name.clone()),
            _ => None,
        })
        .collect()
}

/// Records `at` under `key`, unless the key is taken; then by what.
fn insert_first<K: std::hash::Hash + Eq>(map: &mut HashMap<K, NodeId>, key: K, at: NodeId) -> Option<NodeId> {
    match map.entry(key) {
        std::collections::hash_map::Entry::Occupied(first) => Some(*first.get()),
        std::collections::hash_map::Entry::Vacant(vacant) => {
            vacant.insert(at);
            None
        }
    }
}
