//! What of the file system and of TCP a configuration needs: a value, made before anything is given up.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::net::IpAddr;
use std::ops::BitOr;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, StatxAttributes, StatxFlags};

use crate::config::{Config, Guest, LandlockMode, ListenAddress, OutboundRule, Target, VhostUserMode};

/// DNS over TCP, for answers that do not fit a datagram.
const DOMAIN: u16 = 53;

/// What may be done with a file, or with all that is beneath a directory.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Rights {
    /// Files are opened for reading.
    pub(super) read: bool,
    /// Directories are opened and listed.
    pub(super) list: bool,
    /// Sockets are made, and files removed.
    pub(super) sockets: bool,
    /// Directories are made and removed.
    pub(super) directories: bool,
}

impl Rights {
    const READ: Rights = Rights {
        read: true,
        list: false,
        sockets: false,
        directories: false,
    };
    const BROWSE: Rights = Rights {
        read: true,
        list: true,
        sockets: false,
        directories: false,
    };
    /// A socket that we listen on. The directory is opened for the lock that starts hold, see `sys::unix_socket`.
    const LISTEN: Rights = Rights {
        read: false,
        list: true,
        sockets: true,
        directories: false,
    };
    /// The private socket of sessions where there is no /proc, see `vhost_user::private_socket`.
    const SESSIONS: Rights = Rights {
        read: false,
        list: true,
        sockets: true,
        directories: true,
    };

    fn holds(self, other: Rights) -> bool {
        self | other == self
    }
}

impl BitOr for Rights {
    type Output = Rights;

    fn bitor(self, other: Rights) -> Rights {
        Rights {
            read: self.read | other.read,
            list: self.list | other.list,
            sockets: self.sockets | other.sockets,
            directories: self.directories | other.directories,
        }
    }
}

/// TCP ports, of any address: landlock knows no addresses.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(super) struct Ports {
    /// Ports of targets.
    pub(super) connect: BTreeSet<u16>,
    /// Ports of listeners.
    pub(super) bind: BTreeSet<u16>,
}

/// What a process that runs a configuration keeps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Policy {
    pub(super) paths: BTreeMap<PathBuf, Rights>,
    /// `None`: any port.
    pub(super) ports: Option<Ports>,
}

/// What a policy needs that no configuration says.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Surroundings {
    /// What the resolver reads.
    names: BTreeSet<PathBuf>,
    /// Where the C library loads modules from; empty for a static program.
    libraries: BTreeSet<PathBuf>,
    /// The file that was read, for reading it again; `None` for standard input.
    config: Option<PathBuf>,
    /// Where sessions make their private sockets if the directory of the VMM's socket will not do.
    temporary: Vec<PathBuf>,
    /// A socket that is listened on and that the command line names.
    listener: Option<PathBuf>,
}

impl Surroundings {
    /// Asks the file system. `config` is the file as it was named on the command line.
    pub fn look(config: &Path) -> Surroundings {
        Surroundings {
            names: name_files(),
            libraries: libraries(&fs::read_to_string("/proc/self/maps").unwrap_or_default()),
            config: (config != Path::new("-")).then(|| config.to_owned()),
            temporary: vec![std::env::temp_dir(), "/dev/shm".into()],
            listener: None,
        }
    }

    /// The same with a unix socket to listen on that no configuration has.
    pub fn with_listener(self, listener: &Path) -> Surroundings {
        let listener = Some(listener.to_owned());
        Surroundings { listener, ..self }
    }
}

impl Policy {
    /// What `config` needs, and what it allows later ones. Asks the file system whether the directories of VMMs' sockets can be
    /// written to.
    pub fn new(config: &Config, here: &Surroundings) -> Policy {
        let mut policy = Policy::empty(config.confinement.landlock == LandlockMode::Enforce);
        policy.surround(here);
        config.admin.iter().for_each(|address| policy.listen(address));
        for path in &config.confinement.paths {
            policy.add(path, Rights::SESSIONS);
        }
        for guest in &config.guests {
            policy.session(guest, here);
            guest.inbound.iter().for_each(|rule| policy.listen(&rule.listen));
            guest.outbound.iter().for_each(|rule| policy.dial(rule));
        }
        policy
    }

    /// What a server needs that connects to nobody: ports to listen on, and files to read, which may be replaced.
    pub fn of_server(ports: impl IntoIterator<Item = u16>, files: &[&Path], here: &Surroundings) -> Policy {
        let mut policy = Policy {
            paths: BTreeMap::new(),
            ports: Some(Ports {
                connect: BTreeSet::new(),
                bind: ports.into_iter().collect(),
            }),
        };
        policy.surround(here);
        files.iter().for_each(|file| policy.read_again(file));
        policy
    }

    fn empty(limits_ports: bool) -> Policy {
        Policy {
            paths: BTreeMap::new(),
            ports: limits_ports.then(Ports::default),
        }
    }

    fn session(&mut self, guest: &Guest, here: &Surroundings) {
        let directory = directory_of(&guest.vhost_user.socket);
        self.add(directory, Rights::SESSIONS);
        if !is_writable(directory) {
            here.temporary
                .iter()
                .for_each(|place| self.add(place, Rights::SESSIONS));
        }
        if guest.vhost_user.mode == VhostUserMode::Server {
            self.add(directory, Rights::LISTEN);
        }
    }

    /// What in the guests of `config` a process that keeps to this policy cannot have, with whose it is; empty if it can run
    /// them. The admin server and the configuration's file are not asked for: they stay what they were at start.
    pub fn out_of_reach(&self, config: &Config, here: &Surroundings) -> Vec<OutOfReach> {
        let mut found = Vec::new();
        let mut look = |whose: String, need: &dyn Fn(&mut Policy)| {
            let mut needed = Policy::empty(self.ports.is_some());
            need(&mut needed);
            let lacks = self.lacks(&needed);
            found.extend(lacks.into_iter().map(|lack| OutOfReach {
                whose: whose.clone(),
                lack,
            }));
        };
        for guest in &config.guests {
            let name = &guest.name;
            look(format!("guest {name}: vhostUser.socket"), &|policy| {
                policy.session(guest, here);
            });
            for rule in &guest.inbound {
                look(format!("guest {name}: inbound rule {}", rule.name), &|policy| {
                    policy.listen(&rule.listen);
                });
            }
            for rule in &guest.outbound {
                look(format!("guest {name}: outbound rule {}", rule.name), &|policy| {
                    policy.dial(rule);
                });
            }
        }
        found
    }

    fn surround(&mut self, here: &Surroundings) {
        // Metrics of the process, names of VMMs, and glibc's allocator (/proc/sys/vm/overcommit_memory). Not only /proc/self: its
        // inode is another one each time that the kernel's cache has forgotten it, and a rule belongs to an inode.
        self.add(Path::new("/proc"), Rights::BROWSE);
        // Descriptors held in reserve are open on it.
        self.add(Path::new("/dev/null"), Rights::READ);
        here.names.iter().for_each(|file| self.add(file, Rights::READ));
        here.libraries
            .iter()
            .for_each(|place| self.add(place, Rights::READ));
        if let Some(listener) = &here.listener {
            self.add(directory_of(listener), Rights::LISTEN);
        }
        if let Some(config) = &here.config {
            self.read_again(config);
        }
    }

    fn read_again(&mut self, file: &Path) {
        // The directory rather than the file: a ConfigMap is changed by a symbolic link `..data` in it that is replaced, and
        // editors replace the file.
        self.add(directory_of(file), Rights::BROWSE);
        // A symbolic link may lead out of it.
        if let Ok(real) = file.canonicalize() {
            self.add(directory_of(&real), Rights::BROWSE);
        }
    }

    fn listen(&mut self, address: &ListenAddress) {
        match address {
            ListenAddress::Unix(path) => self.add(directory_of(path), Rights::LISTEN),
            ListenAddress::Tcp(address) => {
                if let Some(ports) = &mut self.ports {
                    ports.bind.insert(address.port());
                }
            }
            // Landlock knows no AF_VSOCK.
            ListenAddress::Vsock(_) => {}
        }
    }

    fn dial(&mut self, rule: &OutboundRule) {
        let Some(ports) = &mut self.ports else {
            return;
        };
        match &rule.target {
            Target::Tcp { host, port } => {
                let more = rule.ports.end().saturating_sub(*rule.ports.start());
                let last = u32::from(*port).saturating_add(more);
                ports
                    .connect
                    .extend(*port..=u16::try_from(last).unwrap_or(u16::MAX));
                if host.parse::<IpAddr>().is_err() {
                    ports.connect.insert(DOMAIN);
                }
            }
            // To look a path up and to connect to a socket there are no matters of landlock's before ABI 9.
            // Nor is AF_VSOCK, and siblings meet in a pair of sockets.
            Target::Unix { .. } | Target::Vsock { .. } | Target::Guest { .. } => {}
        }
    }

    fn add(&mut self, path: &Path, rights: Rights) {
        let known = self.paths.entry(path.to_owned()).or_default();
        *known = *known | rights;
    }

    /// What `other` needs and this one does not give, for the operator; empty if nothing. A process that runs under this
    /// policy cannot run what needs `other` unless this is empty: what was given up stays so until the process ends.
    ///
    /// Goes by the names of directories, so one under another name may be reported that would do.
    pub fn lacks(&self, other: &Policy) -> Vec<Lack> {
        let mut lacks: Vec<Lack> = other
            .paths
            .iter()
            .filter(|(path, rights)| {
                let held = path
                    .ancestors()
                    .filter_map(|ancestor| self.paths.get(ancestor))
                    .fold(Rights::default(), |sum, rights| sum | *rights);
                !held.holds(**rights)
            })
            .map(|(path, _)| Lack::Path(path.clone()))
            .collect();
        if let Some(ours) = &self.ports {
            let theirs = other.ports.as_ref();
            let missing = |ours: &BTreeSet<u16>, theirs: Option<&BTreeSet<u16>>| -> Vec<u16> {
                theirs.map_or(Vec::new(), |theirs| theirs.difference(ours).copied().collect())
            };
            let connect = missing(&ours.connect, theirs.map(|ports| &ports.connect));
            let bind = missing(&ours.bind, theirs.map(|ports| &ports.bind));
            lacks.extend(connect.into_iter().map(Lack::Connect));
            lacks.extend(bind.into_iter().map(Lack::Bind));
            if theirs.is_none() {
                lacks.push(Lack::AnyPort);
            }
        }
        lacks
    }
}

/// Something that a configuration asks for and a confined process cannot get any more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OutOfReach {
    /// Which guest's, and which of its rules.
    pub whose: String,
    /// What it is.
    pub lack: Lack,
}

impl fmt::Display for OutOfReach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OutOfReach { whose, lack } = self;
        let remedy = match lack {
            Lack::Path(_) => {
                "restart the sidecar, or name the directory in `confinement.paths` at the next start"
            }
            _ => "restart the sidecar, or start it with `confinement.landlock: files`",
        };
        write!(
            f,
            "{whose}: {lack} is out of reach since the start (landlock): {remedy}"
        )
    }
}

/// Something that a confined process cannot get any more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Lack {
    /// A directory or file.
    Path(PathBuf),
    /// To connect to a TCP port.
    Connect(u16),
    /// To listen on a TCP port.
    Bind(u16),
    /// `landlock: files` after `landlock: enforce`.
    AnyPort,
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lack::Path(path) => write!(f, "{}", path.display()),
            Lack::Connect(port) => write!(f, "TCP port {port} of targets"),
            Lack::Bind(port) => write!(f, "TCP port {port} to listen on"),
            Lack::AnyPort => f.write_str("TCP ports that are not in the configuration"),
        }
    }
}

/// The directory that a file is in.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn is_writable(directory: &Path) -> bool {
    rustix::fs::access(directory, Access::WRITE_OK | Access::EXEC_OK).is_ok()
}

/// The files that getaddrinfo(3) reads, of glibc and of musl.
fn name_files() -> BTreeSet<PathBuf> {
    let fixed = [
        "/etc/nsswitch.conf",
        "/etc/host.conf",
        "/etc/gai.conf",
        "/etc/services",
        "/etc/protocols",
        "/etc/ld.so.cache",
    ];
    let changing = ["/etc/resolv.conf", "/etc/hosts"];
    let mut files: BTreeSet<PathBuf> = fixed.into_iter().map(PathBuf::from).collect();
    for file in changing {
        let Ok(real) = Path::new(file).canonicalize() else {
            continue;
        };
        // Network managers replace the file, and a rule would stay with the old one: then the directory is needed. Container
        // runtimes mount a file in its place, which nobody can replace.
        files.insert(match is_mount(&real) {
            true => real,
            false => directory_of(&real).to_owned(),
        });
    }
    files
}

fn is_mount(path: &Path) -> bool {
    rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::empty())
        .is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// The directories of the shared libraries that the process has mapped, in the form of `/proc/self/maps`: modules of
/// nsswitch.conf and what these need are beside the C library.
fn libraries(maps: &str) -> BTreeSet<PathBuf> {
    maps.lines()
        .filter_map(|line| {
            let path = Path::new(line.get(line.find('/')?..)?);
            let name = path.file_name()?.to_str()?;
            (name.ends_with(".so") || name.contains(".so.")).then(|| directory_of(path).to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn policy(text: &str) -> Policy {
        policy_in(text, &Surroundings::default())
    }

    /// The strictest policy, unless the text says otherwise.
    fn policy_in(text: &str, here: &Surroundings) -> Policy {
        Policy::new(&parse(text), here)
    }

    fn parse(text: &str) -> Config {
        let strict = match text.contains("confinement:") {
            true => text.to_owned(),
            false => format!("confinement: {{landlock: enforce}}\n{text}"),
        };
        let parsed = config::parse(&strict, "test");
        parsed.unwrap_or_else(|error| panic!("{error}")).0
    }

    fn guest(directory: &Path, rest: &str) -> String {
        format!(
            "guests: [{{name: web, cid: 3, vhostUser: {{socket: {}/web.sock}}{rest}}}]",
            directory.display()
        )
    }

    fn rights(policy: &Policy, path: &Path) -> Rights {
        policy.paths.get(path).copied().unwrap_or_default()
    }

    #[test]
    fn a_policy_holds_the_directories_of_sockets_and_the_ports_of_rules() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            "admin: {{listen: ['tcp://[::]:9464', 'unix:///run/admin/a.sock']}}\n{}",
            guest(
                dir.path(),
                ", outbound: [{port: 1, to: 'tcp://10.0.0.1:5432'}, {ports: 8000-8002, to: 'tcp://127.0.0.1:9000'}, \
                 {port: 2, to: 'unix:///run/target/t.sock'}], \
                 inbound: [{listen: 'tcp://127.0.0.1:2222', port: 22}, {listen: 'unix:///run/in/i.sock', port: 22}]",
            )
        );
        let policy = policy(&text);
        let ports = policy.ports.as_ref().unwrap();
        assert_eq!(ports.connect, BTreeSet::from([5432, 9000, 9001, 9002]));
        assert_eq!(ports.bind, BTreeSet::from([9464, 2222]));
        assert_eq!(rights(&policy, dir.path()), Rights::SESSIONS);
        assert_eq!(rights(&policy, Path::new("/run/admin")), Rights::LISTEN);
        assert_eq!(rights(&policy, Path::new("/run/in")), Rights::LISTEN);
        // A target is connected to and not opened.
        assert_eq!(rights(&policy, Path::new("/run/target")), Rights::default());
    }

    #[test]
    fn a_socket_of_the_command_line_can_be_bound_and_a_reload_needs_nothing_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let text = guest(dir.path(), "");
        let here = Surroundings::default().with_listener(Path::new("/run/hooks/h.sock"));
        let with = policy_in(&text, &here);
        assert_eq!(rights(&with, Path::new("/run/hooks")), Rights::LISTEN);
        assert_eq!(with.lacks(&policy(&text)), []);
    }

    #[test]
    fn names_need_dns_and_addresses_do_not() {
        let dir = tempfile::tempdir().unwrap();
        for (host, dns) in [("db.svc", true), ("10.0.0.1", false), ("[fd00::1]", false)] {
            let rule = format!(", outbound: [{{port: 1, to: 'tcp://{host}:80'}}]");
            let policy = policy(&guest(dir.path(), &rule));
            assert_eq!(policy.ports.unwrap().connect.contains(&DOMAIN), dns, "{host}");
        }
    }

    #[test]
    fn the_last_port_of_a_range_is_the_last_port_there_is() {
        let dir = tempfile::tempdir().unwrap();
        let rule = ", outbound: [{ports: 1-65535, to: 'tcp://10.0.0.1:1'}]";
        let ports = policy(&guest(dir.path(), rule)).ports.unwrap();
        assert_eq!(ports.connect.len(), 65535);
    }

    /// Sessions make their private sockets beside the VMM's, and elsewhere only if that will not do.
    #[test]
    fn temporary_directories_are_out_of_reach_unless_they_are_needed() {
        let dir = tempfile::tempdir().unwrap();
        let here = Surroundings {
            temporary: vec!["/elsewhere".into()],
            ..Surroundings::default()
        };
        let usable = policy_in(&guest(dir.path(), ""), &here);
        assert_eq!(rights(&usable, Path::new("/elsewhere")), Rights::default());
        let unusable = policy_in(&guest(&dir.path().join("missing"), ""), &here);
        assert_eq!(rights(&unusable, Path::new("/elsewhere")), Rights::SESSIONS);
    }

    /// A ConfigMap's file is a link through `..data`, beside it; others may keep the file elsewhere.
    #[test]
    fn the_configuration_can_be_read_again_where_it_is_and_where_it_leads() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file = dir.path().join("config.yaml");
        fs::write(elsewhere.path().join("real.yaml"), "").unwrap();
        std::os::unix::fs::symlink(elsewhere.path().join("real.yaml"), &file).unwrap();
        let here = Surroundings {
            config: Some(file),
            ..Surroundings::default()
        };
        let policy = policy_in(&guest(Path::new("/run"), ""), &here);
        assert_eq!(rights(&policy, dir.path()), Rights::BROWSE);
        let real = elsewhere.path().canonicalize().unwrap();
        assert_eq!(rights(&policy, &real), Rights::BROWSE);
    }

    #[test]
    fn a_server_listens_and_reads_and_connects_to_nobody() {
        let (certificate, key) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let here = Surroundings {
            config: Some(certificate.path().join("tls.crt")),
            ..Surroundings::default()
        };
        let policy = Policy::of_server([8443, 9464], &[&key.path().join("tls.key")], &here);
        let ports = policy.ports.as_ref().unwrap();
        assert_eq!(ports.bind, BTreeSet::from([8443, 9464]));
        assert_eq!(ports.connect, BTreeSet::new());
        for directory in [certificate.path(), key.path()] {
            assert_eq!(rights(&policy, directory), Rights::BROWSE);
        }
        let sockets = policy
            .paths
            .values()
            .any(|rights| rights.sockets || rights.directories);
        assert!(!sockets, "there is nothing to make");
    }

    #[test]
    fn a_later_configuration_is_held_against_what_was_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let with = |mode: &str, rules: &str| {
            policy(&format!(
                "confinement: {{landlock: {mode}}}\n{}",
                guest(dir.path(), rules)
            ))
        };
        let rule = |port: u16| format!(", outbound: [{{port: 1, to: 'tcp://10.0.0.1:{port}'}}]");
        let now = with("enforce", &rule(80));
        assert_eq!(now.lacks(&now), []);
        assert_eq!(now.lacks(&with("enforce", &rule(81))), [Lack::Connect(81)]);
        assert_eq!(now.lacks(&with("enforce", "")), [], "less is always there");
        assert_eq!(now.lacks(&with("files", &rule(80))), [Lack::AnyPort]);
        assert_eq!(with("files", &rule(80)).lacks(&with("enforce", &rule(81))), []);
        let inbound = |listen: &str| format!(", inbound: [{{listen: '{listen}', port: 22}}]");
        assert_eq!(now.lacks(&with("files", &inbound("tcp://127.0.0.1:22"))).len(), 1);
        assert_eq!(
            now.lacks(&with("enforce", &inbound("unix:///run/other/s.sock"))),
            [Lack::Path("/run/other".into())]
        );
        // Beneath a directory that is held, all is.
        let below = format!("unix://{}/below/s.sock", dir.path().display());
        assert_eq!(now.lacks(&with("enforce", &inbound(&below))), []);
    }

    /// What an operator reads whose reload is refused.
    #[test]
    fn what_is_out_of_reach_is_named_with_its_rule_and_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let here = Surroundings::default();
        let start = |mode: &str| {
            let text = format!(
                "confinement: {{landlock: {mode}, paths: [/run/vm]}}\n{}",
                guest(dir.path(), "")
            );
            Policy::new(&parse(&text), &here)
        };
        let wanted = parse(&guest(
            dir.path(),
            ", outbound: [{name: db, port: 1, to: 'tcp://10.0.0.1:5432'}], inbound: [\
             {name: a, listen: 'unix:///run/vm/below/a.sock', port: 1}, {name: b, listen: 'unix:///srv/b.sock', port: 1}]",
        ));
        let told = |mode: &str| -> Vec<String> {
            let missing = start(mode).out_of_reach(&wanted, &here);
            missing.iter().map(ToString::to_string).collect()
        };
        let path = "guest web: inbound rule b: /srv is out of reach since the start (landlock): \
                    restart the sidecar, or name the directory in `confinement.paths` at the next start";
        assert_eq!(told("files"), [path]);
        assert_eq!(
            told("enforce"),
            [
                path,
                "guest web: outbound rule db: TCP port 5432 of targets is out of reach since the start (landlock): \
                 restart the sidecar, or start it with `confinement.landlock: files`"
            ]
        );
    }

    #[test]
    fn modules_are_beside_the_libraries_that_are_mapped() {
        let maps = "7f00-7f01 r-xp 00000000 08:01 1 /usr/lib/x86_64-linux-gnu/libc.so.6\n\
                    7f01-7f02 r-xp 00000000 08:01 2 /opt/app/lib/libgcc_s.so.1 (deleted)\n\
                    5500-5501 r-xp 00000000 08:01 3 /usr/bin/vsock-sidecar\n\
                    7f03-7f04 rw-p 00000000 00:00 0 [heap]\n";
        let expected = ["/usr/lib/x86_64-linux-gnu", "/opt/app/lib"].map(PathBuf::from);
        assert_eq!(libraries(maps), BTreeSet::from(expected));
        assert_eq!(libraries(""), BTreeSet::new());
    }
}
