//! Starts that cannot succeed: exit code 64, one clear line, nothing left behind.

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::Path;

use crate::support::*;

/// Runs with this configuration in `dir`, where `files` are to be all that is left; answers what was said.
#[track_caller]
fn refused(dir: &Path, configuration: &str) -> String {
    let before = listing(dir);
    let file = dir.join("sidecar.yaml");
    std::fs::write(&file, configuration.replace("{dir}", &dir.display().to_string())).unwrap();
    let (code, said) = run_to_end(&file);
    std::fs::remove_file(&file).unwrap();
    assert_eq!(code, Some(64), "{said}");
    assert_eq!(listing(dir), before, "nothing is left, and nothing is gone");
    assert!(
        !said.contains("panicked") && !said.contains("RUST_BACKTRACE"),
        "{said}"
    );
    said
}

/// What a start that fails for what it found on the machine says: one message, either one line or a line of the
/// configuration with its place.
#[track_caller]
fn refused_in_a_line(dir: &Path, configuration: &str, words: &[&str]) {
    let said = refused(dir, configuration);
    let lines: Vec<&str> = said.trim_end().lines().collect();
    let placed = |line: &&&str| line.starts_with("error: ") && line.contains("sidecar.yaml:");
    match lines.as_slice() {
        [line] => assert!(line.starts_with("vsock-sidecar: "), "{said}"),
        lines => assert_eq!(lines.iter().filter(placed).count(), 1, "one message:\n{said}"),
    }
    for word in words {
        assert!(said.contains(word), "{word:?} is missing in: {said}");
    }
}

fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A guest without rules would be a warning, which is another line.
const RULE: &str = "{name: echo, port: 7, to: \"tcp://127.0.0.1:7\"}";

fn vhost_user(socket: &str) -> String {
    format!("guests: [{{name: web, cid: 3, vhostUser: {{socket: \"{socket}\"}}, outbound: [{RULE}]}}]\n")
}

#[test]
fn a_port_that_somebody_has() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let inbound = format!(
        "guests:\n- {{name: web, cid: 3, vhostUser: {{socket: \"{{dir}}/web.sock\"}}, \
         inbound: [{{name: first, listen: \"unix://{{dir}}/in.sock\", port: 1}}, \
         {{name: ssh, listen: \"tcp://{address}\", port: 22}}]}}\n"
    );
    refused_in_a_line(
        dir,
        &inbound,
        &["web", "ssh", &address, "another socket listens there"],
    );
    let admin = format!("admin: {{listen: [\"unix://{{dir}}/admin.sock\", \"tcp://{address}\"]}}\n");
    refused_in_a_line(dir, &(admin + &vhost_user("{dir}/web.sock")), &[&address]);
}

#[test]
fn a_socket_that_somebody_serves_is_not_stolen() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let live = UnixListener::bind(dir.join("live.sock")).unwrap();
    let live_path = dir.join("live.sock").display().to_string();
    refused_in_a_line(
        dir,
        &vhost_user("{dir}/live.sock"),
        &["web", &live_path, "served by another process"],
    );
    refused_in_a_line(
        dir,
        &format!(
            "guests: [{{name: web, cid: 3, vhostUser: {{socket: \"{{dir}}/web.sock\"}}, \
             inbound: [{{name: mux, listen: \"unix://{live_path}\", protocol: connect}}]}}]\n"
        ),
        &["mux", &live_path, "served by another process"],
    );
    refused_in_a_line(
        dir,
        &(format!("admin: {{listen: [\"unix://{live_path}\"]}}\n") + &vhost_user("{dir}/web.sock")),
        &[&live_path, "served by another process"],
    );
    // It is still served, by whom it was.
    live.set_nonblocking(true).unwrap();
    while live.accept().is_ok() {}
    let _client = std::os::unix::net::UnixStream::connect(dir.join("live.sock")).unwrap();
    assert!(live.accept().is_ok());
}

/// Two sidecars with one configuration: the second is refused, the first does not notice.
#[test]
fn a_second_sidecar_is_refused_and_the_first_works_on() {
    let port = serve(echo);
    let configuration = format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n"
    );
    let first = Sidecar::start(&configuration);
    let guest = linux(&first.path("web.sock"));
    let (code, said) = run_to_end(&first.path("sidecar.yaml"));
    assert_eq!(code, Some(64), "{said}");
    assert!(said.contains("served by another process"), "{said}");
    let mut stream = guest.connect(7).unwrap();
    std::io::Write::write_all(&mut stream, b"x").unwrap();
    std::io::Read::read_exact(&mut stream, &mut [0; 1]).unwrap();
    drop((stream, guest));
    // The vhost-user socket is still the first one's.
    until("the session is over", || {
        first.metric("vsock_session_active", &[]) == 0.0
    });
    drop(linux(&first.path("web.sock")).connect(7).unwrap());
}

#[test]
fn places_where_no_socket_can_be() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir(dir.join("directory")).unwrap();
    std::fs::write(dir.join("file"), "precious").unwrap();
    let text = |name: &str| dir.join(name).display().to_string();

    refused_in_a_line(
        dir,
        &vhost_user("{dir}/missing/web.sock"),
        &[&text("missing"), "does not exist"],
    );
    refused_in_a_line(
        dir,
        &vhost_user("{dir}/directory"),
        &[&text("directory"), "not a socket", "directory"],
    );
    refused_in_a_line(dir, &vhost_user("{dir}/file"), &[&text("file"), "not a socket"]);
    assert_eq!(std::fs::read(dir.join("file")).unwrap(), b"precious");
    refused_in_a_line(dir, &vhost_user("{dir}/file/web.sock"), &["web.sock"]);
    let inbound = "guests: [{name: web, cid: 3, vhostUser: {socket: \"{dir}/web.sock\"}, \
        inbound: [{name: mux, listen: \"unix://{dir}/missing/mux.sock\", protocol: connect}]}]\n";
    refused_in_a_line(dir, inbound, &["mux", &text("missing"), "does not exist"]);
    let client =
        "guests: [{name: web, cid: 3, vhostUser: {socket: \"{dir}/missing/web.sock\", mode: client}}]\n";
    refused_in_a_line(dir, client, &[&text("missing")]);
}

/// A later guest's socket cannot be had: what the earlier ones bound is taken back.
#[test]
fn the_second_guest_fails_and_the_first_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("two.sock")).unwrap();
    let configuration = format!(
        "admin: {{listen: [\"unix://{{dir}}/admin.sock\"]}}\nguests:\n\
         - {{name: one, cid: 3, vhostUser: {{socket: \"{{dir}}/one.sock\"}}, outbound: [{RULE}]}}\n\
         - {{name: two, cid: 4, vhostUser: {{socket: \"{{dir}}/two.sock\"}}, outbound: [{RULE}]}}\n"
    );
    refused_in_a_line(dir.path(), &configuration, &["guest two", "not a socket"]);
}

#[test]
fn files_that_are_no_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let file = dir.join("sidecar.yaml").display().to_string();
    // A snippet belongs to these: several lines, of which the first says where and what.
    let rows: [(&str, &[&str]); 5] = [
        ("", &[&file]),
        ("guests: [", &[&file]),
        ("guests: []\n", &["guests"]),
        ("guest: []\n", &["guest", "guests"]),
        (
            "guests: [{name: web, cid: 2, vhostUser: {socket: /run/x}}]\n",
            &["cid", "2"],
        ),
    ];
    for (configuration, words) in rows {
        let said = refused(dir, configuration);
        for word in words {
            assert!(said.contains(word), "{word:?} is missing in: {said}");
        }
    }
    let (code, said) = run_to_end(&dir.join("nothing.yaml"));
    assert_eq!(code, Some(64), "{said}");
    assert!(said.contains("nothing.yaml"), "{said}");
    let (code, said) = run_to_end(dir);
    assert_eq!(code, Some(64), "a directory: {said}");
}
