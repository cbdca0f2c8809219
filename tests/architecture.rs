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

/// The code before the first test module, line comments cut off.
fn code_only(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod").next().unwrap_or_default();
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

/// Whether `word` stands in the code as a path of its own, not as a part of a longer name.
fn mentions(code: &str, word: &str) -> bool {
    code.match_indices(word).any(|(at, _)| {
        let boundary = |c: Option<char>| !c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        boundary(code[..at].chars().next_back()) && boundary(code[at + word.len()..].chars().next())
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
