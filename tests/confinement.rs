//! Confinement at work: a process confines itself as the program does, tries what an intruder would, and says what came of it.
//!
//! The process is this test program again, run for one test that is ignored otherwise: what is given up is given up for good.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use vsock_sidecar::config::{self, SeccompMode};
use vsock_sidecar::confine::{self, Confined, State};
use vsock_sidecar::sys::sigsys;

/// Where the trial finds its configuration, and a directory that is none of its business.
const CONFIG: &str = "CONFINEMENT_TEST_CONFIG";
const OUTSIDE: &str = "CONFINEMENT_TEST_OUTSIDE";
const OPEN_PORT: &str = "CONFINEMENT_TEST_OPEN_PORT";
const LISTEN_PORT: &str = "CONFINEMENT_TEST_LISTEN_PORT";
const OTHER_PORT: &str = "CONFINEMENT_TEST_OTHER_PORT";
/// Set: the process cannot have landlock and seccomp, as on an old kernel.
const OLD_KERNEL: &str = "CONFINEMENT_TEST_OLD_KERNEL";
/// What its lines begin with, among those of the test harness.
const MARK: &str = "came-of-it: ";

/// Not a test: what the confined process does.
#[test]
#[ignore = "confines the process for good; the tests of this file run it in one of its own"]
fn trial() {
    let Some(file) = std::env::var_os(CONFIG).map(PathBuf::from) else {
        return;
    };
    let outside = PathBuf::from(std::env::var_os(OUTSIDE).unwrap());
    let [open, listen, other] =
        [OPEN_PORT, LISTEN_PORT, OTHER_PORT].map(|port| std::env::var(port).unwrap().parse::<u16>().unwrap());
    let inside = file.parent().unwrap().to_owned();

    // Threads that are there before, as in a program that embeds us: the filter is for them too.
    let (order, orders) = mpsc::channel::<()>();
    let before = thread::spawn(move || {
        let _ = orders.recv();
        memfd()
    });

    let (config, _) = config::load(&file).unwrap();
    let old = std::env::var_os(OLD_KERNEL).is_some();
    if old {
        age();
    }
    let confined = confine::enter(&config, &file);
    say_states(&confined);

    // Without a filter these would do what they say.
    if config.confinement.seccomp == SeccompMode::Enforce && !old {
        break_out();
    }
    intrude(&outside, other);
    work(&file, &inside, open, listen);

    drop(order);
    say("memfd in an older thread", before.join().unwrap());
    say("memfd in a younger thread", thread::spawn(memfd).join().unwrap());
    let foreign = outside.join("secret");
    let opened = thread::spawn(move || File::open(foreign).map(drop))
        .join()
        .unwrap();
    say("read outside in a younger thread", opened);
    let refused = sigsys::refused();
    let named = refused.filter(|(number, _)| *number == libc::SYS_memfd_create);
    println!(
        "{MARK}memfd is counted={}",
        named.map(|(_, count)| count).sum::<u64>()
    );
}

/// The kernel from now on has neither landlock nor seccomp.
fn age() {
    let calls = [libc::SYS_landlock_create_ruleset, libc::SYS_seccomp];
    let lacks = SeccompFilter::new(
        calls.into_iter().map(|number| (number, Vec::new())).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: BpfProgram = lacks.unwrap().try_into().unwrap();
    seccompiler::apply_filter_all_threads(&program).unwrap();
}

/// What makes another process of this one, or hands it to somebody.
fn break_out() {
    say(
        "execve",
        raw(libc::SYS_execve, [c"/bin/true".as_ptr() as i64, 0, 0, 0]),
    );
    say("start a program", Command::new("/bin/true").spawn().map(drop));
    say(
        "ptrace",
        raw(libc::SYS_ptrace, [libc::PTRACE_TRACEME.into(), 0, 0, 0]),
    );
    say("mount", raw(libc::SYS_mount, [0; 4]));
    say(
        "unshare",
        raw(libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0, 0]),
    );
    say("bpf", raw(libc::SYS_bpf, [0; 4]));
    say("io_uring", raw(libc::SYS_io_uring_setup, [1, 0, 0, 0]));
    say(
        "signal the parent",
        raw(
            libc::SYS_kill,
            [i64::from(std::os::unix::process::parent_id()), 0, 0, 0],
        ),
    );
    let socket = |family: i32, kind: i32, protocol: i32| {
        raw(libc::SYS_socket, [family.into(), kind.into(), protocol.into(), 0])
    };
    say("packet socket", socket(libc::AF_PACKET, libc::SOCK_RAW, 0));
    say(
        "raw socket",
        socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP),
    );
    say(
        "multipath TCP",
        socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP),
    );
}

/// What a sidecar has no business with.
fn intrude(outside: &Path, other_port: u16) {
    let page = |protection: i32| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        raw(libc::SYS_mmap, [0, 4096, protection.into(), flags.into()])
    };
    say("memfd", memfd());
    say("code in memory", page(libc::PROT_READ | libc::PROT_EXEC));
    say(
        "code in writable memory",
        page(libc::PROT_WRITE | libc::PROT_EXEC),
    );
    say(
        "make memory code",
        raw(libc::SYS_mprotect, [0, 0, libc::PROT_EXEC.into(), 0]),
    );
    say("read outside", File::open(outside.join("secret")).map(drop));
    say("list outside", fs::read_dir(outside).map(drop));
    say("write outside", File::create(outside.join("new")).map(drop));
    say("remove outside", fs::remove_file(outside.join("secret")));
    say("bind outside", UnixListener::bind(outside.join("sock")).map(drop));
    say(
        "write our own memory",
        OpenOptions::new().write(true).open("/proc/self/mem").map(drop),
    );
    say(
        "connect to another port",
        TcpStream::connect((Ipv4Addr::LOCALHOST, other_port)).map(drop),
    );
    say(
        "bind another port",
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map(drop),
    );
}

/// What a sidecar does.
fn work(file: &Path, inside: &Path, open_port: u16, listen_port: u16) {
    say(
        "connect to a port of a rule",
        TcpStream::connect((Ipv4Addr::LOCALHOST, open_port)).map(drop),
    );
    say(
        "bind a port of a listener",
        TcpListener::bind((Ipv4Addr::LOCALHOST, listen_port)).map(drop),
    );
    say(
        "read the configuration again",
        config::load(file).map(drop).map_err(io::Error::other),
    );
    say("watch the configuration", {
        // SAFETY: no pointers are passed.
        let watch = unsafe { libc::inotify_init1(libc::IN_CLOEXEC) };
        if watch < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    });
    let socket = inside.join("again.sock");
    say("bind inside", UnixListener::bind(&socket).map(drop));
    say("remove inside", fs::remove_file(&socket));
    say(
        "make a private directory",
        fs::create_dir(inside.join("private")).and_then(|()| fs::remove_dir(inside.join("private"))),
    );
    say("write a file inside", File::create(inside.join("file")).map(drop));
    say(
        "write the configuration",
        OpenOptions::new().append(true).open(file).map(drop),
    );
    say(
        "read the process's statistics",
        fs::read("/proc/self/stat").map(drop),
    );
    say("load a library", load());
    say("resolve a name", ("localhost", 1).to_socket_addrs().map(drop));
    // What makes a number of `%eth0`: a name server with a link-local address, as routers announce them, has that behind it.
    // SAFETY: the name is a C string.
    say(
        "number of an interface",
        match unsafe { libc::if_nametoindex(c"lo".as_ptr()) } {
            0 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        },
    );
    say("descriptors in reserve", File::open("/dev/null").map(drop));
}

/// As glibc does for a module of nsswitch.conf. A static program has none.
fn load() -> io::Result<()> {
    if cfg!(target_feature = "crt-static") {
        return Ok(());
    }
    // SAFETY: the name is a C string; the library is glibc's own and does nothing when it is loaded.
    let handle = unsafe { libc::dlopen(c"libresolv.so.2".as_ptr(), libc::RTLD_NOW) };
    if handle.is_null() {
        return Err(io::Error::other("dlopen"));
    }
    Ok(())
}

fn memfd() -> io::Result<()> {
    raw(libc::SYS_memfd_create, [c"x".as_ptr() as i64, 0, 0, 0])
}

fn raw(number: i64, [a, b, c, d]: [i64; 4]) -> io::Result<()> {
    // SAFETY: the calls of this file either pass no pointers, or null, or one to a C string that lives for ever. One that
    // succeeds leaves a descriptor, a page or a trait of this process behind, which ends soon.
    match unsafe { libc::syscall(number, a, b, c, d, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn say(what: &str, outcome: io::Result<()>) {
    let outcome = match outcome {
        Ok(()) => "ok".to_owned(),
        Err(error) => match error.raw_os_error() {
            Some(libc::EPERM) => "EPERM".to_owned(),
            Some(libc::EACCES) => "EACCES".to_owned(),
            Some(libc::ENOSYS) => "ENOSYS".to_owned(),
            _ => error.to_string().replace('\n', " "),
        },
    };
    println!("{MARK}{what}={outcome}");
}

fn say_states(confined: &Confined) {
    for (kind, state) in confined.confinement.by_kind() {
        let state = match state {
            State::Active { .. } => "active",
            State::Off => "off",
            State::Unavailable { why } => why,
        };
        println!("{MARK}{kind}={state}");
    }
}

/// Runs the trial with this `confinement`; what came of what. The directory that is outside is held against what it was.
fn try_with(confinement: &str) -> BTreeMap<String, String> {
    try_on(confinement, Command::new(std::env::current_exe().unwrap()))
}

fn try_on(confinement: &str, mut command: Command) -> BTreeMap<String, String> {
    let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(outside.path().join("secret"), "secret").unwrap();
    let [open, other] = [(); 2].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port().to_string();
    let (open_port, other_port) = (port(&open), port(&other));
    // Free again when it is bound; the kernel gives it to nobody so soon who does not ask for it.
    let listen_port = port(&TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let file = inside.path().join("sidecar.yaml");
    let text = format!(
        "confinement: {confinement}\n\
         admin: {{listen: [tcp://127.0.0.1:{listen_port}]}}\n\
         guests: [{{name: web, cid: 3, vhostUser: {{socket: {}/web.sock}}, outbound: [{{port: 1, to: 'tcp://127.0.0.1:{open_port}'}}]}}]\n",
        inside.path().display(),
    );
    fs::write(&file, text).unwrap();
    let output = command
        .args(["trial", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env(CONFIG, &file)
        .env(OUTSIDE, outside.path())
        .env(OPEN_PORT, open_port)
        .env(LISTEN_PORT, listen_port)
        .env(OTHER_PORT, other_port)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{}\n{said}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    said.lines()
        .filter_map(|line| line.split_once(MARK)?.1.split_once('='))
        .map(|(what, outcome)| (what.to_owned(), outcome.to_owned()))
        .collect()
}

#[track_caller]
fn hold(came: &BTreeMap<String, String>, expected: &[(&str, &str)]) {
    for (what, outcome) in expected {
        let is = came.get(*what).map(String::as_str);
        assert_eq!(is, Some(*outcome), "{what}, of {came:#?}");
    }
}

const WORK: &[(&str, &str)] = &[
    ("connect to a port of a rule", "ok"),
    ("bind a port of a listener", "ok"),
    ("read the configuration again", "ok"),
    ("watch the configuration", "ok"),
    ("bind inside", "ok"),
    ("remove inside", "ok"),
    ("make a private directory", "ok"),
    ("read the process's statistics", "ok"),
    ("load a library", "ok"),
    ("resolve a name", "ok"),
    ("number of an interface", "ok"),
    ("descriptors in reserve", "ok"),
];

/// Calls that are on no list are ENOSYS, those with the wrong arguments EPERM.
const SYSTEM_CALLS: &[(&str, &str)] = &[
    ("execve", "ENOSYS"),
    ("start a program", "ENOSYS"),
    ("ptrace", "ENOSYS"),
    ("memfd in an older thread", "ENOSYS"),
    ("memfd in a younger thread", "ENOSYS"),
    ("memfd is counted", "3"),
    ("mount", "ENOSYS"),
    ("unshare", "ENOSYS"),
    ("bpf", "ENOSYS"),
    ("io_uring", "ENOSYS"),
    ("memfd", "ENOSYS"),
    ("signal the parent", "ENOSYS"),
    ("packet socket", "EPERM"),
    ("raw socket", "EPERM"),
    ("multipath TCP", "EPERM"),
    ("code in memory", "EPERM"),
    ("code in writable memory", "EPERM"),
    ("make memory code", "EPERM"),
];

const FILES: &[(&str, &str)] = &[
    ("read outside", "EACCES"),
    ("read outside in a younger thread", "EACCES"),
    ("list outside", "EACCES"),
    ("write outside", "EACCES"),
    ("remove outside", "EACCES"),
    ("bind outside", "EACCES"),
    ("write our own memory", "EACCES"),
    ("write a file inside", "EACCES"),
    ("write the configuration", "EACCES"),
];

const PORTS: &[(&str, &str)] = &[
    ("connect to another port", "EACCES"),
    ("bind another port", "EACCES"),
];

/// Whether the kernel has landlock; a container or kernel without it is told of and not failed.
fn has_landlock(came: &BTreeMap<String, String>) -> bool {
    let state = &came["landlock"];
    if state != "active" {
        eprintln!("what landlock refuses is not tested here: {state}");
    }
    state == "active"
}

#[test]
fn a_confined_process_works_and_an_intruder_in_it_gets_nowhere() {
    let came = try_with("{landlock: enforce}");
    hold(&came, &[("no_new_privs", "active"), ("seccomp", "active")]);
    hold(&came, WORK);
    hold(&came, SYSTEM_CALLS);
    if has_landlock(&came) {
        hold(&came, FILES);
        hold(&came, PORTS);
    }
}

#[test]
fn landlock_for_files_leaves_ports_alone() {
    let came = try_with("{landlock: files, seccomp: off}");
    hold(
        &came,
        &[("seccomp", "off"), ("memfd is counted", "0"), ("memfd", "ok")],
    );
    hold(&came, WORK);
    hold(&came, &[("connect to another port", "ok")]);
    if has_landlock(&came) {
        hold(&came, FILES);
    }
}

#[test]
fn a_filter_that_logs_refuses_nothing() {
    let came = try_with("{landlock: off, seccomp: log}");
    hold(&came, &[("seccomp", "active"), ("landlock", "off")]);
    hold(&came, WORK);
    hold(
        &came,
        &[
            ("memfd is counted", "0"),
            ("memfd", "ok"),
            ("code in memory", "ok"),
            ("read outside", "ok"),
            ("write a file inside", "ok"),
        ],
    );
}

#[test]
fn what_is_switched_off_is_off() {
    let came = try_with("{noNewPrivileges: false, landlock: off, seccomp: off}");
    hold(
        &came,
        &[("no_new_privs", "off"), ("seccomp", "off"), ("landlock", "off")],
    );
    hold(&came, WORK);
    hold(
        &came,
        &[
            ("memfd", "ok"),
            ("read outside", "ok"),
            ("connect to another port", "ok"),
        ],
    );
}

/// Old kernels, and container runtimes whose profile is older than landlock.
#[test]
fn what_the_kernel_lacks_is_said_and_the_work_goes_on() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(OLD_KERNEL, "1");
    let came = try_on("{}", command);
    hold(&came, &[("no_new_privs", "active")]);
    assert!(
        came["landlock"].contains("has no landlock (Linux 5.13"),
        "{came:#?}"
    );
    assert!(
        came["seccomp"].contains("the kernel does not take the filter"),
        "{came:#?}"
    );
    hold(&came, WORK);
    hold(
        &came,
        &[
            ("read outside", "ok"),
            ("memfd", "ok"),
            ("connect to another port", "ok"),
        ],
    );
}
