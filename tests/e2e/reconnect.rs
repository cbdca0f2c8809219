//! The VMM's comings and goings: reboot, kill, a second one, several guests, memory that changes.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vsock_sidecar::embedded_guest::profile::protocol_feature;
use vsock_sidecar::embedded_guest::{
    DriverOptions, EmbeddedGuest, FrontEnd, GuestStream, Profile, SocketOptions, Sockets,
};

use crate::support::*;

fn one_guest(rules: &str) -> Sidecar {
    Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound: [{rules}]\n"
    ))
}

#[track_caller]
fn ping(stream: &GuestStream) {
    let mut stream = stream;
    stream.set_read_timeout(Some(LONG));
    stream.write_all(b"ping").unwrap();
    let mut pong = [0; 4];
    stream.read_exact(&mut pong).unwrap();
    assert_eq!(&pong, b"ping");
}

#[test]
fn a_reboot_ends_host_connections_at_once_and_the_guest_is_served_again() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let sidecar = one_guest(&format!(
        "{{name: service, port: 7, to: \"tcp://{}\"}}",
        listener.local_addr().unwrap()
    ));
    let guest = linux(&sidecar.path("web.sock"));
    for round in 0..20 {
        let streams: Vec<_> = (0..5).map(|_| guest.connect(7).unwrap()).collect();
        let mut ends: Vec<_> = (0..5).map(|_| accept_tcp(&listener)).collect();
        (&streams[0]).write_all(b"last words").unwrap();
        let mut words = [0; 10];
        ends[0].read_exact(&mut words).unwrap();

        guest.reboot().unwrap();
        for end in ends {
            read_to_end(&end);
        }
        drop(streams);
        let labels = [("reason", "session_lost")];
        sidecar.until_metric(
            "vsock_connections_closed_total",
            &labels,
            5.0 * f64::from(round + 1),
        );
    }
    let stream = guest.connect(7).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| echo(accept_tcp(&listener)));
        ping(&stream);
        drop(stream);
    });
    assert_eq!(
        sidecar.metric("vsock_sessions_total", &[]),
        1.0,
        "one VMM all the time"
    );
    assert_lawful(&guest);
}

/// Resources of the process after it has come to rest.
fn at_rest(sidecar: &Sidecar) -> (usize, usize) {
    sidecar.until_metric("vsock_session_active", &[], 0.0);
    sidecar.until_metric("vsock_connections_active", &[], 0.0);
    let mut last = (0, 0);
    until("descriptors and threads come to rest", || {
        let now = (sidecar.descriptors(), sidecar.threads());
        std::mem::replace(&mut last, now) == now
    });
    last
}

#[test]
fn fifty_vmms_killed_amid_transfers_leave_nothing_behind() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let sidecar = one_guest(&format!(
        "{{name: service, port: 7, to: \"tcp://{}\"}}",
        listener.local_addr().unwrap()
    ));
    let mut first = None;
    for round in 0..50u64 {
        let options = DriverOptions {
            memory: 64 << 20,
            ..DriverOptions::default()
        };
        let guest = Arc::new(guest(
            &sidecar.path("web.sock"),
            Profile::qemu(),
            options,
            SocketOptions::default(),
        ));
        let (up, down) = (guest.connect(7).unwrap(), guest.connect(7).unwrap());
        let (mut reader, mut feeder) = (accept_tcp(&listener), accept_tcp(&listener));
        let reading = thread::spawn(move || {
            let mut total = 0u64;
            let mut chunk = vec![0; 65536];
            while let Ok(n @ 1..) = reader.read(&mut chunk) {
                total += n as u64;
            }
            total
        });
        let feeding = thread::spawn(move || {
            let chunk = vec![7; 65536];
            while feeder.write_all(&chunk).is_ok() {}
        });
        let writing = thread::spawn(move || Bytes::new(round).write_to(&up, u64::MAX / 2).unwrap_err());
        // Both directions are at work when the VMM dies.
        let mut some = vec![0; 200_000];
        (&down).read_exact(&mut some).unwrap();
        let killed = Instant::now();
        guest.kill();
        drop(down);
        writing.join().unwrap();
        reading.join().unwrap();
        feeding.join().unwrap();
        assert!(
            killed.elapsed() < Duration::from_secs(10),
            "host sockets close at once"
        );
        drop(guest);
        if round == 4 {
            first = Some(at_rest(&sidecar));
        }
    }
    let (descriptors, threads) = at_rest(&sidecar);
    let (first_descriptors, first_threads) = first.unwrap();
    // TCP ends may linger for a moment after each other.
    assert!(
        descriptors <= first_descriptors + 4,
        "{first_descriptors} then {descriptors} descriptors"
    );
    assert_eq!(threads, first_threads, "threads");
    assert_eq!(sidecar.metric("vsock_sessions_total", &[]), 50.0);
    let odd: Vec<_> = sidecar
        .events("connection ended")
        .into_iter()
        .filter(|event| field(event, "reason") != "session_lost")
        .collect();
    assert!(odd.is_empty(), "{odd:#?}");
    assert_eq!(
        sidecar.metric("vsock_connections_closed_total", &[("reason", "session_lost")]),
        100.0
    );
    assert_eq!(sidecar.metric("vsock_buffered_bytes", &[]), 0.0);
}

#[test]
fn a_second_vmm_is_refused_while_the_first_works() {
    let port = serve(echo);
    let sidecar = one_guest(&format!(
        "{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}"
    ));
    let path = sidecar.path("web.sock");
    let first = linux(&path);
    let stream = first.connect(7).unwrap();
    for _ in 0..3 {
        let second = FrontEnd::connect(&path, Profile::qemu()).unwrap();
        second.wait_closed(LONG).unwrap();
        ping(&stream);
    }
    drop(stream);
    first.shut_down().unwrap();
    sidecar.until_metric("vsock_session_active", &[], 0.0);
    let next = linux(&path);
    ping(&next.connect(7).unwrap());
    assert_eq!(sidecar.metric("vsock_sessions_total", &[]), 2.0);
}

#[test]
fn who_connects_and_leaves_without_a_word_is_harmless() {
    let port = serve(echo);
    let sidecar = one_guest(&format!(
        "{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}"
    ));
    let path = sidecar.path("web.sock");
    for _ in 0..30 {
        drop(UnixStream::connect(&path).unwrap());
    }
    // Half a header, garbage, a message and no more.
    for bytes in [&b"\x01\0\0\0\x01"[..], &[0xff; 40], b"GET / HTTP/1.1\r\n\r\n"] {
        let mut rude = UnixStream::connect(&path).unwrap();
        let _ = rude.write_all(bytes);
        drop(rude);
    }
    // The last of them may still be served for a moment: then the next is refused, as a VMM that is one too many.
    until("a VMM is served again", || {
        let booted = EmbeddedGuest::boot(&path, Profile::qemu(), DriverOptions::default());
        let Ok(booted) = booted else { return false };
        let guest = Sockets::start(booted, SocketOptions::default()).unwrap();
        ping(&guest.connect(7).unwrap());
        true
    });
}

#[test]
fn in_client_mode_we_connect_to_the_vmm_again_and_again() {
    let port = serve(echo);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmm.sock");
    let configuration = format!(
        "guests:\n- name: web\n  cid: 9\n  vhostUser: {{socket: \"{}\", mode: client}}\n  \
         outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n",
        path.display()
    );
    // The VMM comes later than the sidecar.
    let sidecar = Sidecar::start(&configuration);
    let listener = UnixListener::bind(&path).unwrap();
    for _ in 0..3 {
        let front_end = FrontEnd::accept(&listener, Profile::qemu(), LONG).unwrap();
        let booted = EmbeddedGuest::boot_with(front_end, DriverOptions::default()).unwrap();
        assert_eq!(booted.cid(), 9);
        assert!(
            !booted.front_end.has(protocol_feature::CONFIGURE_MEM_SLOTS),
            "a QEMU that listens would not repeat them"
        );
        let guest = Sockets::start(booted, SocketOptions::default()).unwrap();
        ping(&guest.connect(7).unwrap());
        guest.kill();
    }
    sidecar.until_metric("vsock_connections_active", &[], 0.0);
}

fn median(mut of: Vec<Duration>) -> Duration {
    of.sort();
    of[of.len() / 2]
}

#[test]
fn a_flood_of_one_guest_leaves_the_others_round_trips_alone() {
    let port = serve(echo);
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: loud\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/loud.sock\"}}\n  \
         outbound: [{{name: sink, port: 7, to: \"unix://{{dir}}/sink.sock\"}}]\n\
         - name: quiet\n  cid: 4\n  vhostUser: {{socket: \"{{dir}}/quiet.sock\"}}\n  \
         outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n"
    ));
    let sink = UnixListener::bind(sidecar.path("sink.sock")).unwrap();
    let loud = linux(&sidecar.path("loud.sock"));
    let quiet = linux(&sidecar.path("quiet.sock"));
    assert_eq!(loud.with_front_end(|f| f.unwrap().negotiated().guest_cid), 3);
    assert_eq!(quiet.with_front_end(|f| f.unwrap().negotiated().guest_cid), 4);
    let stream = quiet.connect(7).unwrap();
    let round_trips = |count: usize| {
        let times = (0..count).map(|_| {
            let started = Instant::now();
            ping(&stream);
            started.elapsed()
        });
        median(times.collect())
    };
    let alone = round_trips(200);

    let flood = loud.connect(7).unwrap();
    let mut end = accept_unix(&sink);
    let over = AtomicBool::new(false);
    let flooded = thread::scope(|scope| {
        scope.spawn(|| {
            let chunk = vec![0; 65536];
            while !over.load(Ordering::Relaxed) {
                (&flood).write_all(&chunk).unwrap();
            }
            flood.shutdown(std::net::Shutdown::Write).unwrap();
        });
        scope.spawn(|| {
            let mut chunk = vec![0; 65536];
            while end.read(&mut chunk).unwrap() > 0 {}
        });
        until("the flood flows", || {
            sidecar.metric("vsock_payload_bytes_total", &[("guest", "loud")]) > 1e6
        });
        let flooded = round_trips(200);
        over.store(true, Ordering::Relaxed);
        flooded
    });
    println!("round trip {alone:?} alone, {flooded:?} beside a flood");
    // There are fewer processors than busy threads: the scheduler's share is not ours.
    assert!(
        flooded < alone * 30 + Duration::from_millis(20),
        "{alone:?} alone, {flooded:?} beside a flood"
    );
    assert_eq!(sidecar.metric("vsock_misbehavior_total", &[]), 0.0);
    loud.kill();
    ping(&stream);
    assert_lawful(&quiet);
}

/// Memory comes and goes while data flows, once by slots and once by whole tables.
#[test]
fn memory_changes_amid_a_transfer_lose_nothing() {
    let port = serve(echo);
    let sidecar = one_guest(&format!(
        "{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}"
    ));
    let by_table = Profile::qemu().without_protocol(protocol_feature::CONFIGURE_MEM_SLOTS);
    for (what, profile) in [("slots", Profile::qemu()), ("tables", by_table)] {
        println!("{what}");
        let guest = guest(
            &sidecar.path("web.sock"),
            profile,
            DriverOptions::default(),
            SocketOptions::default(),
        );
        let stream = guest.connect(7).unwrap();
        stream.set_read_timeout(Some(LONG));
        const LEN: u64 = 4 << 20;
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| Bytes::new(8).write_to(&stream, LEN).unwrap());
            scope.spawn(|| {
                let mut rounds = 0;
                while !over.load(Ordering::Relaxed) || rounds == 0 {
                    rounds += 1;
                    let region = guest
                        .with_driver(|driver| driver.memory_mut().add_region(0x2_0000_0000, 16 << 20))
                        .unwrap();
                    let told = |act: &mut dyn FnMut(&mut FrontEnd)| guest.with_front_end(|f| act(f.unwrap()));
                    let regions = || guest.with_driver(|driver| driver.memory().regions().to_vec());
                    if what == "slots" {
                        told(&mut |f| f.add_mem_reg(&region).unwrap());
                    } else {
                        told(&mut |f| f.set_mem_table(&regions()).unwrap());
                    }
                    guest.with_driver(|driver| driver.memory_mut().remove_region(0x2_0000_0000));
                    if what == "slots" {
                        told(&mut |f| f.rem_mem_reg(&region).unwrap());
                    } else {
                        told(&mut |f| f.set_mem_table(&regions()).unwrap());
                    }
                }
                println!("{rounds} rounds");
            });
            Bytes::new(8).expect_from(&stream, LEN);
            over.store(true, Ordering::Relaxed);
        });
        drop(stream);
        until("the connection is over", || guest.open_connections() == 0);
        assert_lawful(&guest);
        guest.shut_down().unwrap();
        sidecar.until_metric("vsock_session_active", &[], 0.0);
    }
    assert!(sidecar.metric("vsock_memory_map_changes_total", &[("op", "add")]) >= 2.0);
    assert!(sidecar.metric("vsock_memory_map_changes_total", &[("op", "set_table")]) >= 3.0);
}

/// Pause and resume, as for a snapshot: the rings go on where they stopped; connections do not live through it, since a
/// stopped ring cannot be told from a reset one.
#[test]
fn rings_that_stop_and_go_on_lose_no_receive_buffer() {
    let port = serve(echo);
    let sidecar = one_guest(&format!(
        "{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}"
    ));
    let guest = linux(&sidecar.path("web.sock"));
    for round in 0..30 {
        let stream = guest.connect(7).unwrap();
        ping(&stream);
        stream.abort();
        let posted = guest.with_driver(|driver| driver.rx_posted());
        let bases = guest.with_front_end(|f| f.unwrap().stop(2)).unwrap();
        guest.with_driver(|driver| {
            guest.with_front_end(|f| {
                let f = f.unwrap();
                f.start(driver.memory(), &driver.rings(2, &bases)).unwrap();
            });
        });
        assert!(posted > 0, "round {round}");
    }
    // More data than one ring's worth of buffers shows that all of them are still in use.
    let stream = guest.connect(7).unwrap();
    stream.set_read_timeout(Some(LONG));
    thread::scope(|scope| {
        scope.spawn(|| Bytes::new(1).write_to(&stream, 2 << 20).unwrap());
        Bytes::new(1).expect_from(&stream, 2 << 20);
    });
    assert!(
        guest.stats().violations.is_empty(),
        "{:?}",
        guest.stats().violations
    );
}
