//! What a dial holds of the process's descriptors, and until when.

use super::*;
use crate::quota::Pool;

fn request(target: &Target) -> DialRequest<'_> {
    DialRequest {
        target,
        socket_type: SocketType::Stream,
        first_port: 100,
        guest_port: 100,
        cid: 3,
        greeting: &[],
        timeout: LONG,
    }
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + LONG;
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

/// A guest that connects to a silent service and breaks off at once, in a loop, makes sockets on its device's thread, and the control
/// runtime closes them when it comes to it. The guest's connection is over meanwhile; were its descriptor given back with that, sockets
/// without end could be open, and nothing would be left for a probe or a VMM.
#[test]
fn a_dial_that_was_given_up_holds_its_descriptor_until_its_socket_is_closed() {
    let silent = silent("127.0.0.1", 0);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let dialer = Dialer::with_resolver(runtime.handle().clone(), Arc::new(Fixed(vec![silent.address])));
    let pool = Pool::new(Some(3));
    let target = tcp("127.0.0.1", silent.address.port());
    for _ in 0..3 {
        let descriptor = Share::take(&pool, 1);
        drop(dialer.dial(request(&target), descriptor, |_, _| panic!("it was given up")));
    }
    // The runtime has not run since.
    assert!(Share::take(&pool, 1).is_none(), "three sockets are open");
    runtime.block_on(tokio::task::yield_now());
    assert_eq!(pool.used(), 0);
}

/// The reserve of the process is for a few dials that try a second address, and not for all of a guest's at once: it need only connect to
/// a name whose servers are all down.
#[test]
fn a_dial_of_several_silent_addresses_takes_as_many_descriptors() {
    let first = silent("127.0.0.1", 0);
    let port = first.address.port();
    let others = ["127.0.0.2", "127.0.0.3"].map(|ip| silent(ip, port));
    let addresses = [first.address, others[0].address, others[1].address];
    let dials = Dials::resolving_to(&addresses);
    let pool = Pool::new(Some(4));
    let target = tcp("db", port);
    let dial = || {
        let descriptor = Share::take(&pool, 1);
        assert!(descriptor.is_some());
        dials.dialer.dial(request(&target), descriptor, |_, _| {})
    };
    let one = dial();
    until("three addresses are tried", || pool.used() == 3);
    let two = dial();
    assert_eq!(pool.used(), 4);
    // Nothing is left for its second address, until the first dial is given up.
    drop(one);
    until("its own addresses are tried", || pool.used() == 3);
    drop(two);
    until("all is given back", || pool.used() == 0);
}

/// An address that is dead gives its descriptor to the next.
#[test]
fn without_a_second_descriptor_addresses_are_tried_one_after_the_other() {
    let (listening, address) = listener("127.0.0.1:0");
    let dead = ["127.0.0.2", "127.0.0.3"].map(|ip| refusing(ip, address.port()));
    let dials = Dials::resolving_to(&[dead[0], dead[1], address]);
    let pool = Pool::new(Some(1));
    let target = tcp("db", address.port());
    let (_task, told) = start(&dials.dialer, request(&target), Share::take(&pool, 1));
    let stream = told.recv_timeout(LONG).unwrap().0.unwrap();
    assert_eq!(stream.peer(), address.to_string());
    listening.accept().unwrap();
    assert_eq!(pool.used(), 1, "the stream holds it");
    drop(stream);
    assert_eq!(pool.used(), 0);
}

#[test]
fn a_stream_of_a_dial_on_the_spot_holds_its_descriptor() {
    let (_listening, address) = listener("127.0.0.1:0");
    let dials = Dials::new();
    let pool = Pool::new(Some(1));
    let target = tcp("127.0.0.1", address.port());
    let dial = dials
        .dialer
        .dial(request(&target), Share::take(&pool, 1), |_, _| {
            panic!("it has ended")
        });
    let Dial::Ended(Ok(stream), _) = dial else {
        panic!("{dial:?}")
    };
    assert_eq!(pool.used(), 1);
    drop(stream);
    assert_eq!(pool.used(), 0);
}
