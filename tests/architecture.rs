//! The arrows: which room of the house may know of which. Read from the source tree, so that a new `use` shows.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Every room and what it may use, as in the crate's documentation. `vsock::header` stands for that module only.
const ARROWS: &[(&str, &[&str])] = &[
    ("vsock", &[]),
    ("sys", &[]),
    ("config", &[]),
    ("metrics", &[]),
    ("drain", &[]),
    ("quota", &[]),
    ("logging", &["config", "metrics"]),
    ("guest", &["sys", "vsock::header"]),
    ("host", &["config", "quota", "sys"]),
    ("confine", &["config", "sys"]),
    ("capture", &["metrics", "vsock::header"]),
    (
        "device",
        &[
            "capture", "config", "guest", "host", "metrics", "quota", "sys", "vsock",
        ],
    ),
    ("vhost_user", &["device", "guest", "sys"]),
    ("admin", &["config", "drain", "metrics", "sys"]),
    ("kubevirt", &["config", "sys"]),
    ("embedded_guest", &["sys", "vsock::header"]),
    (
        "app",
        &[
            "admin",
            "capture",
            "config",
            "confine",
            "device",
            "drain",
            "guest",
            "host",
            "kubevirt",
            "logging",
            "metrics",
            "quota",
            "sys",
            "vhost_user",
            "vsock",
        ],
    ),
    (
        "demo",
        &[
            "app",
            "config",
            "embedded_guest",
            "logging",
            "metrics",
            "terminal",
        ],
    ),
    ("state", &["terminal"]),
    ("probe", &["state", "terminal"]),
    (
        "webhook",
        &["config", "confine", "logging", "metrics", "terminal"],
    ),
    ("terminal", &[]),
    ("cli", &[]),
];

/// Words that must not appear in a room's code (comments and tests aside), and why.
const FORBIDDEN: &[(&str, &[&str], &str)] = &[
    (
        "vsock",
        &[
            "Instant::now",
            "SystemTime",
            "tokio",
            "libc",
            "mio",
            "vm_memory",
            "std::net",
            "std::os",
            "std::io",
            "std::fs",
        ],
        "the law performs no I/O and reads no clock",
    ),
    (
        "guest",
        &["tokio", "std::net", "mio"],
        "guest memory knows nothing of sockets",
    ),
    (
        "host",
        &["vm_memory", "virtio_queue", "vhost"],
        "host sockets know nothing of guests",
    ),
];

/// Rooms whose code the device's thread runs for packets.
const PACKET_ROOMS: &[&str] = &[
    "capture", "device", "guest", "host", "metrics", "quota", "sys", "vsock",
];

/// What takes a lock or waits for another thread. `with_label_values` and its kin take the lock of a metric's family, where a counter
/// that was taken out of it beforehand is an atomic. A channel's `try_recv` takes none, hence `recv` is what is looked for.
const LOCKS: &[&str] = &[
    "Mutex",
    "RwLock",
    "ReentrantLock",
    "Condvar",
    "Barrier",
    "Once",
    "OnceLock",
    "LazyLock",
    "parking_lot",
    ".with_label_values",
    ".get_metric_with_label_values",
    ".remove_label_values",
    ".recv()",
    ".recv_timeout",
    ".blocking_recv",
    ".blocking_send",
    "sync_channel",
    "block_on",
    "thread::park",
    "thread::sleep",
];

/// Files of these rooms that have one of them all the same, and when it is taken: never for a packet.
const LOCKS_ASIDE: &[(&str, &[&str], &str)] = &[
    (
        "device/containment.rs",
        &["thread::sleep"],
        "a pause after a panic, before the device goes on without a session",
    ),
    (
        "device/handle.rs",
        &[".blocking_recv"],
        "other threads wait for the device's answer",
    ),
    (
        "device/sibling.rs",
        &["Mutex"],
        "the guests that can be dialled: asked when one dials another, and held to put a list in its place",
    ),
    (
        "device/spurious.rs",
        &["thread::sleep"],
        "a pause for a guest that kicks again and again with nothing behind it",
    ),
    (
        "guest/dirty.rs",
        &["RwLock"],
        "the dirty log: taken while the VMM migrates the guest, and only an atomic is read otherwise",
    ),
    (
        "host/resolve.rs",
        &["Mutex"],
        "names are looked up by the control runtime",
    ),
    (
        "metrics/guest.rs",
        &[".with_label_values"],
        "counters are taken out of their families when a guest is made",
    ),
    (
        "metrics/iotlb.rs",
        &[".with_label_values"],
        "counters are taken out of their families when a guest is made",
    ),
    (
        "metrics/mod.rs",
        &[".with_label_values"],
        "at start, and when a configuration is taken over",
    ),
    (
        "metrics/rules.rs",
        &["Mutex", ".with_label_values", ".remove_label_values"],
        "when rules come and go",
    ),
    (
        "metrics/session.rs",
        &["Mutex"],
        "at scrapes, and when guests come",
    ),
    ("metrics/totals.rs", &["Mutex"], "at scrapes"),
    (
        "metrics/webhook.rs",
        &[".with_label_values"],
        "in the webhook, which has no devices",
    ),
    (
        "sys/sigbus.rs",
        &["Mutex", "OnceLock"],
        "when a VMM shares memory and when it goes; the handler reads atomics",
    ),
    (
        "sys/unix_socket.rs",
        &["thread::sleep"],
        "while a session binds its socket",
    ),
    (
        "sys/unwind.rs",
        &["Once"],
        "the panic hook, at the start of a device's thread",
    ),
];

struct Source {
    room: String,
    path: PathBuf,
    /// Without comments, strings of attributes, and test modules.
    code: String,
}

fn sources() -> Vec<Source> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&src, &mut files);
    files
        .into_iter()
        .filter_map(|path| {
            let inside = path.strip_prefix(&src).ok()?.to_path_buf();
            let room = inside.iter().next()?.to_str()?.trim_end_matches(".rs").to_owned();
            let is_test = inside.iter().any(|part| part == "tests" || part == "tests.rs");
            let code = code_only(&fs::read_to_string(&path).ok()?);
            (!is_test && room != "main" && room != "lib").then_some(Source { room, path, code })
        })
        .collect()
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("src can be read") {
        let path = entry.expect("src can be read").path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

/// The code before the first test module, line comments cut off. One that is a file of its own hides nothing but its name.
fn code_only(text: &str) -> String {
    let modules = text.match_indices("#[cfg(test)]\nmod ");
    let inline = modules.map(|(at, _)| at).find(|at| {
        let rest = text[*at..].split_once("mod ").map_or("", |(_, rest)| rest);
        rest.find(['{', ';'])
            .is_some_and(|end| rest[end..].starts_with('{'))
    });
    let code = &text[..inline.unwrap_or(text.len())];
    code.lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n")
}

/// Every `crate::…` path of a text, brace groups opened one level: `crate::a::{b, c}` gives `a::b` and `a::c`.
fn crate_paths(code: &str) -> BTreeSet<String> {
    let mut paths = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest: String = code[at + "crate::".len()..]
            .chars()
            .filter(|c| !c.is_whitespace())
            .take(400)
            .collect();
        let end = rest
            .find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'))
            .unwrap_or(rest.len());
        let (path, tail) = rest.split_at(end);
        match tail.strip_prefix('{').and_then(|group| group.split_once('}')) {
            Some((group, _)) if path.ends_with("::") || path.is_empty() => {
                for item in group.split(',').filter(|item| !item.is_empty()) {
                    paths.insert(format!("{path}{item}"));
                }
            }
            _ => {
                paths.insert(path.trim_end_matches(':').to_owned());
            }
        }
    }
    paths
}

fn allowed(room: &str, path: &str) -> bool {
    let target = path.split("::").next().unwrap_or_default();
    if target == room {
        return true;
    }
    let Some((_, arrows)) = ARROWS.iter().find(|(name, _)| *name == room) else {
        return false;
    };
    arrows
        .iter()
        .any(|arrow| path == *arrow || path.starts_with(&format!("{arrow}::")))
}

/// What is wrong with these sources.
fn violations(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    let rooms: BTreeSet<&str> = ARROWS.iter().map(|(room, _)| *room).collect();
    for source in sources {
        let file = source.path.display();
        if !rooms.contains(source.room.as_str()) {
            found.push(format!(
                "{file}: the room {} has no arrows: add it to tests/architecture.rs",
                source.room
            ));
            continue;
        }
        for path in crate_paths(&source.code) {
            if !allowed(&source.room, &path) {
                found.push(format!("{file}: {} must not use crate::{path}", source.room));
            }
        }
        for (room, words, why) in FORBIDDEN {
            for word in words
                .iter()
                .filter(|word| source.room == *room && mentions(&source.code, word))
            {
                found.push(format!("{file}: {room} must not mention {word}: {why}"));
            }
        }
        if source.room != "sys"
            && mentions(&source.code, "unsafe")
            && !source.code.contains("forbid(unsafe_code)")
        {
            found.push(format!("{file}: unsafe lives in sys only"));
        }
    }
    found
}

/// Locks where packets pass, and exceptions that have become needless.
fn lock_violations(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources
        .iter()
        .filter(|source| PACKET_ROOMS.contains(&source.room.as_str()))
    {
        let aside = LOCKS_ASIDE.iter().find(|(file, ..)| source.path.ends_with(file));
        let (excepted, why) = aside.map_or((&[][..], ""), |(_, words, why)| (*words, *why));
        let file = source.path.display();
        for word in LOCKS {
            match (mentions(&source.code, word), excepted.contains(word)) {
                (true, false) => found.push(format!("{file}: {word} where packets pass")),
                (false, true) => found.push(format!("{file}: {word} ({why}) is gone: so be the exception")),
                _ => {}
            }
        }
    }
    found
}

/// Whether `word` stands in the code as a path of its own, not as a part of a longer name.
fn mentions(code: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        let boundary = |c: Option<char>| !c.is_some_and(part);
        // A word that begins or ends with a sign brings its boundary with it.
        (!word.starts_with(part) || boundary(code[..at].chars().next_back()))
            && (!word.ends_with(part) || boundary(code[at + word.len()..].chars().next()))
    })
}

#[test]
fn every_room_keeps_to_its_arrows() {
    let found = violations(&sources());
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn no_two_rooms_know_each_other() {
    let arrows: BTreeMap<&str, BTreeSet<&str>> = ARROWS
        .iter()
        .map(|(room, to)| {
            (
                *room,
                to.iter()
                    .map(|arrow| arrow.split("::").next().unwrap_or(arrow))
                    .collect(),
            )
        })
        .collect();
    for (room, targets) in &arrows {
        for target in targets {
            let back = arrows
                .get(target)
                .unwrap_or_else(|| panic!("{room} -> {target}: no such room"));
            assert!(!back.contains(room), "{room} and {target} know each other");
        }
    }
}

/// What this cannot see, locks that others make us wait for, `tests/locks.rs` counts while bytes flow.
#[test]
fn no_lock_is_taken_where_packets_pass() {
    let found = lock_violations(&sources());
    assert!(found.is_empty(), "{}", found.join("\n"));
    for (file, ..) in LOCKS_ASIDE {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(file);
        assert!(path.exists(), "{file} is gone: so be the exception");
    }
}

/// The test sees a lock that is added.
#[test]
fn a_new_lock_shows() {
    let look = |path: &str, code: &str| {
        let room = path.split('/').next().unwrap_or_default().into();
        let code = code_only(code);
        lock_violations(&[Source {
            room,
            path: path.into(),
            code,
        }])
        .len()
    };
    let flow = "device/switchboard/flow.rs";
    assert_eq!(look(flow, "use std::sync::{Arc, Mutex};"), 1);
    assert_eq!(look(flow, "family.with_label_values(&[guest]).inc();"), 1);
    assert_eq!(look(flow, "let answer = channel.recv()?;"), 1);
    assert_eq!(look(flow, "let n = stream.recv(&mut buffer)?;"), 0);
    assert_eq!(look(flow, "while let Ok(command) = inbox.try_recv() {}"), 0);
    assert_eq!(look(flow, "static PAGE: AtomicUsize = AtomicUsize::new(0);"), 0);
    assert_eq!(look("vhost_user/vring.rs", "use std::sync::Mutex;"), 0);
    assert_eq!(look("device/sibling.rs", "use std::sync::Mutex;"), 0);
    // An exception that nobody needs any more.
    assert_eq!(look("device/sibling.rs", ""), 1);
    // Code behind a test module that is a file of its own.
    assert_eq!(look(flow, "#[cfg(test)]\nmod tests;\nuse std::sync::Mutex;"), 1);
    assert_eq!(
        look(flow, "#[cfg(test)]\nmod tests {\nuse std::sync::Mutex;\n}"),
        0
    );
}

/// The test sees an arrow that is drawn: each of these has been somebody's shortcut somewhere.
#[test]
fn a_new_arrow_shows() {
    let draw = |room: &str, code: &str| {
        let source = Source {
            room: room.into(),
            path: PathBuf::from("x.rs"),
            code: code_only(code),
        };
        violations(&[source]).len()
    };
    assert_eq!(draw("vsock", "use crate::sys::iovec::IoVecs;"), 1);
    assert_eq!(draw("vsock", "let now = std::time::Instant::now();"), 1);
    assert_eq!(draw("guest", "use crate::host::HostStream;"), 1);
    assert_eq!(draw("guest", "use crate::vsock::Muxer;"), 1);
    assert_eq!(draw("guest", "use crate::vsock::header::HEADER_LEN;"), 0);
    assert_eq!(draw("host", "use crate::{guest::Ring, sys::iovec};"), 1);
    assert_eq!(
        draw(
            "vhost_user",
            "use crate::{\n    metrics::Registry,\n    guest::Ring,\n};"
        ),
        1
    );
    assert_eq!(draw("device", "fn f() { crate::vhost_user::session() }"), 1);
    assert_eq!(draw("device", "fn f() { unsafe { g() } }"), 1);
    assert_eq!(draw("newroom", ""), 1);
    assert_eq!(draw("vsock", "// use crate::sys; Instant::now\n"), 0);
}
