//! Looking for the guest's next packet instead of being told of it.

use std::io::{Read, Write};
use std::time::Instant;

use crate::support::*;

fn sidecar(limits: &str) -> Sidecar {
    let port = serve(echo);
    Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  limits: {{{limits}}}\n  \
         outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n"
    ))
}

/// Asks and is answered, a hundred times.
fn converse(stream: &vsock_sidecar::embedded_guest::GuestStream) {
    for round in 0..100u8 {
        (&*stream).write_all(&[round]).unwrap();
        let mut answer = [0];
        (&*stream).read_exact(&mut answer).unwrap();
        assert_eq!(answer, [round]);
    }
}

fn looks(sidecar: &Sidecar, result: &str) -> f64 {
    sidecar.metric("vsock_busy_polls_total", &[("result", result)])
}

#[test]
fn a_guest_that_answers_at_once_is_looked_for_and_an_idle_one_is_not() {
    let sidecar = sidecar("busyPoll: 1ms");
    let guest = linux(&sidecar.path("web.sock"));
    let stream = guest.connect(7).unwrap();
    stream.set_read_timeout(Some(LONG));
    let deadline = Instant::now() + LONG;
    while looks(&sidecar, "hit") < 20.0 {
        assert!(
            Instant::now() < deadline,
            "{} hits, {} misses",
            looks(&sidecar, "hit"),
            looks(&sidecar, "miss")
        );
        converse(&stream);
    }
    assert!(sidecar.metric("vsock_busy_poll_seconds_total", &[]) > 0.0);
    // A look for what did not come is the last one: nothing is given to a guest that is silent.
    let still = |result| {
        let before = looks(&sidecar, result);
        sidecar.get("/state");
        looks(&sidecar, result) == before
    };
    until("it is silent", || still("hit") && still("miss"));
    // It was told of packets for which no notification came: none was lost.
    converse(&stream);
}

#[test]
fn nobody_looks_who_was_not_asked_to() {
    let sidecar = sidecar("");
    let guest = linux(&sidecar.path("web.sock"));
    let stream = guest.connect(7).unwrap();
    stream.set_read_timeout(Some(LONG));
    converse(&stream);
    assert_eq!((looks(&sidecar, "hit"), looks(&sidecar, "miss")), (0.0, 0.0));
}
