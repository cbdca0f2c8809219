//! Configuration: arbitrary text, and files that were nearly right.
//!
//! ```text
//! case = 0, text              as it is
//! case = base, edit*          one of the files below, with lines changed; see `edited`
//! ```

use vsock_sidecar::config::{self, Diagnostic};

use super::input::Input;

/// Files that use every key between them.
const BASES: &[&str] = &[
    "guests:\n  - name: web\n    cid: 3\n    vhostUser: {socket: /run/web.sock}\n",
    include_str!("config_base.yaml"),
];

/// What stands in the place of a value.
const VALUES: &[&str] = &[
    "null",
    "~",
    "true",
    "0",
    "1",
    "2",
    "3",
    "-1",
    "65535",
    "65536",
    "4294967294",
    "4294967295",
    "1.5",
    ".inf",
    ".nan",
    "0x10",
    "0o7",
    "1e3",
    "\"\"",
    "''",
    "a",
    "A",
    "é",
    "\"\\u0007\"",
    "\"\\ud800\"",
    "\"a\\nb\"",
    "|\n  a",
    ">-\n  b",
    "1-2",
    "2-1",
    "0-5",
    "1-4294967294",
    "1-4294967295",
    "22",
    "5s",
    "500ms",
    "0s",
    "0h",
    "99999999999h",
    "1.5s",
    "5 s",
    "-5s",
    "1KiB",
    "256KiB",
    "16MiB",
    "1GiB",
    "0B",
    "18446744073709551616B",
    "/a",
    "/a/",
    "/",
    "a/b",
    "/{cid}",
    "/{port}",
    "/{",
    "/a/../b",
    "tcp://a:1",
    "tcp://a",
    "tcp://:1",
    "tcp://127.0.0.1:1",
    "tcp://[::1]:1",
    "tcp://[x]:1",
    "tcp://.:1",
    "tcp://a:65535",
    "tcp://999.0.0.1:1",
    "tcp://a_b:1",
    "unix:///a",
    "unix://a",
    "unix:///{port}",
    "unix:///}",
    "unix:///a/.",
    "guest://web",
    "guest://db",
    "guest://",
    "vsock://2:1",
    "vsock://1",
    "vsock://-1:x",
    "connect",
    "plain",
    "v2",
    "v1",
    "length-prefixed",
    "seqpacket",
    "stream",
    "10.0.0.0/8",
    "10.0.0.1/8",
    "::1",
    "::/0",
    "10.0.0.0/33",
    "[10.0.0.0/8, '::1']",
    "server",
    "client",
    "auto",
    "iotlb",
    "identity",
    "off",
    "json",
    "text",
    "info",
    "a=info,warn",
    "[]",
    "{}",
    "[[]]",
    "[{}]",
    "{a: b}",
    "*a",
    "&a b",
    "&a [*a]",
    "!!str 3",
    "!!int x",
    "!!binary AA==",
    "<<: *a",
    "? x",
    "---",
    "...",
    "%YAML 1.2",
    "# comment",
    "- - -",
    "{",
    "]",
    ":",
    "a: b: c",
    "@",
    "`",
    "\t",
    "\u{85}",
    "\u{2028}",
    "\u{feff}",
    "\u{202e}",
];

/// Keys, with those that others are taken for.
const KEYS: &[&str] = &[
    "guests",
    "admin",
    "listen",
    "log",
    "format",
    "level",
    "drain",
    "timeout",
    "name",
    "cid",
    "vhostUser",
    "vhost_user",
    "socket",
    "mode",
    "accessPlatform",
    "outbound",
    "inbound",
    "port",
    "ports",
    "to",
    "proxyProtocol",
    "framing",
    "socketType",
    "allow",
    "protocol",
    "waitForGuest",
    "limits",
    "connections",
    "buffer",
    "connectTimeout",
    "guestTimeout",
    "idleTimeout",
    "busyPoll",
    "maxMessage",
    "confinement",
    "noNewPrivileges",
    "seccomp",
    "landlock",
    "paths",
    "linger",
    "readiness",
    "requireSession",
    "nmae",
    "Name",
    "<<",
    "\"a b\"",
    "3",
    "null",
    "&k cid",
    "*k",
];

/// Runs a case; panics where the configuration breaks a promise.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let text = match usize::from(input.u8()) {
        0 => String::from_utf8_lossy(input.rest()).into_owned(),
        base => edited(BASES[(base - 1) % BASES.len()], &mut input),
    };
    check(&text);
}

/// What a text comes to.
pub fn check(text: &str) {
    match config::parse(text, "fuzz.yaml") {
        Ok((read, warnings)) => {
            for warning in &warnings {
                diagnostic(text, &warning.0);
            }
            let effective = read.to_yaml().expect("what is legal can be written");
            let (again, warnings_again) =
                config::parse(&effective, "effective").unwrap_or_else(|error| panic!("{error}\n{effective}"));
            assert_eq!(again, read, "{effective}");
            assert_eq!(warnings_again.len(), warnings.len(), "{effective}");
            assert_eq!(again.to_yaml().ok(), Some(effective));
        }
        Err(error) => {
            assert!(!error.diagnostics.is_empty());
            for found in &error.diagnostics {
                diagnostic(text, found);
            }
            printable(&error.to_string());
        }
    }
}

/// It is about a place of the file, and it can be shown.
fn diagnostic(text: &str, found: &Diagnostic) {
    assert!(!found.message.is_empty());
    printable(&found.to_string());
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if let Some((line, column)) = found.position {
        // YAML's line breaks; in Unicode there are more.
        let text = text.replace("\r\n", "\n").replace('\r', "\n");
        let lines: Vec<&str> = text.split('\n').collect();
        // A file that ends too early ends behind its last line.
        let at = line.checked_sub(1).map(|at| at as usize);
        let columns = at
            .and_then(|at| lines.get(at))
            .map_or(0, |line| line.chars().count());
        let inside = at.is_some_and(|at| at < lines.len() || (at == lines.len() && column == 1));
        assert!(
            inside && column >= 1 && column as usize <= columns + 1,
            "{line}:{column} is not in {text:?}: {found}"
        );
    }
    if let Some(excerpt) = &found.excerpt {
        assert!(excerpt.marked >= 1);
        assert!(
            excerpt.mark <= excerpt.text.chars().count() + 1 || excerpt.text.is_empty(),
            "{excerpt:?}"
        );
        assert!(
            excerpt.mark + excerpt.marked < 300 && excerpt.text.chars().count() < 300,
            "{excerpt:?}"
        );
    }
}

/// Nothing in it moves a terminal's cursor but the ends of its lines.
fn printable(message: &str) {
    let control = message.chars().find(|c| c.is_control() && *c != '\n');
    assert_eq!(control, None, "{message:?}");
}

/// A file with changes to its lines.
fn edited(base: &str, input: &mut Input<'_>) -> String {
    let mut lines: Vec<String> = base.lines().map(str::to_owned).collect();
    for _ in 0..64 {
        if input.is_empty() || lines.is_empty() {
            break;
        }
        let what = input.u8();
        let at = input.below(lines.len());
        let (indent, body) = split(&lines[at]);
        let (indent, body) = (indent.to_owned(), body.to_owned());
        let (key, _) = body.split_once(':').unwrap_or((&body, ""));
        match what % 10 {
            0..=2 => lines[at] = format!("{indent}{key}: {}", input.choose(VALUES)),
            3 => drop(lines.remove(at)),
            4 => lines.insert(at, lines[at].clone()),
            5 => lines[at] = format!("{indent}{}: {}", input.choose(KEYS), input.choose(VALUES)),
            6 => lines.insert(
                at,
                format!("{indent}{}: {}", input.choose(KEYS), input.choose(VALUES)),
            ),
            7 => lines[at] = format!("{}{body}", " ".repeat(input.below(12))),
            8 => {
                let other = input.below(lines.len());
                lines.swap(at, other);
            }
            _ => lines[at] = format!("{indent}{key}: {}", String::from_utf8_lossy(input.bytes(40))),
        }
    }
    lines.join(if input.bool() { "\r\n" } else { "\n" })
}

/// Where a line's first key begins.
fn split(line: &str) -> (&str, &str) {
    let at = line.find(|c: char| c != ' ' && c != '-').unwrap_or(line.len());
    line.split_at(at)
}
