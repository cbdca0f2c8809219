//! Clients that want more than their share: others are answered all the same.

use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Socket, Type};

use super::*;

const LIVEZ: &str = "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n";
const STATE: &str = "GET /state HTTP/1.1\r\nhost: x\r\n\r\n";

/// A client that comes from another address of loopback, as another pod would come from another address.
fn from(server: &Server, ip: [u8; 4]) -> Client<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::new(IpAddr::from(ip), 0).into()).unwrap();
    socket.connect(&server.tcp.into()).unwrap();
    let stream: TcpStream = socket.into();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
    Client::new(stream)
}

/// Whether a request on a connection of its own is answered with 200.
fn is_answered<S: Read + Write>(mut client: Client<S>) -> bool {
    // A refused client may find its socket closed at any step.
    let _ = client.stream.write_all(LIVEZ.as_bytes());
    loop {
        match client.read() {
            Ok(read) if read > 0 && client.buffer.len() < 12 => {}
            _ => return client.buffer.starts_with(b"HTTP/1.1 200"),
        }
    }
}

/// All places are taken by clients that ask and never read. The time for a response, which they would have for themselves, is far
/// longer than a scraper's patience.
#[test]
fn clients_that_ask_and_never_read_make_room_for_one_that_reads() {
    let server = Server::start(Limits {
        connections: 8,
        response: LONG * 10,
        stall: Duration::from_millis(50),
        ..Limits::default()
    });
    // More than the buffers of a unix socket hold.
    *server.program.padding.lock().unwrap() = "x".repeat(1 << 20);
    let lazy: Vec<_> = (0..8)
        .map(|_| {
            let mut client = server.unix();
            client.stream.write_all(STATE.repeat(5).as_bytes()).unwrap();
            assert_ne!(client.read().unwrap(), 0, "the response begins");
            client
        })
        .collect();
    for _ in 0..3 {
        eventually("somebody else is answered", || is_answered(server.unix()));
    }
    drop(lazy);
}

/// One address has all places, with clients that take what they ask for and are never idle. Whoever comes from another
/// address finds a place, and those that made room are of the one that has most.
#[test]
fn whoever_has_most_places_makes_room_for_one_who_has_none() {
    let server = Server::start(Limits {
        connections: 8,
        answer: LONG,
        response: LONG * 10,
        ..Limits::default()
    });
    server.program.state_hangs.store(true, Ordering::SeqCst);
    let mut greedy: Vec<_> = (0..8).map(|_| from(&server, [127, 0, 0, 2])).collect();
    for client in &mut greedy {
        // The first answer shows that the second request is in the server's hands.
        client
            .stream
            .write_all(format!("{LIVEZ}{STATE}").as_bytes())
            .unwrap();
        assert_eq!(client.reply(false).status, 200);
    }
    let refused = from(&server, [127, 0, 0, 2]).reply(false);
    assert_eq!(refused.status, 503, "it has its share");
    assert!(is_answered(from(&server, [127, 0, 0, 3])));
    greedy[0].closed();
    // Until shares are even.
    let mut modest: Vec<_> = (0..4).map(|_| from(&server, [127, 0, 0, 4])).collect();
    for client in &mut modest {
        client
            .stream
            .write_all(format!("{LIVEZ}{STATE}").as_bytes())
            .unwrap();
        assert_eq!(client.reply(false).status, 200);
    }
    let refused = from(&server, [127, 0, 0, 4]).reply(false);
    assert_eq!(refused.status, 503, "four of eight are a fair share");
}

/// Prometheus keeps its connection between scrapes, and is the one that has been silent longest then.
#[test]
fn who_has_one_place_keeps_it_whatever_comes_from_elsewhere() {
    let server = Server::start(Limits {
        connections: 8,
        ..Limits::default()
    });
    let mut scraper = from(&server, [127, 0, 0, 3]);
    assert_eq!(scraper.ask(LIVEZ).status, 200);
    let flood: Vec<_> = (0..40)
        .map(|_| {
            let mut client = from(&server, [127, 0, 0, 2]);
            assert_eq!(client.ask(LIVEZ).status, 200);
            client
        })
        .collect();
    assert_eq!(scraper.ask(LIVEZ).status, 200);
    drop(flood);
}

/// While many clients have the server work without end, a probe over the other socket is answered.
#[test]
fn a_flood_of_pipelined_requests_leaves_probes_their_turn() {
    let server = Server::start(Limits {
        connections: 32,
        ..Limits::default()
    });
    // What an answer costs: this much text is made and written for each.
    *server.program.padding.lock().unwrap() = "x".repeat(100_000);
    let (done, answered) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let (server, done, answered) = (&server, &done, &answered);
        for _ in 0..32 {
            scope.spawn(move || {
                let client = server.tcp();
                let (mut asks, mut reads) = (client.stream.try_clone().unwrap(), client.stream);
                reads.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
                asks.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
                let mut buffer = vec![0; 1 << 20];
                // What was written in part goes on where it ended, or it would be no request any more.
                let (requests, mut at) = (STATE.repeat(100), 0);
                while !done.load(Ordering::Relaxed) {
                    if let Ok(written) = asks.write(&requests.as_bytes()[at..]) {
                        at = (at + written) % requests.len();
                    }
                    if reads.read(&mut buffer).is_ok_and(|read| read > 0) {
                        answered.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
        eventually("the flood runs", || answered.load(Ordering::Relaxed));
        for _ in 0..20 {
            assert_eq!(server.unix().ask(LIVEZ).status, 200);
        }
        done.store(true, Ordering::Relaxed);
    });
}
