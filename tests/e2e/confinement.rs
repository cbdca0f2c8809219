//! The program confines itself: what others can see of it, and that it says so. What is refused is in `tests/confinement.rs`.

use crate::support::*;

const GUEST: &str = "guests: [{name: web, cid: 3, vhostUser: {socket: \"{dir}/web.sock\"}, \
                     outbound: [{port: 1, to: \"tcp://localhost:1\"}]}]\n";

/// Values of a field of `/proc/PID/task/*/status`, one a thread.
fn of_threads(sidecar: &Sidecar, field: &str) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", sidecar.pid())).unwrap();
    tasks
        .map(|task| {
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
            line.trim_start_matches(':').trim().to_owned()
        })
        .collect()
}

/// In the words of proc_pid_status(5): 2 is SECCOMP_MODE_FILTER.
#[test]
fn every_thread_is_confined_and_the_state_says_so() {
    let sidecar = Sidecar::start(GUEST);
    let threads = of_threads(&sidecar, "Seccomp");
    assert!(
        threads.len() >= 5,
        "log, control, device, session, admin: {threads:?}"
    );
    assert!(threads.iter().all(|mode| mode == "2"), "{threads:?}");
    let privileges = of_threads(&sidecar, "NoNewPrivs");
    assert!(
        privileges.iter().all(|given_up| given_up == "1"),
        "{privileges:?}"
    );

    let state = &sidecar.state()["confinement"];
    assert_eq!(state["noNewPrivileges"]["state"], "active");
    assert_eq!(state["seccomp"]["state"], "active");
    assert_eq!(state["seccomp"]["mode"], "enforce");
    for kind in ["no_new_privs", "seccomp"] {
        assert_eq!(sidecar.metric("vsock_confinement", &[("kind", kind)]), 1.0);
    }
    let landlock = f64::from(u8::from(state["landlock"]["state"] == "active"));
    assert_eq!(
        sidecar.metric("vsock_confinement", &[("kind", "landlock")]),
        landlock
    );
    assert_eq!(sidecar.metric("vsock_refused_system_calls_total", &[]), 0.0);
    assert_eq!(sidecar.logged("the process is confined", |_| true).len(), 1);
}

#[test]
fn a_sidecar_that_shall_not_be_confined_is_not() {
    let off = "confinement: {noNewPrivileges: false, seccomp: off, landlock: off}\n";
    let sidecar = Sidecar::start(&format!("{off}{GUEST}"));
    // Whoever started the test may have given up something for all of its children.
    let ours = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        let line = ours.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_start_matches(':').trim().to_owned()
    };
    for name in ["Seccomp", "NoNewPrivs"] {
        assert!(
            of_threads(&sidecar, name).iter().all(|is| *is == field(name)),
            "{name}"
        );
    }
    for kind in ["no_new_privs", "seccomp", "landlock"] {
        assert_eq!(sidecar.metric("vsock_confinement", &[("kind", kind)]), 0.0);
    }
    assert_eq!(sidecar.state()["confinement"]["landlock"]["state"], "off");
}
