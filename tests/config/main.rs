//! The command line and the configuration, judged from outside: the real binary over a table of bad files, the
//! JSON Schema by an independent validator, and properties over generated files.

mod bad_files;
mod properties;
mod schema;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vsock_sidecar::config;

/// A directory with a file `config.yaml`, in which the binary runs.
struct Case {
    dir: TempDir,
}

impl Case {
    fn new(config: impl AsRef<[u8]>) -> Case {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(dir.path().join("config.yaml"), config).expect("a file in it");
        Case { dir }
    }

    /// In `config`, `DIR` stands for the directory.
    fn with_dir(config: &str) -> Case {
        let case = Case::new("");
        let text = config.replace("DIR", &case.path().display().to_string());
        std::fs::write(case.path().join("config.yaml"), text).expect("a file in it");
        case
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn check(&self) -> Output {
        vsock_sidecar(self.path(), &["check", "config.yaml"])
    }
}

fn vsock_sidecar(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"))
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .expect("the binary runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("stdout is UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("stderr is UTF-8")
}

/// `GUEST` in a configuration of the table stands for a guest to which the rest of the row belongs.
const GUEST: &str = "guests:\n- name: web\n  cid: 3\n  vhostUser: {socket: DIR/web.sock}\n";

/// The example of the design, with the keys that exist.
const EXAMPLE: &str = r#"
admin:
  listen: [tcp://0.0.0.0:9464, "unix://DIR/admin.sock"]
log: {format: json, level: info}
drain: {timeout: 25s}
limits: {connections: 20000, memory: 512MiB}
guests:
  - name: web
    cid: 3
    vhostUser:
      socket: DIR/web.sock
      mode: server
    outbound:
      - {name: db,   port: 5432, to: tcp://postgres.shop.svc:5432}
      - {name: apps, ports: 8000-8099, to: tcp://127.0.0.1:8000}
      - {name: logs, port: 514, to: unix:///run/log.sock, proxyProtocol: v2}
      - {name: fc,   ports: 50000-59999, to: "unix:///run/vm/web.sock_{port}"}
      - {name: peer, cid: 5, ports: 1-65535, to: guest://db}
      - {name: host, port: 1024, to: vsock://2:1024}
      - {name: queue, port: 5672, to: tcp://127.0.0.1:5672, framing: length-prefixed, maxMessage: 64KiB, connections: 100}
    inbound:
      - {name: ssh,  listen: tcp://0.0.0.0:2222, port: 22, allow: [10.0.0.0/8], waitForGuest: true}
      - {name: mux,  listen: unix://DIR/web.mux, protocol: connect}
      - {name: jobs, listen: unix://DIR/jobs.sock, port: 90, socketType: seqpacket}
      - {name: vm,   listen: vsock://2222, port: 22}
    limits: {connections: 4096, connectionsPerSecond: 200, buffer: 256KiB, memory: 64MiB, connectTimeout: 1500ms, guestTimeout: 5s, idleTimeout: 0s}
  - name: db
    cid: 5
    vhostUser: {socket: DIR/db.sock}
    inbound: [{listen: tcp://127.0.0.1:15432, port: 5432, connections: 50}]
"#;

/// Mistakes in different guests, rules and layers come together, in the order of the file.
#[test]
fn one_run_names_every_mistake() {
    let case = Case::with_dir(
        "admim: {listen: [tcp://0.0.0.0:9464]}\n\
         log: {level: inof}\n\
         guests:\n\
         - name: web\n  \
           cid: 2\n  \
           vhostUser: {socket: web.sock, mod: client}\n  \
           outbound:\n  \
           - {port: 1, to: tcp://a}\n  \
           - {port: 1, to: tcp://a:1}\n  \
           - 17\n\
         - name: web\n  \
           cid: 4\n  \
           cid: 5\n  \
           vhostUser: {socket: /nowhere/at/all/web.sock}\n",
    );
    let text = stderr(&case.check());
    let found: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("error: config.yaml:"))
        .collect();
    let expected = [
        "1:1: admim: unknown key `admim`",
        "2:14: log.level: `inof` is no log level",
        "5:8: guests[0].cid: 2 can be no guest's CID: it stands for the host (VMADDR_CID_HOST)",
        "6:23: guests[0].vhostUser.socket: `web.sock` is a relative path",
        "6:33: guests[0].vhostUser.mod: unknown key `mod`",
        "8:19: guests[0].outbound[0].to: `tcp://a` lacks a port",
        "9:5: guests[0].outbound[1]: this rule is never used: port 1 belongs to the rule for port 1 on line 8",
        "10:5: guests[0].outbound[2]: 17 is of the wrong type (a number)",
        "11:9: guests[1].name: the name `web` belongs to the guest on line 4",
        "13:3: guests[1].cid: `cid` is given a second time, after line 12",
        "14:23: guests[1].vhostUser.socket: the directory `/nowhere/at/all` does not exist",
    ];
    assert_eq!(found, expected, "{text}");
}

/// A file of nothing but mistakes is told in part, with the count of the rest.
#[test]
fn a_thousand_mistakes_are_cut_short() {
    let guests = "- {nme: x}\n".repeat(250);
    let text = stderr(&Case::new(format!("guests:\n{guests}")).check());
    assert_eq!(text.matches("error: config.yaml:").count(), 50);
    assert!(text.trim_end().ends_with("more"), "{text}");
}

/// What is wrong with the file itself has no line to show.
#[test]
fn files_that_cannot_be_read() {
    let case = Case::new("");
    std::fs::create_dir(case.path().join("directory")).expect("a directory");
    std::fs::write(case.path().join("latin1.yaml"), b"guests:\n  - name: caf\xe9\n").expect("a file");
    std::fs::write(case.path().join("comments.yaml"), "# nothing\n---\n").expect("a file");
    std::fs::write(case.path().join("huge.yaml"), "#\n".repeat(524_289)).expect("a file");
    let table = [
        (
            "config.yaml",
            "config.yaml: the file is empty",
            "at least one guest",
        ),
        (
            "comments.yaml",
            "comments.yaml: the file holds nothing but comments",
            "at least one guest",
        ),
        (
            "gone.yaml",
            "gone.yaml: there is no such file",
            "the path of the configuration",
        ),
        ("directory", "directory: this is a directory", "the file in it"),
        (
            "config.yaml/x",
            "config.yaml/x: a part of this path is no directory",
            "the path of the file",
        ),
        (
            "latin1.yaml",
            "latin1.yaml:2:14: the file is not UTF-8: byte 0xe9",
            "as UTF-8",
        ),
        ("huge.yaml", "huge.yaml: the file is larger than 1 MiB", "split"),
    ];
    for (file, says, remedy) in table {
        for args in [&["check", file][..], &["run", "--config", file]] {
            let output = vsock_sidecar(case.path(), args);
            let text = stderr(&output);
            assert_eq!(output.status.code(), Some(64), "{args:?}: {text}");
            assert!(
                text.starts_with(&format!("error: {says}")) && text.contains(remedy),
                "{args:?}: {text}"
            );
            assert!(text.lines().count() <= 2, "{args:?}: {text}");
        }
    }
}

/// What a hostile file asks for is not done: time and memory stay those of an honest file.
#[test]
fn bombs_are_refused_quickly() {
    let laughs = (1..10).fold(
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned(),
        |text, i| {
            let alias = format!("*a{}", i - 1);
            format!("{text}a{i}: &a{i} [{}]\n", vec![alias; 10].join(", "))
        },
    );
    let megabyte = 1 << 20;
    let bombs = [
        ("billion laughs", laughs, "grows beyond 100000 values"),
        ("flow nesting", "[".repeat(megabyte), "nested more than 32 deep"),
        (
            "mapping nesting",
            "{".repeat(megabyte),
            "nested more than 32 deep",
        ),
        (
            "block nesting",
            "- ".repeat(megabyte / 2),
            "nested more than 32 deep",
        ),
        (
            "key nesting",
            "? ".repeat(megabyte / 2),
            "nested more than 32 deep",
        ),
        (
            "one anchor, many aliases",
            format!("a: &a x\nb: [{}]", "*a,".repeat(megabyte / 3 - 8)),
            "grows beyond",
        ),
        (
            "many values",
            "- 1\n".repeat(megabyte / 4),
            "grows beyond 100000 values",
        ),
        (
            "many keys",
            "k: 1\n".repeat(megabyte / 5),
            "grows beyond 100000 values",
        ),
        (
            "nested anchors",
            format!("{}{}", "&a [".repeat(30), "1,".repeat(megabyte / 3)),
            "grows beyond",
        ),
        (
            "one long key",
            format!("{}: 1", "k".repeat(megabyte - 3)),
            "mapping values",
        ),
        (
            "one long value",
            format!("\"{}\"", "v".repeat(megabyte - 2)),
            "wrong type (text)",
        ),
    ];
    for (story, text, says) in bombs {
        let case = Case::new(text);
        let begin = Instant::now();
        // 512 MiB of address space: a bomb that went off would not fit.
        let output = Command::new("sh")
            .args([
                "-c",
                "ulimit -v 524288 && exec \"$0\" check config.yaml",
                env!("CARGO_BIN_EXE_vsock-sidecar"),
            ])
            .current_dir(case.path())
            .output()
            .expect("the binary runs");
        let took = begin.elapsed();
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(64), "{story}: {error:.500}");
        assert!(error.contains(says), "{story}: {error:.500}");
        assert!(error.len() < 2000, "{story}: {} bytes of message", error.len());
        assert!(took < Duration::from_secs(20), "{story} took {took:?}");
    }
}

/// A terminal shows the user's text; it must not obey it.
#[test]
fn messages_hold_no_control_characters() {
    let case = Case::new(
        "\"ke\\ey\": 1\nguests: [{name: \"\\e[2J\", cid: 3, x\u{202e}y: 1, vhostUser: {socket: \"/\\a\"}}]\n",
    );
    let text = stderr(&case.check());
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
    assert!(!text.contains('\u{202e}'), "{text:?}");
    assert!(text.contains("guests[0].name"), "{text}");
}

/// It has no rule of its own and needs none: another guest's leads to it.
#[test]
fn a_guest_that_a_sibling_reaches_is_not_odd() {
    let case = Case::with_dir(&format!(
        "{GUEST}  outbound:\n  - {{port: 1, to: \"guest://db\"}}\n\
         - {{name: db, cid: 4, vhostUser: {{socket: DIR/db.sock}}}}\n"
    ));
    let output = case.check();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(!text.contains("warning: "), "{text}");
}

#[test]
fn odd_but_usable_files_warn() {
    let case = Case::with_dir(&format!(
        "{GUEST}  outbound:\n  - {{name: one, ports: 1-50, to: tcp://a:1}}\n  - {{ports: 40-60, to: tcp://a:1}}\n\
         - {{name: idle, cid: 4, vhostUser: {{socket: DIR/idle.sock}}}}\n"
    ));
    let output = case.check();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("warning: config.yaml:7:5: guests[0].outbound[1]: a part of ports 40-60 belongs to the rule `one` (ports 1-50) on line 6"), "{text}");
    assert!(
        text.contains("warning: config.yaml:8:3: guests[1]: this guest has no rules"),
        "{text}"
    );
    assert_eq!(text.matches("warning: ").count(), 2, "{text}");
}

/// The rules of two CIDs do not hide each other; what else is odd about a rule with a CID is told.
#[test]
fn rules_are_told_apart_by_their_cid() {
    let case = Case::with_dir(&format!(
        "{GUEST}  outbound:\n  - {{ports: 1-99, to: tcp://a:1}}\n  - {{ports: 1-99, to: guest://db}}\n  \
         - {{cid: 5, ports: 1-99, to: guest://db}}\n  - {{cid: 4, ports: 50-200, to: tcp://a:1}}\n  \
         limits: {{connections: 10}}\n\
         - {{name: db, cid: 4, vhostUser: {{socket: DIR/b.sock}}, outbound: [{{port: 1, to: 'guest://web:7', connections: 4097}}]}}\n"
    ));
    let output = case.check();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    for warning in [
        "9:5: guests[0].outbound[3]: a part of ports 50-200 of CID 4 belongs to the rule for ports 1-99 of CID 4 on line 7",
        "9:11: guests[0].outbound[3].cid: CID 4 is that of the guest `db`, and this rule leads elsewhere",
        "11:122: guests[1].outbound[0].connections: 4097 connections of this rule are more than the guest may have (4096)",
    ] {
        assert!(
            text.contains(&format!("warning: config.yaml:{warning}")),
            "{warning}\n{text}"
        );
    }
    assert_eq!(text.matches("warning: ").count(), 3, "{text}");
    let (config, _) = config::parse(&stdout(&output), "effective").expect("a right configuration");
    let cids: Vec<u32> = config
        .guests
        .iter()
        .flat_map(|guest| &guest.outbound)
        .map(|rule| rule.cid)
        .collect();
    assert_eq!(cids, [2, 4, 5, 4, 3]);
}

/// A frame is bounded by the buffer of its guest, unless the file says less.
#[test]
fn the_longest_message_is_that_of_the_buffer() {
    for (limits, message, expected) in [
        ("", "", 256 * 1024),
        (", limits: {buffer: 16MiB}", "", 16 << 20),
        (", limits: {buffer: 4KiB}", "", 4096),
        (", limits: {buffer: 16MiB}", ", maxMessage: 1", 1),
    ] {
        let text = format!(
            "guests: [{{name: web, cid: 3, vhostUser: {{socket: /tmp/web.sock}}{limits},\n\
             outbound: [{{port: 1, to: tcp://a:1, framing: length-prefixed{message}}}],\n\
             inbound: [{{port: 1, listen: unix:///tmp/a, framing: length-prefixed{message}}}]}}]"
        );
        let (config, _) = config::parse(&text, "frames").unwrap_or_else(|error| panic!("{error}"));
        let guest = &config.guests[0];
        let framing = Some(config::Framing {
            max_message: expected,
        });
        assert_eq!(
            (guest.outbound[0].framing, guest.inbound[0].framing),
            (framing, framing),
            "{text}"
        );
        assert_eq!(
            guest.inbound[0].guest_socket_type(),
            config::SocketType::Seqpacket
        );
    }
}

/// The same socket behind a symbolic link would be bound twice.
#[test]
fn a_symbolic_link_hides_no_conflict() {
    let case = Case::with_dir(&format!(
        "{GUEST}- {{name: b, cid: 4, vhostUser: {{socket: DIR/link/web.sock}}}}\n"
    ));
    std::os::unix::fs::symlink(case.path(), case.path().join("link")).expect("a symbolic link");
    let output = case.check();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(64), "{text}");
    assert!(
        text.contains("5:41: guests[1].vhostUser.socket: this is the same socket as"),
        "{text}"
    );
    assert!(text.contains("on line 4, by way of a symbolic link"), "{text}");
}

/// `check` prints every default, and what it prints is a configuration that means the same.
#[test]
fn check_prints_the_effective_configuration() {
    let case = Case::with_dir(&format!(
        "{GUEST}  outbound: [{{port: 5432, to: tcp://db:5432}}]\n"
    ));
    let output = case.check();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let expected = format!(
        "admin:\n  listen: []\nlog:\n  format: json\n  level: info\ndrain:\n  timeout: 25s\n  linger: 3s\nreadiness:\n  requireSession: false\nlimits: {{}}\nconfinement:\n  \
         noNewPrivileges: true\n  seccomp: enforce\n  landlock: files\n  paths: []\nguests:\n- name: web\n  cid: 3\n  vhostUser:\n    socket: {}/web.sock\n    mode: server\n    accessPlatform: auto\n  outbound:\n  - name: port-5432\n    \
         cid: 2\n    port: 5432\n    to: tcp://db:5432\n  inbound: []\n  limits:\n    connections: 4096\n    connectionsPerSecond: 0\n    \
         buffer: 256KiB\n    memory: 256MiB\n    \
         connectTimeout: 1500ms\n    guestTimeout: 5s\n    idleTimeout: 0s\n    busyPoll: 0s\n",
        case.path().display()
    );
    assert_eq!(stdout(&output), expected);

    let again = Case::new(&output.stdout);
    assert_eq!(
        stdout(&vsock_sidecar(again.path(), &["check", "config.yaml"])),
        expected
    );
}

#[test]
fn the_example_of_the_design_is_accepted() {
    let case = Case::with_dir(EXAMPLE);
    let output = case.check();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
    let text = EXAMPLE.replace("DIR", "/tmp");
    let (from_example, _) = config::parse(&text, "example").expect("the example is right");
    let (again, _) =
        config::parse(&from_example.to_yaml().expect("YAML"), "again").expect("its YAML is right");
    assert_eq!(from_example, again);
}

/// The examples of the documentation are files that work.
#[test]
fn the_examples_of_the_documentation_are_accepted() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let document = std::fs::read_to_string(path).expect("docs/configuration.md");
    let blocks: Vec<_> = document
        .split("```yaml\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .collect();
    assert!(!blocks.is_empty());
    for block in blocks {
        let (_, warnings) = config::parse(block, "example").unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(warnings, [], "{block}");
    }
}

#[test]
fn anchors_and_merge_keys_work() {
    let text = "guests:\n\
        - {name: a, cid: 3, vhostUser: {socket: /run/a.sock}, limits: &limits {buffer: 1MiB}}\n\
        - {name: b, cid: 4, vhostUser: {socket: /run/b.sock}, limits: *limits}\n\
        - {name: c, cid: 5, vhostUser: {socket: /run/c.sock}, limits: {<<: *limits, connections: 7}}\n";
    let (config, _) = config::parse(text, "anchors").expect("a right configuration");
    let limits: Vec<_> = config
        .guests
        .iter()
        .map(|guest| (guest.limits.buffer, guest.limits.connections))
        .collect();
    assert_eq!(limits, [(1 << 20, 4096), (1 << 20, 4096), (1 << 20, 7)]);
}

#[test]
fn rules_without_names_get_distinct_stable_ones() {
    let text = "guests:\n- name: a\n  cid: 3\n  vhostUser: {socket: /run/a.sock}\n  \
        outbound: [{port: 22, to: tcp://a:1}, {ports: 80-90, to: tcp://a:80}]\n  \
        inbound:\n  \
        - {listen: tcp://127.0.0.1:1, port: 22}\n  \
        - {listen: tcp://127.0.0.1:2, port: 22}\n  \
        - {listen: tcp://127.0.0.1:3, port: 23, name: port-22-2}\n  \
        - {listen: tcp://127.0.0.1:4, protocol: connect}\n";
    let (config, _) = config::parse(text, "names").expect("a right configuration");
    let guest = &config.guests[0];
    let outbound: Vec<_> = guest.outbound.iter().map(|rule| rule.name.as_str()).collect();
    let inbound: Vec<_> = guest.inbound.iter().map(|rule| rule.name.as_str()).collect();
    assert_eq!(outbound, ["port-22", "ports-80-90"]);
    assert_eq!(inbound, ["port-22", "port-22-3", "port-22-2", "connect"]);
}

#[test]
fn standard_input_is_a_file_too() {
    for (text, code) in [(EXAMPLE.replace("DIR", "/tmp"), 0), ("guests: 7".to_owned(), 64)] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"))
            .args(["check", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        child
            .stdin
            .take()
            .expect("a pipe")
            .write_all(text.as_bytes())
            .expect("it reads");
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert!(
            code == 0 || stderr(&output).starts_with("error: <stdin>:1:9: guests: "),
            "{}",
            stderr(&output)
        );
    }
}

#[test]
fn bad_usage_exits_with_64_and_help_with_0() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for args in [
        &[][..],
        &["rum"],
        &["run"],
        &["check"],
        &["check", "a", "b"],
        &["schema", "--turbo"],
    ] {
        let output = vsock_sidecar(dir.path(), args);
        assert_eq!(output.status.code(), Some(64), "{args:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }
    for args in [
        &["--help"][..],
        &["--version"],
        &["help", "run"],
        &["run", "--help"],
    ] {
        let output = vsock_sidecar(dir.path(), args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{args:?}");
    }
    let version = stdout(&vsock_sidecar(dir.path(), &["--version"]));
    assert_eq!(version, format!("vsock-sidecar {}\n", env!("CARGO_PKG_VERSION")));
}

/// `vsock-sidecar schema | head -1` is no failure.
#[test]
fn a_reader_that_has_enough_is_no_failure() {
    let output = Command::new("sh")
        .args([
            "-c",
            "{ \"$0\" schema; echo \"code $?\" >&2; } | true",
            env!("CARGO_BIN_EXE_vsock-sidecar"),
        ])
        .output()
        .expect("a shell");
    assert_eq!(stderr(&output), "code 0\n");
}

/// Helm reads `off` in its values as a boolean and writes `false`: a chart's `accessPlatform: off` came out as an error.
#[test]
fn off_is_off_however_it_went_through_yaml() {
    for (written, effective) in [
        ("off", "\"off\""),
        ("\"off\"", "\"off\""),
        ("false", "\"off\""),
        ("iotlb", "iotlb"),
    ] {
        let case = Case::with_dir(&format!(
            "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: DIR/web.sock, accessPlatform: {written}}}\n"
        ));
        let output = case.check();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            text.contains(&format!("accessPlatform: {effective}\n")),
            "{written}: {text}"
        );
    }
    let case = Case::with_dir(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {socket: DIR/web.sock, accessPlatform: true}\n",
    );
    assert!(stderr(&case.check()).contains("true is of the wrong type (a boolean)"));
}
