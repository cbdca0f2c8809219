//! `vsock-sidecar probe` against a running sidecar, and against servers that answer no or not at all.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// Its exit code and what it said, on either stream.
fn probe(arguments: &[&str], variable: Option<&str>) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"));
    command
        .arg("probe")
        .args(arguments)
        .env_remove("VSOCK_SIDECAR_ADMIN");
    if let Some(address) = variable {
        command.env("VSOCK_SIDECAR_ADMIN", address);
    }
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

struct Sidecar(Child);

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn sidecar(dir: &Path) -> (Sidecar, String) {
    let at = dir.display();
    let file = dir.join("config.yaml");
    let configuration = format!(
        "admin: {{listen: [\"unix://{at}/admin.sock\"]}}\n\
         guests: [{{name: web, cid: 3, vhostUser: {{socket: \"{at}/vsock.sock\"}}}}]\n"
    );
    fs::write(&file, configuration).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"))
        .args(["run", "--config"])
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    (Sidecar(child), format!("unix://{at}/admin.sock"))
}

/// As the kubelet does it: startup until it passes, then the others.
#[test]
fn a_started_sidecar_passes_every_probe_in_silence() {
    let dir = tempfile::tempdir().unwrap();
    let (_sidecar, admin) = sidecar(dir.path());
    let deadline = Instant::now() + LONG;
    while probe(&["startup"], Some(&admin)).0 != Some(0) {
        assert!(Instant::now() < deadline, "it does not start");
    }
    for what in ["startup", "ready", "live"] {
        assert_eq!(probe(&[what], Some(&admin)), (Some(0), String::new()), "{what}");
        assert_eq!(probe(&[what, "--admin", &admin], None).0, Some(0), "{what}");
    }
}

/// Someone who answers one connection with this, or with silence, and tells what was asked for.
fn somebody(answer: Option<String>) -> (tempfile::TempDir, String, thread::JoinHandle<String>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let asked = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 1024];
        let length = stream.read(&mut request).unwrap();
        if let Some(answer) = answer {
            stream.write_all(answer.as_bytes()).unwrap();
        }
        // Until the probe has closed.
        let _ = stream.read_to_end(&mut Vec::new());
        let request = String::from_utf8_lossy(&request[..length]).into_owned();
        request.lines().next().unwrap_or_default().to_owned()
    });
    (dir, format!("unix://{}", path.display()), asked)
}

fn response(status: &str, body: &str) -> Option<String> {
    Some(format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    ))
}

#[test]
fn a_failed_check_is_named_in_one_line() {
    let body =
        "[+]admin ok\n[-]guest web failed: no VMM yet\n[-]drain failed: shutting down\nreadyz check failed\n";
    for (what, path, word) in [
        ("startup", "/startupz", "not started: "),
        ("ready", "/readyz", "not ready: "),
        ("live", "/livez", "not alive: "),
    ] {
        let (_dir, admin, asked) = somebody(response("503 Service Unavailable", body));
        let (code, said) = probe(&[what, "--timeout", "60s"], Some(&admin));
        let expected = format!("vsock-sidecar: {word}guest web: no VMM yet; drain: shutting down\n");
        assert_eq!((code, said), (Some(1), expected));
        assert_eq!(asked.join().unwrap(), format!("GET {path} HTTP/1.1"));
    }
}

#[test]
fn no_answer_and_a_wrong_one_are_failures_that_say_so() {
    for (answer, arguments, word) in [
        (
            None,
            &["live", "--timeout", "100ms"][..],
            "not answered /livez within 0.1 s",
        ),
        (
            response("404 Not Found", "nothing here"),
            &["live"],
            "404 (nothing here)",
        ),
        (
            Some("SSH-2.0-x\r\n".to_owned()),
            &["live"],
            "does not answer as an HTTP server",
        ),
    ] {
        let (_dir, admin, _asked) = somebody(answer);
        let (code, said) = probe(arguments, Some(&admin));
        assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
        assert!(
            said.starts_with("vsock-sidecar: not alive: ") && said.contains(word),
            "{said}"
        );
    }
    let (code, said) = probe(&["startup", "--admin", "unix:///nonexistent/admin.sock"], None);
    assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
    assert!(
        said.contains("not started: cannot reach unix:///nonexistent/admin.sock"),
        "{said}"
    );
}

#[test]
fn bad_usage_is_64() {
    for arguments in [
        &[][..],
        &["alive"],
        &["live", "--timeout", "1"],
        &["live", "--timeout", "s"],
        &["live", "--timeout", "99999999999999999999m"],
        &["live", "--admin", "ftp://x"],
    ] {
        let (code, said) = probe(arguments, None);
        assert_eq!(code, Some(64), "{arguments:?}: {said}");
    }
}
