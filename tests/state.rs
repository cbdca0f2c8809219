//! `vsock-sidecar state`: documents and the text that people get, and the program against servers, good and bad.
//!
//! `tests/state/*.json` are documents of `/state`, `tests/state/*.txt` what is expected of them. After a change that is
//! meant, `UPDATE_SNAPSHOTS=1 cargo test --test state` writes the texts anew; read the difference before you keep it.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use vsock_sidecar::state::{Look, render};

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(20);

const LOOK: Look = Look {
    width: None,
    colour: false,
    messages: false,
};

fn here(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/state")
        .join(name)
}

fn document(name: &str) -> Value {
    let text = fs::read_to_string(here(&format!("{name}.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn rendered(name: &str, look: Look) -> String {
    render(&document(name), "http://127.0.0.1:9464", look)
}

/// Compares with what is written down.
#[track_caller]
fn expect(snapshot: &str, text: &str) {
    let file = here(&format!("{snapshot}.txt"));
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(&file, text).unwrap();
    }
    let expected = fs::read_to_string(&file).unwrap_or_default();
    if text == expected {
        return;
    }
    let at = text
        .lines()
        .zip(expected.lines())
        .take_while(|(a, b)| a == b)
        .count();
    panic!(
        "{} differs from line {} on:\n  is       {:?}\n  expected {:?}\nin\n{text}",
        file.display(),
        at + 1,
        text.lines().nth(at),
        expected.lines().nth(at)
    );
}

/// No line is longer than the terminal, but where a single word is.
#[track_caller]
fn fits(text: &str, width: usize) {
    for line in text.lines() {
        let words = line.split_whitespace().count();
        assert!(
            line.chars().count() <= width || words == 1,
            "{} columns of {width}: {line}",
            line.chars().count()
        );
        assert_eq!(line.trim_end(), line, "blanks at the end of a line");
    }
}

#[test]
fn a_guest_behind_a_viommu_at_every_width() {
    let messages = true;
    expect("viommu", &rendered("viommu", Look { messages, ..LOOK }));
    for width in [60, 80, 140] {
        let text = rendered(
            "viommu",
            Look {
                width: Some(width),
                messages,
                ..LOOK
            },
        );
        fits(&text, width);
        expect(&format!("viommu-{width}"), &text);
    }
}

#[test]
fn the_android_story_begins_with_its_findings() {
    for width in [60, 80, 140] {
        let text = rendered(
            "android",
            Look {
                width: Some(width),
                ..LOOK
            },
        );
        fits(&text, width);
        expect(&format!("android-{width}"), &text);
        let place = |word: &str| {
            text.find(word)
                .unwrap_or_else(|| panic!("{word:?} is missing in\n{text}"))
        };
        assert!(
            place("memory-not-shared") < place("access-platform-without-iotlb"),
            "errors first"
        );
        assert!(
            place("access-platform-without-iotlb") < place("seqpacket-dropped"),
            "the past last"
        );
        assert!(
            place("seqpacket-dropped") < place("Virtio features"),
            "findings before tables"
        );
    }
}

#[test]
fn guests_that_wait_hang_or_are_not_yet_running() {
    expect(
        "several",
        &rendered(
            "several",
            Look {
                width: Some(100),
                ..LOOK
            },
        ),
    );
}

#[test]
fn colour_says_the_same_in_other_words() {
    for name in ["viommu", "android", "several"] {
        let look = Look {
            width: Some(80),
            messages: true,
            ..LOOK
        };
        let painted = rendered(name, Look { colour: true, ..look });
        let mut stripped = String::new();
        for (number, piece) in painted.split("\x1b[").enumerate() {
            match (number, piece.split_once('m')) {
                (0, _) => stripped.push_str(piece),
                (_, Some((code, text))) => {
                    assert!(["0", "1", "2", "31", "32", "33", "36"].contains(&code), "{code}");
                    stripped.push_str(text);
                }
                (_, None) => panic!("{piece:?}"),
            }
        }
        let plain = rendered(name, look);
        let lines =
            |text: &str| -> Vec<String> { text.lines().map(|line| line.trim_end().to_owned()).collect() };
        assert_eq!(lines(&stripped), lines(&plain), "{name}");
    }
    let android = rendered("android", Look { colour: true, ..LOOK });
    assert!(
        android.contains("\x1b[31m✗ error\x1b[0m \x1b[1mmemory-not-shared\x1b[0m"),
        "{android}"
    );
    assert!(android.contains("\x1b[33midentity\x1b[0m"), "{android}");
}

/// A program's name, a path, a message: a guest, a VMM or a peer chooses them.
#[test]
fn no_stranger_paints_the_terminal_and_no_nonsense_is_fatal() {
    let look = Look {
        width: Some(100),
        messages: true,
        ..LOOK
    };
    let text = rendered("strangers", look);
    let bad = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
    assert!(!text.contains(bad), "{text:?}");
    assert!(
        text.contains("\\u{1b}]0;owned\\u{7}"),
        "it is shown for what it is: {text}"
    );
    assert!(!text.lines().any(|line| line.starts_with("root#")), "{text}");
    expect("strangers", &text);
}

/// What any part of the document is replaced by, the rest is shown.
#[test]
fn a_document_with_a_hole_anywhere_is_shown() {
    fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
        found.push(at.to_owned());
        match value {
            Value::Object(map) => map
                .iter()
                .for_each(|(key, value)| pointers(value, &format!("{at}/{key}"), found)),
            Value::Array(list) => list
                .iter()
                .enumerate()
                .take(2)
                .for_each(|(index, value)| pointers(value, &format!("{at}/{index}"), found)),
            _ => {}
        }
    }
    let whole = document("viommu");
    let mut all = Vec::new();
    pointers(&whole, "", &mut all);
    assert!(all.len() > 300, "{}", all.len());
    for pointer in all {
        for other in [
            Value::Null,
            Value::from(7),
            Value::from("x"),
            Value::from(vec![Value::Null]),
        ] {
            let mut holed = whole.clone();
            *holed.pointer_mut(&pointer).unwrap() = other;
            let text = render(
                &holed,
                "x",
                Look {
                    width: Some(80),
                    messages: true,
                    ..LOOK
                },
            );
            assert!(text.starts_with("vsock-sidecar"), "{pointer}");
        }
    }
}

/// Someone who answers every request with these bytes; on TCP.
fn answering(bytes: impl Into<Vec<u8>>) -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let bytes = bytes.into();
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            serve(&mut stream, &bytes);
        }
    });
    format!("http://{address}")
}

fn serve(stream: &mut (impl Read + Write), answer: &[u8]) {
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
        request.push(byte[0]);
    }
    let _ = stream.write_all(answer);
}

fn ok(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

fn viommu() -> String {
    fs::read_to_string(here("viommu.json")).unwrap()
}

/// The program, with an environment that says nothing of terminals.
fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"));
    command.arg("state").args(args).stdin(Stdio::null());
    for name in ["VSOCK_SIDECAR_ADMIN", "COLUMNS", "NO_COLOR", "TERM"] {
        command.env_remove(name);
    }
    command
}

/// Runs it to its end; exit code, stdout, stderr.
#[track_caller]
fn run(mut command: Command) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn json_is_the_document_as_it_came() {
    let address = answering(ok(&viommu()));
    let (code, out, said) = run(command(&["--admin", &address, "--json"]));
    assert_eq!((code, said.as_str()), (Some(0), ""));
    assert_eq!(out, viommu());

    let (code, out, _) = run(command(&["--admin", &address, "--json", "--guest", "web"]));
    assert_eq!(code, Some(0));
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap(), document("viommu"));
}

#[test]
fn one_guest_of_several() {
    let several = fs::read_to_string(here("several.json")).unwrap();
    let address = answering(ok(&several));
    let (code, out, _) = run(command(&["--admin", &address, "--guest", "build"]));
    assert_eq!(code, Some(0));
    assert!(
        out.contains("build · CID 4") && !out.contains("web · CID 3"),
        "{out}"
    );

    let (code, out, said) = run(command(&["--admin", &address, "--guest", "built\x1b[2J"]));
    assert_eq!((code, out.as_str()), (Some(64), ""));
    let expected = format!(
        "vsock-sidecar: no guest `built\\u{{1b}}[2J` in the sidecar at {address}; it has web, build, new\n"
    );
    assert_eq!(said, expected);
}

#[test]
fn colour_and_width_are_asked_for() {
    let address = answering(ok(&viommu()));
    let painted = |args: &[&str], name: &str, value: &str| {
        let mut command = command(args);
        command.args(["--admin", &address]).env(name, value);
        run(command).1.contains('\x1b')
    };
    assert!(!painted(&[], "TERM", "xterm"), "no terminal, no colour");
    assert!(painted(&["--color", "always"], "TERM", "xterm"));
    assert!(
        painted(&["--color", "always"], "NO_COLOR", "1"),
        "who asks on the command line gets it"
    );
    assert!(!painted(&["--color", "never"], "TERM", "xterm"));
    let mut narrow = command(&["--messages"]);
    narrow.env("COLUMNS", "60").env("VSOCK_SIDECAR_ADMIN", &address);
    let text = run(narrow).1.replace(&address, "http://127.0.0.1:9464");
    fits(&text, 60);
}

/// One line each, with the address, and what to do about it.
#[test]
fn what_is_no_sidecar_is_told_in_a_line() {
    let closed = {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let dir = tempfile::tempdir().unwrap();
    let missing = format!("unix://{}/none.sock", dir.path().display());
    let refused = format!("unix://{}/file", dir.path().display());
    fs::write(dir.path().join("file"), "").unwrap();
    let status = |status: &str, body: &str| {
        answering(format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    };
    for (address, words) in [
        (closed, ["refused", "admin.listen"]),
        (missing, ["No such file", "admin.listen"]),
        (refused, ["refused", "admin.listen"]),
        (
            status("404 Not Found", "nothing\nhere"),
            ["status 404 (nothing)", "admin address"],
        ),
        (
            status(
                "503 Service Unavailable",
                "{\"error\":\"no answer within 800 ms\"}",
            ),
            ["800 ms", "try again"],
        ),
        (status("302 Found", ""), ["status 302", "admin address"]),
        (
            answering("SSH-2.0-OpenSSH_9.2\r\n"),
            ["does not answer as an HTTP server", "admin address"],
        ),
        (
            answering(""),
            ["does not answer as an HTTP server", "admin address"],
        ),
        (
            answering("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"guests\""),
            ["does not answer as an HTTP server", "admin address"],
        ),
        (
            answering(ok("<html>\x1b[2J</html>")),
            ["no JSON", "admin address"],
        ),
        (
            answering(ok("{\"status\": \"ok\"}")),
            ["no list of guests", "admin address"],
        ),
    ] {
        let (code, out, said) = run(command(&["--admin", &address]));
        assert_eq!((code, out.as_str()), (Some(1), ""), "{said}");
        assert_eq!(said.lines().count(), 1, "one line: {said}");
        assert!(!said.contains('\x1b'), "{said:?}");
        for word in words.iter().copied().chain([address.as_str(), "vsock-sidecar: "]) {
            assert!(said.contains(word), "{word:?} is missing in: {said}");
        }
    }
}

#[test]
fn an_endless_answer_is_cut_off() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        serve(&mut stream, b"HTTP/1.1 200 OK\r\n\r\n[");
        // Until the client has had enough.
        while stream.write_all(&[b' '; 1 << 16]).is_ok() {}
    });
    let (code, _, said) = run(command(&["--admin", &address]));
    assert_eq!(code, Some(1));
    assert!(said.contains("more than 67108864 bytes"), "{said}");
    server.join().unwrap();
}

#[test]
fn bad_usage_is_told_with_exit_code_64() {
    for args in [
        &["--admin", "https://127.0.0.1:1"][..],
        &["--admin", "127.0.0.1"],
        &["--color", "sometimes"],
        &["--json", "--messages"],
        &["extra"],
    ] {
        let (code, out, said) = run(command(args));
        assert_eq!((code, out.as_str()), (Some(64), ""), "{args:?}: {said}");
        assert!(!said.is_empty());
    }
    let mut from_environment = command(&[]);
    from_environment.env("VSOCK_SIDECAR_ADMIN", "/run/admin.sock");
    let (code, _, said) = run(from_environment);
    assert_eq!(code, Some(64));
    assert!(said.contains("did you mean unix:///run/admin.sock?"), "{said}");
}

/// `vsock-sidecar state | head -1`.
#[test]
fn a_reader_that_has_read_enough_is_no_failure() {
    // More than a pipe holds, so that the program is still writing when its reader leaves.
    let mut many = document("viommu");
    let guests = many["guests"].as_array_mut().unwrap();
    let guest = guests[0].clone();
    guests.resize(100, guest);
    let address = answering(ok(&many.to_string()));
    let mut child = command(&["--admin", &address])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 13]).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

/// A sidecar that runs, killed at the end.
struct Sidecar {
    child: Child,
    dir: tempfile::TempDir,
    tcp: String,
}

impl Sidecar {
    #[track_caller]
    fn start() -> Sidecar {
        // The kernel picks a port that is free; somebody else may take it in between, hence several attempts.
        for _ in 0..10 {
            if let Some(sidecar) = Sidecar::try_start() {
                return sidecar;
            }
        }
        panic!("no sidecar has started");
    }

    fn try_start() -> Option<Sidecar> {
        let dir = tempfile::tempdir().unwrap();
        let port = {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            listener.local_addr().unwrap().port()
        };
        let at = dir.path().display();
        let configuration = format!(
            "admin: {{listen: [\"tcp://127.0.0.1:{port}\", \"unix://{at}/admin.sock\"]}}\n\
             guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{at}/web.sock\"}}\n  \
             outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:7\"}}]\n  \
             inbound: [{{name: mux, listen: \"unix://{at}/mux.sock\", protocol: connect}}]\n"
        );
        let file = dir.path().join("sidecar.yaml");
        fs::write(&file, configuration).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"))
            .args(["run", "--config"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut sidecar = Sidecar {
            child,
            dir,
            tcp: format!("127.0.0.1:{port}"),
        };
        let deadline = Instant::now() + LONG;
        while run(command(&["--admin", &sidecar.unix()])).0 != Some(0) {
            if sidecar.child.try_wait().unwrap().is_some() {
                return None;
            }
            assert!(Instant::now() < deadline, "the sidecar does not answer");
        }
        Some(sidecar)
    }

    fn unix(&self) -> String {
        format!("unix://{}/admin.sock", self.dir.path().display())
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_running_sidecar_is_asked_over_tcp_and_over_its_unix_socket() {
    let sidecar = Sidecar::start();
    for address in [
        format!("http://{}", sidecar.tcp),
        format!("tcp://{}", sidecar.tcp),
        sidecar.tcp.clone(),
        sidecar.unix(),
    ] {
        let (code, out, said) = run(command(&["--admin", &address]));
        assert_eq!((code, said.as_str()), (Some(0), ""), "{address}");
        for words in [
            "web · CID 3 · waiting",
            "none connected",
            "port 7",
            "CONNECT <port>",
            "Rules",
        ] {
            assert!(out.contains(words), "{words:?} is missing in\n{out}");
        }
        let (code, out, _) = run(command(&["--admin", &address, "--json"]));
        assert_eq!(code, Some(0));
        let document: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(document["guests"][0]["name"], "web");
    }
}
