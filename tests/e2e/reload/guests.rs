//! Guests that come and go, and what a session keeps to its end.

use super::*;

fn guest_named(name: &str, cid: u32, outbound: &str) -> String {
    format!(
        "- {{name: {name}, cid: {cid}, vhostUser: {{socket: \"{{dir}}/{name}.sock\"}}, outbound: [{outbound}]}}\n"
    )
}

#[test]
fn a_guest_that_is_added_is_served_at_once_and_siblings_find_each_other() {
    let service = serve(echo);
    let sidecar = Sidecar::start(&web(&rule("db", 7, service), "", ""));
    let first = linux(&sidecar.path("web.sock"));
    let stream = connect(&first, 7);
    let to_late = "{name: peer, port: 5, to: \"guest://late\"}";
    let said = sidecar.reload(&web(
        &format!("{}, {to_late}", rule("db", 7, service)),
        "",
        &guest_named("late", 9, &rule("db", 7, service)),
    ));
    assert!(said.contains("guest late added"), "{said}");
    let late = linux(&sidecar.path("late.sock"));
    ping(&connect(&late, 7));
    let listener = late.listen(5).unwrap();
    let mut out = first.connect_to(9, 5).unwrap();
    let mut there = listener.accept_timeout(LONG).unwrap();
    out.write_all(b"over").unwrap();
    there.read_exact(&mut [0; 4]).unwrap();
    ping(&stream);
    assert_eq!(
        sidecar.metric(
            "vsock_connections_opened_total",
            &[("guest", "late"), ("rule", "guest://web")]
        ),
        1.0
    );
    assert_eq!(sidecar.state()["guests"].as_array().unwrap().len(), 2);
}

#[test]
fn a_guest_that_is_removed_may_finish_and_leaves_nothing() {
    let service = serve(echo);
    let both = web(
        &rule("db", 7, service),
        "",
        &guest_named("goes", 9, &rule("db", 7, service)),
    );
    let sidecar = Sidecar::start(&format!("drain: {{timeout: 120s, linger: 0s}}\n{both}"));
    let stays = linux(&sidecar.path("web.sock"));
    let goes = linux(&sidecar.path("goes.sock"));
    let stream = connect(&goes, 7);
    sidecar.reload(&format!(
        "drain: {{timeout: 120s, linger: 0s}}\n{}",
        web(&rule("db", 7, service), "", "")
    ));
    assert_eq!(sidecar.state()["guests"][1]["leaving"], true);
    // As in a drain: what is open goes on, and the guest's own new connections too.
    ping(&stream);
    ping(&connect(&goes, 7));
    drop(stream);
    until("the guest is gone", || !exists(&sidecar.path("goes.sock")));
    until("its series are gone", || {
        !sidecar.get("/metrics").contains("guest=\"goes\"")
    });
    assert_eq!(sidecar.state()["guests"].as_array().unwrap().len(), 1);
    assert!(matches!(sidecar.try_get("/livez"), Some((200, _))));
    ping(&connect(&stays, 7));

    // And it may come back.
    sidecar.reload(&format!("drain: {{timeout: 120s, linger: 0s}}\n{both}"));
    ping(&connect(&linux(&sidecar.path("goes.sock")), 7));
}

#[test]
fn a_guest_that_comes_back_before_it_is_gone_was_never_away() {
    let service = serve(echo);
    let both = web("", "", &guest_named("db", 9, &rule("db", 7, service)));
    let sidecar = Sidecar::start(&both);
    let db = linux(&sidecar.path("db.sock"));
    let stream = connect(&db, 7);
    sidecar.reload(&web("", "", ""));
    assert_eq!(sidecar.state()["guests"][1]["leaving"], true);
    sidecar.reload(&both);
    assert_eq!(sidecar.state()["guests"][1]["leaving"], false);
    ping(&stream);
    drop(stream);
    until("it is over", || db.open_connections() == 0);
    ping(&connect(&db, 7));
    assert_eq!(sidecar.metric("vsock_sessions_total", &[("guest", "db")]), 1.0);
}

/// It was never away, so neither was its socket: what the file says of another one waits for a restart, and is told.
#[test]
fn a_guest_that_comes_back_with_another_socket_keeps_its_own_until_a_restart() {
    let long = "drain: {timeout: 120s, linger: 120s}\n";
    let with = |socket: &str| {
        let db = guest_named("db", 9, "").replace("db.sock", socket);
        format!("{long}{}", web("", "", &db))
    };
    let sidecar = Sidecar::start(&with("db.sock"));
    let db = linux(&sidecar.path("db.sock"));
    sidecar.reload(&format!("{long}{}", web("", "", "")));
    assert_eq!(sidecar.state()["guests"][1]["leaving"], true);
    let said = sidecar.reload(&with("other.sock"));
    assert!(
        said.contains("guest db: vhostUser.socket: ")
            && said.contains("other.sock (needs a restart of the sidecar)"),
        "{said}"
    );
    let state = sidecar.state();
    assert_eq!(state["guests"][1]["leaving"], false);
    assert_eq!(
        state["config"]["pending"].as_array().unwrap().len(),
        1,
        "{}",
        state["config"]
    );
    assert!(!exists(&sidecar.path("other.sock")));
    assert_lawful(&db);
}

/// kubelet publishes a file once. One that only had to wait for a guest to go is taken when it is gone.
#[test]
fn a_socket_goes_to_the_next_guest_when_its_guest_is_gone() {
    let service = serve(echo);
    let with = |more: &str| format!("drain: {{timeout: 120s, linger: 120s}}\n{}", web("", "", more));
    let sidecar = Sidecar::start(&with(&guest_named("db", 9, "")));
    let db = linux(&sidecar.path("db.sock"));
    let next = guest_named("next", 9, &rule("echo", 7, service)).replace("next.sock", "db.sock");

    sidecar.rewrite(&with(&next));
    let (status, said) = sidecar.post("/-/reload");
    assert_eq!(status, 422);
    assert!(
        said.contains("guest next: the vhost-user socket ")
            && said.contains(
                "serves guest db, which goes with its connections and not before: remove that guest, reload"
            ),
        "{said}"
    );
    assert_eq!(sidecar.state()["guests"][1]["leaving"], false);

    sidecar.reload(&with(""));
    sidecar.rewrite(&with(&next));
    let (status, said) = sidecar.post("/-/reload");
    assert_eq!(status, 422);
    assert!(
        said.contains("was removed and goes with its connections: wait until it is gone"),
        "{said}"
    );
    drop(db);
    until("the next guest is there", || {
        sidecar.state()["guests"][1]["name"] == "next"
    });
    ping(&connect(&linux(&sidecar.path("db.sock")), 7));
    sidecar.until_metric("vsock_config_last_reload_successful", &[], 1.0);
}

#[test]
fn a_socket_that_its_guest_keeps_until_a_restart_is_not_anothers_before() {
    let sidecar = Sidecar::start(&web("", "", ""));
    let moved = web("", "", &guest_named("next", 9, ""))
        .replace("web.sock", "moved.sock")
        .replace("next.sock", "web.sock");
    sidecar.rewrite(&moved);
    let (status, said) = sidecar.post("/-/reload");
    assert_eq!(status, 422);
    assert!(
        said.contains("serves guest web, which keeps it until the sidecar is restarted: restart it"),
        "{said}"
    );
}

#[test]
fn the_grace_period_ends_a_guest_that_goes_on() {
    let service = serve(echo);
    let both = web("", "", &guest_named("goes", 9, &rule("db", 7, service)));
    let sidecar = Sidecar::start(&format!("drain: {{timeout: 300ms}}\n{both}"));
    let goes = linux(&sidecar.path("goes.sock"));
    let mut stream = connect(&goes, 7);
    ping(&stream);
    sidecar.reload(&format!("drain: {{timeout: 300ms}}\n{}", web("", "", "")));
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    assert!(stream.was_reset());
    until("the guest is gone", || !exists(&sidecar.path("goes.sock")));
    let ended = sidecar.logged("connection ended", |_| true);
    assert_eq!(field(&ended[0], "reason"), "drain");
}

#[test]
fn a_cid_is_for_the_next_session_and_what_needs_a_restart_says_so() {
    let service = serve(echo);
    let text = web(&rule("db", 7, service), "", "");
    let sidecar = Sidecar::start(&text);
    let guest = linux(&sidecar.path("web.sock"));
    let stream = connect(&guest, 7);
    let other = text
        .replace("cid: 3", "cid: 77")
        .replace("web.sock", "other.sock");
    let said = sidecar.reload(&other);
    assert!(
        said.contains("guest web: cid: 3 -> 77 (from the guest's next session on)"),
        "{said}"
    );
    assert!(said.contains("(needs a restart of the sidecar)"), "{said}");
    let state = sidecar.state();
    assert_eq!(state["guests"][0]["cid"], 3);
    assert_eq!(
        state["config"]["pending"].as_array().unwrap().len(),
        2,
        "{}",
        state["config"]
    );
    ping(&stream);
    ping(&connect(&guest, 7));
    drop((stream, guest));
    sidecar.until_metric("vsock_session_active", &[("guest", "web")], 0.0);
    let next = linux(&sidecar.path("web.sock"));
    assert_eq!(sidecar.state()["guests"][0]["cid"], 77);
    ping(&connect(&next, 7));
    let pending = sidecar.state()["config"]["pending"].clone();
    assert_eq!(pending.as_array().unwrap().len(), 1, "the socket: {pending}");
    assert_lawful(&next);
}

#[test]
fn a_session_may_be_required_for_readiness() {
    let text = |required: bool| format!("readiness: {{requireSession: {required}}}\n{}", web("", "", ""));
    let sidecar = Sidecar::start(&text(false));
    assert!(matches!(sidecar.try_get("/readyz"), Some((200, _))));
    sidecar.reload(&text(true));
    let (status, said) = sidecar.try_get("/readyz").unwrap();
    assert_eq!(status, 503);
    assert!(said.contains("readiness.requireSession"), "{said}");
    let _guest = linux(&sidecar.path("web.sock"));
    until("ready", || matches!(sidecar.try_get("/readyz"), Some((200, _))));
}
