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
    let refused = "the new configuration is refused, the one before stays in use";
    let said = sidecar.logged(refused, |event| {
        field(event, "path") == "guests[0].outbound[0].port"
    });
    assert!(
        said.iter().all(|event| field(event, "level") == "ERROR"),
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
    // It is served before it is counted.
    sidecar.until_metric("vsock_config_last_reload_successful", &[], 1.0);
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

/// The watch is often faster than who has changed the file and asks then: to hear that nothing has changed would be odd.
#[test]
fn who_asks_after_the_watch_has_seen_the_change_is_told_what_it_changed() {
    let service = serve(echo);
    let sidecar = Sidecar::start(&web("", "", ""));
    sidecar.rewrite(&web(&rule("db", 7, service), "", ""));
    sidecar.until_metric("vsock_config_reloads_total", &[], 1.0);
    let (status, said) = sidecar.post("/-/reload");
    assert_eq!(
        (status, said.as_str()),
        (200, "applied\nguest web: outbound rule db added\n")
    );
    let last = sidecar.state()["config"]["lastReload"].clone();
    assert_eq!(
        (last["result"].as_str(), last["cause"].as_str()),
        (Some("applied"), Some("request"))
    );
    assert_eq!(
        sidecar.metric("vsock_config_reloads_total", &[]),
        1.0,
        "there was one"
    );
    assert_eq!(sidecar.post("/-/reload"), (200, "unchanged\n".to_owned()));
}

/// To open a pipe waits until somebody writes to it: the thread that waited would be the one that drains as well, and SIGTERM would do
/// nothing any more.
#[test]
fn a_pipe_in_the_files_place_is_refused_and_holds_nothing_up() {
    let good = web("", "", "");
    let mut sidecar = Sidecar::start(&good);
    let pipe = sidecar.path("pipe");
    mkfifo(&pipe);
    fs::rename(&pipe, sidecar.path("sidecar.yaml")).unwrap();
    let (status, said) = sidecar.post("/-/reload");
    assert_eq!(status, 422);
    assert!(said.contains("this is a pipe"), "{said}");
    sidecar.rewrite(&good);
    sidecar.until_metric("vsock_config_last_reload_successful", &[], 1.0);
    mkfifo(&pipe);
    fs::rename(&pipe, sidecar.path("sidecar.yaml")).unwrap();
    sidecar.terminate();
    assert_eq!(sidecar.wait(LONG).code(), Some(0));
}

/// `--config <(...)`: what was read is gone, which is no mistake of anybody's.
#[test]
fn a_pipe_is_read_once_as_standard_input_is() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    mkfifo(&pipe);
    symlink("pipe", dir.path().join("sidecar.yaml")).unwrap();
    let text = format!(
        "admin: {{listen: [\"unix://{0}/admin.sock\"]}}\nlog: {{format: json, level: debug}}\n{1}",
        dir.path().display(),
        web("", "", "").replace("{dir}", &dir.path().display().to_string())
    );
    thread::spawn(move || fs::write(pipe, text).unwrap());
    let mut sidecar = Sidecar::start_in(dir, "");
    let (status, said) = sidecar.post("/-/reload");
    assert_eq!(status, 503);
    assert!(said.contains("or a pipe: it cannot be read again"), "{said}");
    assert_eq!(sidecar.metric("vsock_config_last_reload_successful", &[]), 1.0);
    sidecar.terminate();
    assert_eq!(sidecar.wait(LONG).code(), Some(0));
}

fn mkfifo(path: &Path) {
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mkfifoat(rustix::fs::CWD, path, mode).unwrap();
}

/// Its mode says that it may be read, so somebody who is told to see to the mode looks for a long time.
#[test]
fn a_link_that_leads_out_of_reach_is_refused_with_the_reason() {
    let elsewhere = tempfile::tempdir().unwrap();
    let good = web("", "", "");
    let sidecar = Sidecar::start(&good);
    if sidecar.state()["confinement"]["landlock"]["state"] != "active" {
        return;
    }
    let other = elsewhere.path().join("sidecar.yaml");
    fs::write(&other, sidecar.file_with(&good)).unwrap();
    fs::remove_file(sidecar.path("sidecar.yaml")).unwrap();
    symlink(&other, sidecar.path("sidecar.yaml")).unwrap();
    let (status, said) = sidecar.post("/-/reload");
    assert_eq!(status, 422);
    assert!(
        said.contains("the configuration's file: /")
            && said.contains("is out of reach since the start (landlock): restart the sidecar"),
        "{said}"
    );
}

/// Names of rules and guests that nobody has used before, again and again: what was is forgotten.
#[test]
fn rules_and_guests_of_earlier_files_leave_nothing_behind() {
    let service = serve(echo);
    let sidecar = Sidecar::start(&web("", "", ""));
    // The thread that watches the file may not have begun, so these are bounds, and far below what thirty guests would leave.
    let (descriptors, threads) = (sidecar.descriptors() + 10, sidecar.threads() + 5);
    for n in 0..30 {
        let rules = format!(
            "{}, {}",
            rule(&format!("a{n}"), 1, service),
            rule(&format!("b{n}"), 2, service)
        );
        let guest = format!("- {{name: g{n}, cid: 9, vhostUser: {{socket: \"{{dir}}/g{n}.sock\"}}}}\n");
        sidecar.reload(&web(&rules, "", &guest));
    }
    sidecar.reload(&web("", "", ""));
    until("the last guest is gone", || {
        sidecar.state()["guests"].as_array().unwrap().len() == 1
    });
    until("threads and descriptors are gone", || {
        sidecar.threads() <= threads && sidecar.descriptors() <= descriptors
    });
    let page = sidecar.get("/metrics");
    let left: Vec<_> = page
        .lines()
        .filter(|line| {
            ["rule=\"a", "rule=\"b", "guest=\"g"]
                .iter()
                .any(|label| line.contains(label))
        })
        .collect();
    assert_eq!(left, [""; 0]);
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
