//! What a guest hears when the guest at the other end of its connection stops to read, or closes. Linux's own tests ask the
//! same (`tests/vsock_test`), and need two real guests for it.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use vsock_sidecar::embedded_guest::{GuestStream, Sockets};

use crate::support::*;

/// Two guests, and the two ends of a connection that the first one made.
struct Siblings {
    a: GuestStream,
    b: GuestStream,
    guests: [Sockets; 2],
    sidecar: Sidecar,
}

impl Siblings {
    fn connect() -> Siblings {
        let sidecar = Sidecar::start(
            "guests:\n\
             - name: a\n  cid: 3\n  vhostUser: {socket: \"{dir}/a.sock\"}\n  \
             outbound: [{name: to-b, ports: 1-65535, to: \"guest://b\"}]\n\
             - name: b\n  cid: 4\n  vhostUser: {socket: \"{dir}/b.sock\"}\n",
        );
        let guests = ["a.sock", "b.sock"].map(|socket| linux(&sidecar.path(socket)));
        let listener = guests[1].listen(5).unwrap();
        let a = guests[0].connect_to(4, 5).unwrap();
        let b = listener.accept_timeout(LONG).unwrap();
        for end in [&a, &b] {
            end.set_read_timeout(Some(LONG));
            end.set_write_timeout(Some(LONG));
        }
        Siblings {
            a,
            b,
            guests,
            sidecar,
        }
    }

    /// Packets of this kind that guest `b` got.
    fn b_got(&self, op: &str) -> f64 {
        let labels = [("guest", "b"), ("direction", "host_to_guest"), ("op", op)];
        self.sidecar.metric("vsock_packets_total", &labels)
    }

    fn assert_lawful(&self) {
        self.guests.iter().for_each(assert_lawful);
    }
}

#[track_caller]
fn assert_broken(stream: &GuestStream) {
    let broken = { stream }.write(b"x").unwrap_err();
    assert_eq!(broken.kind(), ErrorKind::BrokenPipe);
}

/// A socket pair would take the first byte and tell with the second one.
#[test]
fn the_first_write_fails_when_the_other_guest_has_stopped_to_read() {
    let mut pair = Siblings::connect();
    pair.a.shutdown(Shutdown::Read).unwrap();
    until("the other guest is told", || pair.b_got("shutdown") >= 1.0);
    assert_broken(&pair.b);
    assert_eq!(pair.b_got("credit_update") + pair.b_got("rst"), 0.0);

    // The other direction is none the worse for it.
    pair.a.write_all(b"and yet it speaks").unwrap();
    drop(pair.a.shutdown(Shutdown::Write));
    let mut said = String::new();
    pair.b.read_to_string(&mut said).unwrap();
    assert_eq!(said, "and yet it speaks");
    pair.assert_lawful();
}

#[test]
fn a_guest_that_closes_is_heard_of_before_the_end_of_its_bytes() {
    let mut pair = Siblings::connect();
    pair.a.write_all(b"last words").unwrap();
    drop(pair.a);
    let mut said = String::new();
    pair.b.read_to_string(&mut said).unwrap();
    assert_eq!(said, "last words");
    assert_broken(&pair.b);
    drop(pair.b);
    for guest in ["a", "b"] {
        let labels = [("guest", guest)];
        pair.sidecar
            .until_metric("vsock_connections_active", &labels, 0.0);
        // One said goodbye, the other heard it: nobody was reset.
        assert_eq!(
            pair.sidecar.metric(
                "vsock_connections_closed_total",
                &[("guest", guest), ("reason", "peer_rst")]
            ),
            0.0
        );
    }
    pair.guests.iter().for_each(assert_lawful);
}

/// A socket that is full wakes nobody when its reader gives up, unless somebody empties it.
#[test]
fn a_guest_that_waits_for_room_hears_that_there_will_be_none() {
    let pair = Siblings::connect();
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let piece = [7; 65536];
            loop {
                if let Err(error) = (&pair.b).write(&piece) {
                    break error.kind();
                }
            }
        });
        until("the socket between the devices is full", || {
            pair.sidecar.metric(
                "vsock_buffered_bytes",
                &[("guest", "b"), ("direction", "guest_to_host")],
            ) > 0.0
        });
        pair.a.shutdown(Shutdown::Read).unwrap();
        assert_eq!(writer.join().unwrap(), ErrorKind::BrokenPipe);
    });
    assert_eq!(pair.sidecar.metric("vsock_buffered_bytes", &[]), 0.0);
    pair.assert_lawful();
}

/// Both write and neither reads; then one closes. Its bytes were not all taken before the other stops writing, which it did not:
/// it was told nothing, and after half a minute the bytes were thrown away.
#[test]
fn a_guest_that_closes_while_both_wait_for_room_holds_up_nobody_and_loses_nothing() {
    let mut pair = Siblings::connect();
    let full = |guest: &str| {
        let labels = [("guest", guest), ("direction", "guest_to_host")];
        pair.sidecar.metric("vsock_buffered_bytes", &labels) > 0.0
    };
    let fill = |stream: &GuestStream| {
        stream.set_write_timeout(Some(Duration::from_millis(200)));
        let mut sent = 0;
        loop {
            match { stream }.write(&[7; 65536]) {
                Ok(n) => sent += n,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    break sent;
                }
            }
        }
    };
    let (sent, _) = (fill(&pair.a), fill(&pair.b));
    assert!(full("a") && full("b"));
    pair.b.set_write_timeout(Some(LONG / 2));
    drop(pair.a);
    let error = pair.b.write(&[7; 65536]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    let mut received = Vec::new();
    pair.b.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), sent);
    drop(pair.b);
    pair.sidecar.until_metric("vsock_connections_active", &[], 0.0);
    let labels = [("guest", "a"), ("reason", "guest_shutdown")];
    assert_eq!(
        pair.sidecar.metric("vsock_connections_closed_total", &labels),
        1.0
    );
    pair.guests.iter().for_each(assert_lawful);
}
