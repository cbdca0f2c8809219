//! The admin server through its sockets: what a kubelet, a Prometheus, a person with curl and a stranger see.

#[path = "admin/capture.rs"]
mod capture;
#[path = "admin/crowd.rs"]
mod crowd;
#[path = "admin/local.rs"]
mod local;

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use vsock_sidecar::admin::{
    Admin, AdminHandle, AdminServer, Answer, CaptureRefused, CaptureRequest, Check, Chunks, Limits, ROUTES,
    Readiness, Source,
};
use vsock_sidecar::config::ListenAddress;
use vsock_sidecar::drain::Drain;

/// Longer than anything here takes, shorter than a CI job's patience.
const LONG: Duration = Duration::from_secs(20);

/// A program behind the admin server.
#[derive(Default)]
struct Program {
    live: Mutex<Vec<Check>>,
    ready: Mutex<Vec<Check>>,
    state_hangs: AtomicBool,
    live_hangs: AtomicBool,
    state_panics: AtomicBool,
    metrics_fail: AtomicBool,
    drained: AtomicBool,
    padding: Mutex<String>,
    captures: capture::Captures,
}

impl Source for Program {
    fn metrics(&self) -> Result<String, String> {
        match self.metrics_fail.load(Ordering::SeqCst) {
            false => Ok("# HELP up Up.\n# TYPE up gauge\nup 1\n".to_owned()),
            true => Err("a collector failed".to_owned()),
        }
    }

    fn state(&self) -> Answer<'_, serde_json::Value> {
        assert!(!self.state_panics.load(Ordering::SeqCst), "as a test");
        let state = json!({ "guests": [{ "name": "web" }], "padding": *self.padding.lock().unwrap() });
        let hangs = self.state_hangs.load(Ordering::SeqCst);
        Box::pin(async move {
            if hangs {
                std::future::pending::<()>().await;
            }
            state
        })
    }

    fn live(&self) -> Answer<'_, Vec<Check>> {
        let (checks, hangs) = (
            self.live.lock().unwrap().clone(),
            self.live_hangs.load(Ordering::SeqCst),
        );
        Box::pin(async move {
            if hangs {
                std::future::pending::<()>().await;
            }
            checks
        })
    }

    fn ready(&self) -> Vec<Check> {
        self.ready.lock().unwrap().clone()
    }

    fn begin_drain(&self) {
        self.drained.store(true, Ordering::SeqCst);
    }

    fn capture(&self, request: CaptureRequest) -> Answer<'_, Result<Box<dyn Chunks>, CaptureRefused>> {
        Box::pin(async move { self.captures.begin(request) })
    }
}

/// A server on a TCP port and a unix socket.
struct Server {
    program: Arc<Program>,
    startup: Readiness,
    ready: Readiness,
    drain: Drain,
    tcp: SocketAddr,
    unix: PathBuf,
    handle: Option<AdminHandle>,
    _dir: tempfile::TempDir,
}

impl Server {
    fn start(limits: Limits) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let unix = dir.path().join("admin.sock");
        let addresses = [
            ListenAddress::Tcp((Ipv4Addr::LOCALHOST, 0).into()),
            ListenAddress::Unix(unix.clone()),
        ];
        let server = AdminServer::bind(&addresses).unwrap().with_limits(limits);
        let ListenAddress::Tcp(tcp) = server.addresses()[0] else {
            panic!("the first address is TCP")
        };
        let (program, startup, ready, drain) = (
            Arc::new(Program::default()),
            Readiness::new(),
            Readiness::new(),
            Drain::new(),
        );
        let admin = Admin {
            source: program.clone(),
            startup: startup.clone(),
            ready: ready.clone(),
            drain: drain.watch(),
        };
        let handle = Some(server.spawn(admin).unwrap());
        Server {
            program,
            startup,
            ready,
            drain,
            tcp,
            unix,
            handle,
            _dir: dir,
        }
    }

    fn tcp(&self) -> Client<TcpStream> {
        let stream = TcpStream::connect(self.tcp).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.set_write_timeout(Some(LONG)).unwrap();
        Client::new(stream)
    }

    fn unix(&self) -> Client<UnixStream> {
        let stream = UnixStream::connect(&self.unix).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        Client::new(stream)
    }

    fn get(&self, path: &str) -> Reply {
        self.tcp().ask(&format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n"))
    }
}

struct Client<S> {
    stream: S,
    /// Read and not yet part of a reply.
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct Reply {
    status: u16,
    /// In lower case.
    head: String,
    body: String,
}

impl Reply {
    fn field(&self, name: &str) -> Option<&str> {
        self.head
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }
}

impl<S: Read + Write> Client<S> {
    fn new(stream: S) -> Client<S> {
        Client {
            stream,
            buffer: Vec::new(),
        }
    }

    fn ask(&mut self, request: &str) -> Reply {
        self.stream.write_all(request.as_bytes()).unwrap();
        self.reply(request.starts_with("HEAD"))
    }

    fn reply(&mut self, to_head: bool) -> Reply {
        let end = loop {
            if let Some(end) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break end;
            }
            assert_ne!(
                self.read().unwrap(),
                0,
                "closed in a head: {:?}",
                String::from_utf8_lossy(&self.buffer)
            );
        };
        let head = String::from_utf8(self.buffer.drain(..end + 4).collect())
            .unwrap()
            .to_lowercase();
        let mut reply = Reply {
            status: head.split(' ').nth(1).unwrap().parse().unwrap(),
            head,
            body: String::new(),
        };
        let length: usize = reply.field("content-length").expect("a length").parse().unwrap();
        if !to_head {
            while self.buffer.len() < length {
                assert_ne!(self.read().unwrap(), 0, "closed in a body");
            }
            reply.body = String::from_utf8(self.buffer.drain(..length).collect()).unwrap();
        }
        reply
    }

    fn read(&mut self) -> io::Result<usize> {
        let mut bytes = [0; 4096];
        let read = self.stream.read(&mut bytes)?;
        self.buffer.extend_from_slice(&bytes[..read]);
        Ok(read)
    }

    /// Waits until the server has closed; fails after the read time-out.
    fn closed(&mut self) {
        loop {
            match self.read() {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return,
                Err(error) => panic!("still open: {error}"),
            }
        }
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn every_route_answers_get_and_head_on_tcp_and_on_the_unix_socket() {
    let server = Server::start(Limits::default());
    let types = [
        ("/", "text/plain; charset=utf-8"),
        ("/metrics", "text/plain; version=0.0.4; charset=utf-8"),
        ("/livez", "text/plain; charset=utf-8"),
        ("/readyz", "text/plain; charset=utf-8"),
        ("/startupz", "text/plain; charset=utf-8"),
        ("/state", "application/json"),
    ];
    // A capture has no length: it has tests of its own.
    let whole = ROUTES
        .iter()
        .map(|(path, _)| *path)
        .filter(|path| *path != "/capture");
    assert!(whole.eq(types.map(|(path, _)| path)));
    let (mut tcp, mut unix) = (server.tcp(), server.unix());
    for (path, content_type) in types {
        let get = format!("GET {path}?x=1 HTTP/1.1\r\nhost: x\r\n\r\n");
        let head = format!("HEAD {path} HTTP/1.1\r\nhost: x\r\n\r\n");
        for (got, headed) in [(tcp.ask(&get), tcp.ask(&head)), (unix.ask(&get), unix.ask(&head))] {
            assert_eq!((got.status, headed.status), (200, 200), "{path}");
            assert_eq!(got.field("content-type"), Some(content_type));
            assert_eq!(got.field("cache-control"), Some("no-store"));
            assert!(!got.body.is_empty());
            assert_eq!(
                headed.field("content-length"),
                Some(got.body.len().to_string().as_str()),
                "{path}"
            );
        }
    }
    assert!(server.get("/metrics").body.contains("\nup 1\n"));
    let state: serde_json::Value = serde_json::from_str(&server.get("/state").body).unwrap();
    assert_eq!(state["guests"][0]["name"], "web");
}

#[test]
fn what_is_not_there_is_answered_with_what_is() {
    let server = Server::start(Limits::default());
    let reply = server.get("/healthz");
    assert_eq!(reply.status, 404);
    for (path, _) in ROUTES {
        assert!(reply.body.contains(path), "{}", reply.body);
    }
    for method in ["POST", "DELETE", "OPTIONS", "BREW"] {
        let reply = server.tcp().ask(&format!(
            "{method} /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
        ));
        assert_eq!(
            (reply.status, reply.field("allow")),
            (405, Some("get, head")),
            "{method}"
        );
    }
}

#[test]
fn startup_and_readiness_wait_for_their_latches_and_say_for_which() {
    let server = Server::start(Limits::default());
    let socket = server.startup.latch("guest web: vhost-user socket");
    let session = server.ready.latch("guest web: session");

    let startup = server.get("/startupz");
    assert_eq!(startup.status, 503);
    assert_eq!(
        startup.body,
        "[-]guest web: vhost-user socket failed: not yet\nstartupz check failed\n"
    );
    assert_eq!(server.get("/readyz").status, 503);
    assert_eq!(server.get("/livez").status, 200, "liveness waits for nothing");

    drop(socket);
    assert_eq!(server.get("/startupz").status, 200);
    let ready = server.get("/readyz");
    assert_eq!(ready.status, 503);
    assert!(
        ready.body.contains("[+]guest web: vhost-user socket ok\n"),
        "{}",
        ready.body
    );
    assert!(
        ready.body.contains("[-]guest web: session failed: not yet\n"),
        "{}",
        ready.body
    );

    drop(session);
    assert_eq!(server.get("/readyz").status, 200);
}

/// A pod that drains gets no new clients, and must not be killed before its time.
#[test]
fn a_drain_ends_readiness_and_not_liveness() {
    let server = Server::start(Limits::default());
    assert_eq!(server.get("/readyz").status, 200);
    server.drain.begin();
    let ready = server.get("/readyz");
    assert_eq!(
        (ready.status, ready.body.as_str()),
        (503, "[-]drain failed: shutting down\nreadyz check failed\n")
    );
    assert_eq!(server.get("/livez").status, 200);
    assert_eq!(server.get("/startupz").status, 200);
}

/// What was ready may cease to be: a guest whose VMM does not do what its configuration demands.
#[test]
fn readiness_goes_and_comes_back_with_what_the_guests_say() {
    let server = Server::start(Limits::default());
    let guest = "vsock of guest web";
    *server.program.ready.lock().unwrap() = vec![
        Check::failed(guest, "no backend channel"),
        Check::ok("vsock of guest db"),
    ];
    let ready = server.get("/readyz");
    assert_eq!(
        (ready.status, ready.body.as_str()),
        (
            503,
            "[-]vsock of guest web failed: no backend channel\n[+]vsock of guest db ok\nreadyz check failed\n"
        )
    );
    assert_eq!(server.get("/livez").status, 200, "a restart would not mend it");
    assert_eq!(server.get("/startupz").status, 200);
    *server.program.ready.lock().unwrap() = vec![Check::ok(guest)];
    let ready = server.get("/readyz");
    assert_eq!(
        (ready.status, ready.body.as_str()),
        (200, "[+]vsock of guest web ok\nreadyz check passed\n")
    );
}

#[test]
fn liveness_names_the_thread_that_hangs() {
    let server = Server::start(Limits {
        answer: Duration::from_millis(50),
        ..Limits::default()
    });
    *server.program.live.lock().unwrap() = vec![
        Check::ok("guest db"),
        Check::failed("guest web", "no answer for 5 s"),
    ];
    let reply = server.get("/livez");
    assert_eq!(reply.status, 503);
    assert_eq!(
        reply.body,
        "[+]guest db ok\n[-]guest web failed: no answer for 5 s\nlivez check failed\n"
    );

    server.program.live_hangs.store(true, Ordering::SeqCst);
    let reply = server.get("/livez");
    assert_eq!(reply.status, 503);
    assert_eq!(
        reply.body,
        "[-]device threads failed: no answer within 50 ms\nlivez check failed\n"
    );
}

#[test]
fn probes_answer_while_state_waits_for_a_device_thread_and_state_waits_only_so_long() {
    let server = Server::start(Limits {
        answer: Duration::from_secs(2),
        ..Limits::default()
    });
    server.program.state_hangs.store(true, Ordering::SeqCst);
    let mut waiting: Vec<_> = (0..10).map(|_| server.tcp()).collect();
    for client in &mut waiting {
        client
            .stream
            .write_all(b"GET /state HTTP/1.1\r\nhost: x\r\n\r\n")
            .unwrap();
    }
    let asked = Instant::now();
    for path in ["/livez", "/readyz", "/startupz", "/metrics"] {
        assert_eq!(server.get(path).status, 200);
    }
    assert!(
        asked.elapsed() < Duration::from_secs(1),
        "probes took {:?}",
        asked.elapsed()
    );
    for client in &mut waiting {
        let reply = client.reply(false);
        assert_eq!(reply.status, 503);
        assert_eq!(reply.body, "{\"error\":\"no answer within 2000 ms\"}\n");
    }
}

#[test]
fn a_failure_behind_one_request_is_that_requests_alone() {
    let server = Server::start(Limits::default());
    server.program.metrics_fail.store(true, Ordering::SeqCst);
    let reply = server.get("/metrics");
    assert_eq!(
        (reply.status, reply.body.as_str()),
        (500, "no metrics: a collector failed\n")
    );

    server.program.state_panics.store(true, Ordering::SeqCst);
    let mut client = server.tcp();
    client
        .stream
        .write_all(b"GET /state HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    client.closed();
    assert_eq!(server.get("/livez").status, 200);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let server = Server::start(Limits::default());
    let mut client = server.tcp();
    let request = |path| format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
    let all = ["/livez", "/metrics", "/nowhere", "/startupz"]
        .map(request)
        .concat();
    // The last one comes in two pieces.
    let (now, later) = all.split_at(all.len() - 7);
    client.stream.write_all(now.as_bytes()).unwrap();
    let bodies = [client.reply(false), client.reply(false), client.reply(false)];
    assert_eq!(bodies[0].body, "livez check passed\n");
    assert!(bodies[1].body.ends_with("up 1\n"));
    assert_eq!(bodies[2].status, 404);
    client.stream.write_all(later.as_bytes()).unwrap();
    assert_eq!(client.reply(false).body, "startupz check passed\n");
}

/// `printf 'GET /livez HTTP/1.0\r\n\r\n' | nc -N localhost 9464`
#[test]
fn a_client_that_ends_its_side_still_gets_the_answer() {
    let server = Server::start(Limits::default());
    let mut client = server.tcp();
    client.stream.write_all(b"GET /livez HTTP/1.0\r\n\r\n").unwrap();
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.reply(false).status, 200);
    client.closed();
}

#[test]
fn a_request_body_is_not_read() {
    let server = Server::start(Limits::default());
    let mut client = server.tcp();
    // One gigabyte is announced and nothing of it sent.
    client
        .stream
        .write_all(b"POST /state HTTP/1.1\r\nhost: x\r\ncontent-length: 1073741824\r\n\r\n")
        .unwrap();
    assert_eq!(client.reply(false).status, 405);
    client.closed();
}

#[test]
fn heads_that_are_too_big_or_no_http_are_refused() {
    let server = Server::start(Limits::default());
    let big = format!("GET / HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(20_000));
    let many = format!("GET / HTTP/1.1\r\nhost: x\r\n{}\r\n", "x: y\r\n".repeat(100));
    let rows = [
        (big.as_str(), 431),
        (many.as_str(), 431),
        ("\x16\x03\x01\x02 is TLS\r\n\r\n", 400),
        ("GET\r\n\r\n", 400),
    ];
    for (request, status) in rows {
        let mut client = server.tcp();
        client.stream.write_all(request.as_bytes()).unwrap();
        assert_eq!(
            client.reply(false).status,
            status,
            "{}",
            &request[..request.len().min(60)]
        );
        client.closed();
    }
    assert_eq!(server.get("/livez").status, 200);
}

const SHORT: Limits = Limits {
    connections: 64,
    head: Duration::from_millis(150),
    idle: Duration::from_secs(1),
    response: Duration::from_millis(300),
    stall: Duration::from_secs(1),
    answer: Duration::from_secs(1),
};

#[test]
fn a_head_that_never_ends_is_cut_off() {
    let server = Server::start(SHORT);
    let start = Instant::now();
    let mut silent = server.tcp();
    silent.closed();
    assert!(start.elapsed() >= SHORT.head);

    // A byte now and then is no progress.
    let start = Instant::now();
    let mut trickle = server.unix();
    let mut request = b"GET /livez HTTP/1.1\r\nhost: x\r\nx: "
        .iter()
        .chain(std::iter::repeat(&b'y'));
    while trickle.stream.write_all(&[*request.next().unwrap()]).is_ok() {
        thread::sleep(Duration::from_millis(10));
        assert!(start.elapsed() < LONG, "the server reads for ever");
    }

    // The second head of a connection is bounded like the first.
    let mut second = server.tcp();
    assert_eq!(second.ask("GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").status, 200);
    let start = Instant::now();
    second.stream.write_all(b"GET /li").unwrap();
    second.closed();
    assert!(
        start.elapsed() < SHORT.idle,
        "it was taken for an idle connection: {:?}",
        start.elapsed()
    );
}

/// Prometheus keeps its connection between scrapes.
#[test]
fn an_idle_connection_outlives_the_head_limit_and_ends_at_its_own() {
    let server = Server::start(SHORT);
    let mut client = server.tcp();
    for _ in 0..3 {
        assert_eq!(client.ask("GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").status, 200);
        thread::sleep(SHORT.head * 2);
    }
    assert_eq!(client.ask("GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").status, 200);
    let start = Instant::now();
    client.closed();
    assert!(
        start.elapsed() >= SHORT.idle - SHORT.head,
        "{:?}",
        start.elapsed()
    );
}

/// The only slot is held by a client that does not take its response.
#[test]
fn a_client_that_does_not_read_holds_its_slot_only_so_long() {
    let limits = Limits {
        connections: 1,
        response: Duration::from_secs(2),
        ..Limits::default()
    };
    let server = Server::start(limits);
    // Far more than the buffers of a unix socket hold.
    *server.program.padding.lock().unwrap() = "x".repeat(4 << 20);
    let mut lazy = server.unix();
    lazy.stream
        .write_all(b"GET /state HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    assert_ne!(lazy.read().unwrap(), 0, "the response begins");
    assert_eq!(server.unix().reply(false).status, 503, "the slot is taken");
    eventually("the slot is free again", || {
        let mut client = server.unix();
        // A refused client may find its socket closed at any step.
        let _ = client.stream.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n");
        client.read().is_ok() && client.buffer.starts_with(b"HTTP/1.1 200")
    });
    lazy.closed();
}

/// Connections that say nothing must not keep a probe out, however many they are.
#[test]
fn of_too_many_connections_the_one_that_was_silent_longest_makes_room() {
    let server = Server::start(Limits {
        connections: 64,
        ..Limits::default()
    });
    let request = "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut silent: Vec<_> = (0..64)
        .map(|n| {
            let mut client = server.tcp();
            assert_eq!(client.ask(request).status, 200, "connection {n}");
            client
        })
        .collect();
    for _ in 0..10 {
        assert_eq!(server.get("/livez").status, 200);
    }
    silent[0].closed();
    assert_eq!(silent[63].ask(request).status, 200, "the last one has been kept");
}

#[test]
fn a_client_too_many_is_told_so_and_the_other_listener_stays_usable() {
    let server = Server::start(Limits {
        connections: 8,
        answer: Duration::from_secs(2),
        ..Limits::default()
    });
    server.program.state_hangs.store(true, Ordering::SeqCst);
    let mut busy: Vec<_> = (0..8).map(|_| server.tcp()).collect();
    for client in &mut busy {
        // The first answer shows that the second request is in the server's hands.
        client
            .stream
            .write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\nGET /state HTTP/1.1\r\nhost: x\r\n\r\n")
            .unwrap();
        assert_eq!(client.reply(false).status, 200);
    }
    let mut refused = server.tcp();
    let reply = refused.reply(false);
    assert_eq!(
        (reply.status, reply.body.as_str()),
        (503, "too many connections\n")
    );
    refused.closed();
    assert_eq!(
        server.unix().ask("GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").status,
        200
    );
    for client in &mut busy {
        assert_eq!(client.reply(false).status, 503);
    }
    assert_eq!(server.get("/livez").status, 200);
}

#[test]
fn a_hundred_clients_at_once_are_all_answered() {
    let server = Server::start(Limits {
        connections: 128,
        ..Limits::default()
    });
    let barrier = Barrier::new(100);
    thread::scope(|scope| {
        for n in 0..100 {
            let (server, barrier) = (&server, &barrier);
            scope.spawn(move || {
                barrier.wait();
                let path = ["/metrics", "/livez", "/state", "/"][n % 4];
                let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
                for _ in 0..5 {
                    assert_eq!(server.tcp().ask(&request).status, 200);
                }
                assert_eq!(server.unix().ask(&request).status, 200);
            });
        }
    });
}

#[test]
fn shutdown_lets_a_response_end_and_leaves_nothing_behind() {
    let mut server = Server::start(Limits {
        answer: Duration::from_millis(300),
        ..Limits::default()
    });
    server.program.state_hangs.store(true, Ordering::SeqCst);
    let mut waiting = server.tcp();
    let (_idle, _silent) = (server.unix(), server.tcp());
    waiting
        .stream
        .write_all(b"GET /state HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    // Answered after the one before it, so that the first is surely being served.
    assert_eq!(server.get("/livez").status, 200);
    assert!(server.unix.exists());

    let handle = server.handle.take().unwrap();
    let start = Instant::now();
    let stopping = thread::spawn(move || handle.shutdown());
    let reply = waiting.reply(false);
    assert_eq!(
        (reply.status, reply.field("connection")),
        (503, Some("close")),
        "it got its answer"
    );
    stopping.join().unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "shutdown took {:?}",
        start.elapsed()
    );
    assert!(!server.unix.exists());
    assert_eq!(
        TcpStream::connect(server.tcp).unwrap_err().kind(),
        io::ErrorKind::ConnectionRefused
    );
}

fn bind_error(addresses: &[ListenAddress]) -> String {
    match AdminServer::bind(addresses) {
        Ok(_) => panic!("{addresses:?} could be bound"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn addresses_that_cannot_be_bound_are_named_with_a_remedy() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = taken.local_addr().unwrap();
    let error = bind_error(&[ListenAddress::Tcp(address)]);
    assert_eq!(
        error,
        format!(
            "admin: tcp://{address} is taken by another process: stop that process or choose another port in admin.listen"
        )
    );

    // TEST-NET-1, nobody's address.
    let error = bind_error(&[ListenAddress::Tcp("192.0.2.1:9464".parse().unwrap())]);
    assert!(
        error.contains("no interface has the address 192.0.2.1:9464"),
        "{error}"
    );

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = bind_error(&[ListenAddress::Unix(file.clone())]);
    assert!(
        error.contains(&format!("admin: {} exists and is not a socket", file.display())),
        "{error}"
    );
    assert!(file.exists());

    let live = dir.path().join("live");
    let _live = std::os::unix::net::UnixListener::bind(&live).unwrap();
    let error = bind_error(&[ListenAddress::Unix(live)]);
    assert!(error.contains("served by another process"), "{error}");
}

#[test]
fn either_all_addresses_are_bound_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let unix = dir.path().join("admin.sock");
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    bind_error(&[
        ListenAddress::Unix(unix.clone()),
        ListenAddress::Tcp(taken.local_addr().unwrap()),
    ]);
    assert!(!unix.exists());
}

#[test]
fn ipv4_and_ipv6_wildcards_share_a_port() {
    // A port that is free for both, chosen by the kernel for one.
    let deadline = Instant::now() + LONG;
    loop {
        let port = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let both = ["0.0.0.0", "[::]"].map(|ip| ListenAddress::Tcp(format!("{ip}:{port}").parse().unwrap()));
        match AdminServer::bind(&both) {
            Ok(server) => break assert_eq!(server.addresses(), both),
            // Somebody else took it meanwhile.
            Err(_) if Instant::now() < deadline => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Runs in a process of its own, since it takes every file descriptor.
#[test]
fn probes_are_answered_when_the_process_has_no_file_descriptor_left() {
    const CHILD: &str = "VSOCK_SIDECAR_TEST_FD_EXHAUSTION";
    if std::env::var_os(CHILD).is_none() {
        let test = "probes_are_answered_when_the_process_has_no_file_descriptor_left";
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert!(
            child.status.success(),
            "{}{}",
            String::from_utf8_lossy(&child.stdout),
            String::from_utf8_lossy(&child.stderr)
        );
        return;
    }
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let server = Server::start(Limits::default());
    let limit = Rlimit {
        current: Some(100),
        maximum: getrlimit(Resource::Nofile).maximum,
    };
    setrlimit(Resource::Nofile, limit).unwrap();
    // Sockets of the clients are made before, as they are in other processes in earnest.
    let mut clients: Vec<_> = (0..8).map(|n| rustix_socket(n % 2 == 0)).collect();
    let mut hoard = Vec::new();
    while let Ok(file) = fs::File::open("/dev/null") {
        hoard.push(file);
    }
    let start = Instant::now();
    for client in &mut clients {
        let stream: &mut dyn ReadWrite = match client {
            Either::Tcp(socket) => {
                socket.connect(&server.tcp.into()).unwrap();
                socket
            }
            Either::Unix(socket) => {
                socket
                    .connect(&socket2::SockAddr::unix(Path::new(&server.unix)).unwrap())
                    .unwrap();
                socket
            }
        };
        let reply = Client::new(stream).ask("GET /livez HTTP/1.1\r\nhost: x\r\n\r\n");
        assert_eq!((reply.status, reply.field("connection")), (200, Some("close")));
    }
    assert!(start.elapsed() < LONG);
    drop(hoard);
    // As before, connections may be kept.
    let mut client = server.tcp();
    eventually("connections are kept again", || {
        client = server.tcp();
        client
            .ask("GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            .field("connection")
            .is_none()
    });
    assert_eq!(client.ask("GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").status, 200);
}

trait ReadWrite: Read + Write {}
impl<T: Read + Write> ReadWrite for T {}

enum Either {
    Tcp(socket2::Socket),
    Unix(socket2::Socket),
}

fn rustix_socket(tcp: bool) -> Either {
    let domain = if tcp {
        socket2::Domain::IPV4
    } else {
        socket2::Domain::UNIX
    };
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    if tcp {
        Either::Tcp(socket)
    } else {
        Either::Unix(socket)
    }
}
