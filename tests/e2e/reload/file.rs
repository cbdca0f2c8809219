//! How a file changes: as kubelet does it, as editors do, badly, and not at all.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::*;

/// A version of a ConfigMap's volume, in the way of kubelet's atomic writer: a directory with the data, and `..data` that leads
/// to it and is replaced by rename.
fn publish(volume: &Path, version: &str, text: &str) {
    let data = volume.join(format!("..{version}"));
    fs::create_dir(&data).unwrap();
    fs::write(data.join("sidecar.yaml"), text).unwrap();
    symlink(format!("..{version}"), volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
}

fn until_served(guest: &Sockets, port: u32) {
    until(&format!("port {port} is served"), || guest.connect(port).is_ok());
}

#[test]
fn a_config_map_swap_is_seen_while_a_transfer_runs() {
    let service = serve(echo);
    let dir = tempfile::tempdir().unwrap();
    let text = |rules: &str| {
        format!(
            "admin: {{listen: [\"unix://{0}/admin.sock\"]}}\nlog: {{format: json, level: debug}}\n{1}",
            dir.path().display(),
            web(rules, "", "").replace("{dir}", &dir.path().display().to_string())
        )
    };
    publish(dir.path(), "one", &text(&rule("a", 7, service)));
    symlink("..data/sidecar.yaml", dir.path().join("sidecar.yaml")).unwrap();
    let volume = dir.path().to_owned();
    let (second, broken, third) = (
        text(&format!("{}, {}", rule("a", 7, service), rule("b", 8, service))),
        text("{port: nine}"),
        text(&rule("c", 9, service)),
    );
    let sidecar = Sidecar::start_in(dir, "");
    let guest = linux(&sidecar.path("web.sock"));
    let stream = connect(&guest, 7);
    publish(&volume, "two", &second);
    until_served(&guest, 8);
    ping(&stream);

    publish(&volume, "three", &broken);
    sidecar.until_metric("vsock_config_reload_failures_total", &[], 1.0);
    assert_eq!(sidecar.metric("vsock_config_last_reload_successful", &[]), 0.0);
    let said = sidecar.events("the new configuration is refused, the one before stays in use");
    assert!(
        !said.is_empty() && said.iter().all(|event| field(event, "level") == "ERROR"),
        "{said:?}"
    );
    assert!(
        said.iter()
            .any(|event| field(event, "path") == "guests[0].outbound[0].port"),
        "{said:?}"
    );
    assert!(said.iter().all(|event| field(event, "line") != "0"), "{said:?}");
    let last = sidecar.state()["config"]["lastReload"].clone();
    assert_eq!(
        (last["result"].as_str(), last["cause"].as_str()),
        (Some("refused"), Some("file"))
    );
    ping(&connect(&guest, 8));

    publish(&volume, "four", &third);
    until_served(&guest, 9);
    ping(&stream);
    assert_eq!(sidecar.metric("vsock_config_last_reload_successful", &[]), 1.0);
}

#[test]
fn files_are_also_renamed_written_in_place_and_taken_away() {
    let service = serve(echo);
    let sidecar = Sidecar::start(&web(&rule("a", 1, service), "", ""));
    let guest = linux(&sidecar.path("web.sock"));
    sidecar.rewrite(&web(&rule("a", 2, service), "", ""));
    until_served(&guest, 2);
    let file = sidecar.path("sidecar.yaml");
    fs::write(&file, sidecar.file_with(&web(&rule("a", 3, service), "", ""))).unwrap();
    until_served(&guest, 3);
    // As an editor that keeps the old file: it is gone for a moment, which is a mistake like any other.
    fs::rename(&file, sidecar.path("sidecar.yaml~")).unwrap();
    sidecar.until_metric("vsock_config_reload_failures_total", &[], 1.0);
    fs::write(&file, sidecar.file_with(&web(&rule("a", 4, service), "", ""))).unwrap();
    until_served(&guest, 4);
}

/// One line for a bad file, however often its directory changes; the file that runs already is a success again.
#[test]
fn a_bad_file_is_told_once_and_to_go_back_is_a_success() {
    let good = web("", "", "");
    let sidecar = Sidecar::start(&good);
    sidecar.rewrite("guests: 7\n");
    sidecar.until_metric("vsock_config_reload_failures_total", &[], 1.0);
    for n in 0..5 {
        fs::write(sidecar.path(&format!("beside{n}")), "").unwrap();
    }
    sidecar.rewrite("guests: 7\n");
    sidecar.rewrite(&good);
    sidecar.until_metric("vsock_config_last_reload_successful", &[], 1.0);
    assert_eq!(sidecar.metric("vsock_config_reload_failures_total", &[]), 1.0);
    // Who asks by name is told again.
    sidecar.rewrite("guests: 7\n");
    for _ in 0..2 {
        let (status, said) = sidecar.post("/-/reload");
        assert_eq!(status, 422);
        assert!(said.contains("sidecar.yaml:3:9: guests:"), "{said}");
    }
}

#[test]
fn a_directory_that_is_replaced_is_watched_again() {
    let service = serve(echo);
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("config");
    let text = |port: u32| {
        format!(
            "admin: {{listen: [\"unix://{0}/admin.sock\"]}}\nlog: {{format: json, level: debug}}\nconfinement: {{landlock: off}}\n{1}",
            dir.path().display(),
            web(&rule("a", port, service), "", "").replace("{dir}", &dir.path().display().to_string())
        )
    };
    fs::create_dir(&place).unwrap();
    fs::write(place.join("sidecar.yaml"), text(1)).unwrap();
    symlink("config/sidecar.yaml", dir.path().join("sidecar.yaml")).unwrap();
    let (second, third) = (text(2), text(3));
    let sidecar = Sidecar::start_in(dir, "");
    let guest = linux(&sidecar.path("web.sock"));
    fs::remove_dir_all(&place).unwrap();
    fs::create_dir(&place).unwrap();
    fs::write(place.join("sidecar.yaml"), second).unwrap();
    until_served(&guest, 2);
    fs::write(place.join("sidecar.yaml"), third).unwrap();
    until_served(&guest, 3);
}

#[test]
fn who_may_not_ask_is_not_heard() {
    let port = free_port();
    let sidecar = Sidecar::start(&format!(
        "admin: {{listen: [\"tcp://127.0.0.1:{port}\", \"unix://{{dir}}/admin.sock\"]}}\n{}",
        web("", "", "")
    ));
    let ask = |head: &str| {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        write!(stream, "{head}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split(' ').nth(1).unwrap().parse::<u16>().unwrap()
    };
    assert_eq!(ask("GET /-/drain HTTP/1.1\r\nHost: localhost"), 405);
    assert_eq!(ask("POST /-/drain HTTP/1.1\r\nHost: evil.example"), 403);
    assert_eq!(
        ask("POST /-/drain HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example"),
        403
    );
    assert_eq!(ask("POST /-/reload HTTP/1.1\r\nHost: localhost"), 200);
    assert!(matches!(sidecar.try_get("/readyz"), Some((200, _))));
}

/// With `enforce` a port that was not there at start is out of reach, and the whole file is refused; with `paths` a directory is
/// allowed in advance.
#[test]
fn what_was_given_up_at_start_cannot_be_had_back() {
    let service = serve(echo);
    let elsewhere = tempfile::tempdir().unwrap();
    let confined = |paths: &str, rules: &str, inbound: &str| {
        format!(
            "confinement: {{landlock: enforce, paths: [{paths}]}}\n{}",
            web(rules, inbound, "")
        )
    };
    let allowed = elsewhere.path().join("allowed");
    fs::create_dir(&allowed).unwrap();
    let paths = format!("\"{}\"", allowed.display());
    let sidecar = Sidecar::start(&confined(&paths, "", ""));
    if sidecar.state()["confinement"]["landlock"]["state"] != "active" {
        return;
    }
    sidecar.rewrite(&confined(&paths, &rule("db", 7, service), ""));
    let (status, said) = sidecar.post("/-/reload");
    assert_eq!(status, 422);
    assert!(
        said.contains("guest web: outbound rule db: TCP port") && said.contains("restart the sidecar"),
        "{said}"
    );
    let listen = |directory: &Path| {
        format!(
            "{{name: in, listen: \"unix://{}/in.sock\", port: 22}}",
            directory.display()
        )
    };
    sidecar.rewrite(&confined(&paths, "", &listen(elsewhere.path())));
    let (status, said) = sidecar.post("/-/reload");
    assert_eq!(status, 422);
    assert!(
        said.contains("guest web: inbound rule in: /") && said.contains("confinement.paths"),
        "{said}"
    );
    sidecar.reload(&confined(&paths, "", &listen(&allowed)));
    assert!(exists(&allowed.join("in.sock")));
}
