use std::io::Read;
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;

use super::*;
use crate::host::resolve::LookupFuture;

mod descriptors;
mod packets;

/// Longer than anything here takes, so that a test which hits it has failed.
const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(60);

/// The control runtime on its own thread, and a dialer that uses it from the test's thread, as a device does.
struct Dials {
    dialer: Dialer,
    /// Dropped to end the runtime's thread.
    _stop: tokio::sync::oneshot::Sender<()>,
}

impl Dials {
    fn new() -> Dials {
        Dials::with(Arc::new(SystemResolver))
    }

    /// Every name has these addresses.
    fn resolving_to(addresses: &[SocketAddr]) -> Dials {
        Dials::with(Arc::new(Fixed(addresses.to_vec())))
    }

    fn with(resolver: Arc<dyn Lookup>) -> Dials {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let dialer = Dialer::with_resolver(runtime.handle().clone(), resolver);
        let (stop, stopped) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || runtime.block_on(stopped));
        Dials { dialer, _stop: stop }
    }

    fn start(
        &self,
        target: &Target,
        timeout: Duration,
    ) -> (Option<DialTask>, mpsc::Receiver<(DialResult, Duration)>) {
        let request = DialRequest {
            target,
            socket_type: SocketType::Stream,
            first_port: 100,
            guest_port: 100,
            cid: 3,
            greeting: &[],
            timeout,
        };
        start(&self.dialer, request, None)
    }

    fn dial(&self, target: &Target, timeout: Duration) -> DialResult {
        let (_task, told) = self.start(target, timeout);
        let (result, took) = told.recv_timeout(LONG).expect("a dial ends");
        assert!(took < LONG);
        result
    }
}

/// Dials, and tells of the outcome in the same way whether there was something to wait for or not.
fn start(
    dialer: &Dialer,
    request: DialRequest<'_>,
    descriptor: Option<Share>,
) -> (Option<DialTask>, mpsc::Receiver<(DialResult, Duration)>) {
    let (tell, told) = mpsc::channel();
    let later = tell.clone();
    let dial = dialer.dial(request, descriptor, move |result, took| {
        let _ = later.send((result, took));
    });
    match dial {
        Dial::Waits(task) => (Some(task), told),
        Dial::Ended(result, took) => {
            tell.send((result, took)).unwrap();
            (None, told)
        }
    }
}

struct Fixed(Vec<SocketAddr>);

impl Lookup for Fixed {
    fn lookup(&self, _host: &str) -> LookupFuture {
        let addresses = self.0.clone();
        Box::pin(async move { Ok(addresses) })
    }
}

fn tcp(host: &str, port: u16) -> Target {
    Target::Tcp {
        host: host.to_owned(),
        port,
    }
}

fn unix(path: &Path) -> Target {
    Target::Unix {
        path: path.display().to_string(),
    }
}

fn listener(address: &str) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A loopback address that answers a SYN with RST.
fn refusing(ip: &str, port: u16) -> SocketAddr {
    let (listener, address) = listener(&format!("{ip}:{port}"));
    drop(listener);
    address
}

/// A listener that never answers a SYN: its backlog is full, and Linux drops what comes then (`tcp_conn_request` in
/// net/ipv4/tcp_input.c).
struct Silent {
    listening: TcpListener,
    address: SocketAddr,
    /// What fills the backlog.
    clients: Vec<HostStream>,
}

fn silent(ip: &str, port: u16) -> Silent {
    let listening = Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    listening
        .bind(&SocketAddr::new(ip.parse().unwrap(), port).into())
        .unwrap();
    listening.listen(0).unwrap();
    let address = listening.local_addr().unwrap().as_socket().unwrap();
    let mut clients = Vec::new();
    while let Started::Connected(client) = connect::start_tcp(address).unwrap() {
        clients.push(client);
    }
    Silent {
        listening: listening.into(),
        address,
        clients,
    }
}

/// A unix listener whose backlog is full, and the clients in it.
fn full_unix(path: &Path) -> (UnixListener, Vec<HostStream>) {
    let listening = Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    listening.bind(&socket2::SockAddr::unix(path).unwrap()).unwrap();
    listening.listen(1).unwrap();
    let mut clients = Vec::new();
    while let Ok(client) = connect::connect_unix(path, SocketType::Stream) {
        clients.push(client);
    }
    (listening.into(), clients)
}

#[test]
fn a_numeric_target_is_reached_before_dial_returns() {
    let dials = Dials::new();
    for ip in ["127.0.0.1", "::1"] {
        let (listening, address) = listener(&SocketAddr::new(ip.parse().unwrap(), 0).to_string());
        let (_task, told) = dials.start(&tcp(ip, address.port()), LONG);
        let (result, _) = told.try_recv().expect("loopback does not wait");
        let stream = result.unwrap();
        assert_eq!(stream.peer(), address.to_string());
        let (mut theirs, _) = listening.accept().unwrap();
        stream.abort();
        assert_eq!(
            theirs.read(&mut [0]).unwrap_err().kind(),
            io::ErrorKind::ConnectionReset
        );
    }
}

#[test]
fn a_name_is_resolved() {
    let (listening, address) = listener("127.0.0.1:0");
    let dials = Dials::new();
    let stream = dials.dial(&tcp("localhost", address.port()), LONG).unwrap();
    assert_eq!(stream.peer(), address.to_string());
    listening.accept().unwrap();
}

#[test]
fn a_unix_target_is_reached() {
    let dir = tempfile::tempdir().unwrap();
    let listening = UnixListener::bind(dir.path().join("3-100.sock")).unwrap();
    let dials = Dials::new();
    let stream = dials
        .dial(&unix(&dir.path().join("{cid}-{port}.sock")), LONG)
        .unwrap();
    assert!(!stream.is_tcp());
    assert_eq!(stream.peer(), dir.path().join("3-100.sock").display().to_string());
    listening.accept().unwrap();
}

#[test]
fn a_range_keeps_its_offset_and_placeholders_are_filled_in() {
    let to = |target: &Target, first_port, guest_port| {
        let request = DialRequest {
            target,
            socket_type: SocketType::Stream,
            first_port,
            guest_port,
            cid: 7,
            greeting: &[],
            timeout: LONG,
        };
        Destination::new(request)
    };
    let address = |text: &str| Destination::Address(text.parse().unwrap());
    assert_eq!(
        to(&tcp("10.0.0.1", 8000), 5000, 5000).unwrap(),
        address("10.0.0.1:8000")
    );
    assert_eq!(
        to(&tcp("10.0.0.1", 8000), 5000, 5099).unwrap(),
        address("10.0.0.1:8099")
    );
    assert_eq!(
        to(&tcp("fd00::1", 8000), 5000, 5001).unwrap(),
        address("[fd00::1]:8001")
    );
    let name = Destination::Name {
        host: "db".to_owned(),
        port: 8001,
    };
    assert_eq!(to(&tcp("db", 8000), 5000, 5001).unwrap(), name);
    let unix = Target::Unix {
        path: "/run/{cid}/v.sock_{port}_{port}".to_owned(),
    };
    let path = Destination::Unix {
        path: "/run/7/v.sock_4294967294_4294967294".into(),
    };
    assert_eq!(to(&unix, 1, 0xffff_fffe).unwrap(), path);
    // What the configuration has excluded: no wrapped port is ever dialled.
    for (first, guest) in [(5000, 4999), (0, 65536), (0, 57536), (0, u32::MAX)] {
        let error = to(&tcp("10.0.0.1", 8000), first, guest).unwrap_err();
        assert!(matches!(error, DialError::Unreachable { .. }), "{error}");
    }
}

/// Nothing is dialled here: what a socket of the family does is tested inside a VM (`tests/nested_vsock`).
#[test]
fn a_vsock_range_keeps_its_offset() {
    let to = |port, first_port, guest_port| {
        Destination::new(DialRequest {
            target: &Target::Vsock { cid: 16, port },
            socket_type: SocketType::Stream,
            first_port,
            guest_port,
            cid: 7,
            greeting: &[],
            timeout: LONG,
        })
    };
    let at = |port| Destination::Vsock { cid: 16, port };
    assert_eq!(to(5000, 100, 100).unwrap(), at(5000));
    assert_eq!(to(70_000, 100, 199).unwrap(), at(70_099));
    assert_eq!(to(1, 1, 0xffff_fffe).unwrap(), at(0xffff_fffe));
    for (port, first, guest) in [
        (5000, 100, 99),
        (2, 1, 0xffff_fffe),
        (0xffff_fffe, 0, 0xffff_fffe),
    ] {
        let error = to(port, first, guest).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!(
                "cannot reach vsock://16:{port}: guest port {guest} has no"
            )),
            "{error}"
        );
    }
}

#[test]
fn nobody_there_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let stale = dir.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    let regular = dir.path().join("regular");
    std::fs::write(&regular, "").unwrap();
    let dead = refusing("127.0.0.1", 0);
    let dials = Dials::resolving_to(&[dead]);
    let rows = [
        (
            tcp("127.0.0.1", dead.port()),
            format!("tcp://{dead} refused the connection: "),
        ),
        (
            tcp("db", dead.port()),
            format!("tcp://db:{} ({dead}) refused the connection: ", dead.port()),
        ),
        (
            unix(&stale),
            format!("unix://{} refused the connection: ", stale.display()),
        ),
        (
            unix(&regular),
            format!("unix://{} refused the connection: ", regular.display()),
        ),
        (
            unix(&dir.path().join("none")),
            format!("unix://{}/none refused the connection: ", dir.path().display()),
        ),
    ];
    for (target, text) in rows {
        let error = dials.dial(&target, LONG).unwrap_err();
        assert!(matches!(error, DialError::Refused { .. }), "{error:?}");
        assert!(error.to_string().starts_with(&text), "{error}");
    }
}

#[test]
fn a_silent_target_times_out() {
    let Silent {
        address,
        listening: _listening,
        clients: _clients,
    } = silent("127.0.0.1", 0);
    let dials = Dials::resolving_to(&[address]);
    for host in ["127.0.0.1", "db"] {
        let (_task, told) = dials.start(&tcp(host, address.port()), SHORT);
        let (result, took) = told.recv_timeout(LONG).unwrap();
        let error = result.unwrap_err();
        assert!(
            matches!(error, DialError::TimedOut { after: SHORT, .. }),
            "{error:?}"
        );
        assert_eq!(
            error.to_string(),
            format!("tcp://{host}:{} did not answer within 60ms", address.port())
        );
        assert!(took >= SHORT);
    }
}

#[test]
fn a_unix_server_that_does_not_accept_times_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _full = full_unix(&path);
    let error = Dials::new().dial(&unix(&path), SHORT).unwrap_err();
    assert!(matches!(error, DialError::TimedOut { .. }), "{error:?}");
}

#[test]
fn a_unix_server_that_catches_up_is_reached() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let (listening, clients) = full_unix(&path);
    let dials = Dials::new();
    let (_task, told) = dials.start(&unix(&path), LONG);
    assert!(told.try_recv().is_err(), "there is no room yet");
    for _ in &clients {
        listening.accept().unwrap();
    }
    told.recv_timeout(LONG).unwrap().0.unwrap();
}

/// How resolution fails differs with the machine's resolver: no server, no answer, no such name.
#[test]
fn a_name_that_is_nobodys_cannot_be_resolved() {
    let error = Dials::new().dial(&tcp("nobody.invalid", 80), LONG).unwrap_err();
    assert!(
        matches!(&error, DialError::Resolve { host, .. } if host == "nobody.invalid"),
        "{error:?}"
    );
}

#[test]
fn a_name_without_addresses_cannot_be_resolved() {
    let error = Dials::resolving_to(&[]).dial(&tcp("db", 80), LONG).unwrap_err();
    assert_eq!(error.to_string(), "cannot resolve db: the name has no addresses");
}

#[test]
fn a_resolver_that_hangs_is_told_apart_from_a_target_that_does() {
    struct Hangs;
    impl Lookup for Hangs {
        fn lookup(&self, _host: &str) -> LookupFuture {
            Box::pin(std::future::pending())
        }
    }
    let error = Dials::with(Arc::new(Hangs))
        .dial(&tcp("db", 80), SHORT)
        .unwrap_err();
    assert!(matches!(&error, DialError::Resolve { source, .. } if source.kind() == io::ErrorKind::TimedOut));
    assert_eq!(error.to_string(), "cannot resolve db: no answer within 60ms");
}

#[test]
fn no_way_there_is_unreachable() {
    let dir = tempfile::tempdir().unwrap();
    let dials = Dials::new();
    let long = dir.path().join("x".repeat(200));
    // Class E is no unicast address: the kernel has no route to a broadcast for TCP.
    let rows = [tcp("255.255.255.255", 80), unix(&long)];
    for target in rows {
        let error = dials.dial(&target, LONG).unwrap_err();
        assert!(matches!(error, DialError::Unreachable { .. }), "{error:?}");
    }
    let error = dials.dial(&unix(&long), LONG).unwrap_err().to_string();
    assert!(
        error.contains("bytes and a unix socket's can have 107"),
        "{error}"
    );
}

#[test]
fn a_dead_first_address_costs_no_time() {
    let (listening, alive) = listener("127.0.0.1:0");
    let dead = refusing("127.0.0.2", alive.port());
    let dials = Dials::resolving_to(&[dead, alive]);
    let (_task, told) = dials.start(&tcp("db", alive.port()), LONG);
    let (result, took) = told.recv_timeout(LONG).unwrap();
    assert_eq!(result.unwrap().peer(), alive.to_string());
    assert!(took < connect::ATTEMPT_DELAY, "{took:?}");
    listening.accept().unwrap();
}

#[test]
fn beside_a_silent_address_the_next_is_tried() {
    let (listening, alive) = listener("127.0.0.1:0");
    let mute = silent("127.0.0.2", alive.port());
    let dials = Dials::resolving_to(&[mute.address, alive]);
    let (_task, told) = dials.start(&tcp("db", alive.port()), LONG);
    let (result, took) = told.recv_timeout(LONG).unwrap();
    assert_eq!(result.unwrap().peer(), alive.to_string());
    assert!(took >= connect::ATTEMPT_DELAY, "{took:?}");
    listening.accept().unwrap();
}

#[test]
fn the_first_to_answer_wins_though_it_was_asked_first() {
    let first = silent("127.0.0.1", 0);
    let second = silent("127.0.0.2", first.address.port());
    let dials = Dials::resolving_to(&[first.address, second.address]);
    let (_task, told) = dials.start(&tcp("db", first.address.port()), LONG);
    // Once there is room in the first one's backlog: the kernel sends the SYN again after a second.
    for _ in &first.clients {
        first.listening.accept().unwrap();
    }
    let (result, _) = told.recv_timeout(LONG).unwrap();
    assert_eq!(result.unwrap().peer(), first.address.to_string());
}

#[test]
fn of_several_failures_the_most_telling_is_kept() {
    let dead = refusing("127.0.0.1", 0);
    let no_route: SocketAddr = format!("255.255.255.255:{}", dead.port()).parse().unwrap();
    let silent = silent("127.0.0.2", dead.port());
    let mute = silent.address;
    let kind = |addresses: &[SocketAddr]| {
        let timeout = connect::ATTEMPT_DELAY + SHORT;
        match Dials::resolving_to(addresses)
            .dial(&tcp("db", dead.port()), timeout)
            .unwrap_err()
        {
            DialError::Refused { .. } => "refused",
            DialError::TimedOut { .. } => "timed out",
            DialError::Unreachable { .. } => "unreachable",
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(kind(&[no_route]), "unreachable");
    assert_eq!(kind(&[no_route, dead]), "refused");
    assert_eq!(kind(&[dead, no_route]), "refused");
    assert_eq!(kind(&[mute, no_route]), "timed out");
    assert_eq!(kind(&[no_route, mute]), "timed out");
    assert_eq!(kind(&[mute, dead]), "refused");
}

#[test]
fn errors_have_the_meaning_of_their_number() {
    let v4: SocketAddr = "10.0.0.1:80".parse().unwrap();
    let v6: SocketAddr = "[fd00::1]:80".parse().unwrap();
    let kind = |address, errno: Errno| match address_failure("t".to_owned(), address, errno.into(), LONG) {
        DialError::Refused { .. } => "refused",
        DialError::TimedOut { .. } => "timed out",
        DialError::Resolve { .. } => "resolve",
        DialError::Unreachable { .. } => "unreachable",
        DialError::Resources { .. } => "resources",
        _ => "another",
    };
    for (errno, want) in [
        (Errno::CONNREFUSED, "refused"),
        (Errno::NOENT, "refused"),
        (Errno::TIMEDOUT, "timed out"),
        (Errno::HOSTUNREACH, "unreachable"),
        (Errno::NETUNREACH, "unreachable"),
        (Errno::ACCESS, "unreachable"),
        (Errno::PERM, "unreachable"),
        (Errno::CONNRESET, "unreachable"),
        (Errno::AFNOSUPPORT, "unreachable"),
        (Errno::MFILE, "resources"),
        (Errno::NFILE, "resources"),
        (Errno::NOMEM, "resources"),
        (Errno::NOBUFS, "resources"),
        (Errno::NOSPC, "resources"),
        (Errno::AGAIN, "resources"),
        (Errno::ADDRNOTAVAIL, "resources"),
    ] {
        assert_eq!(kind(v4, errno), want, "{errno}");
    }
    assert_eq!(kind(v6, Errno::ADDRNOTAVAIL), "unreachable");
}

#[test]
fn dropping_the_task_closes_the_socket_and_says_nothing() {
    let silent = silent("127.0.0.1", 0);
    let dials = Dials::resolving_to(&[silent.address]);
    for host in ["127.0.0.1", "db"] {
        let (task, told) = dials.start(&tcp(host, silent.address.port()), LONG);
        drop(task);
        // The closure is dropped and not called, and with it the socket, which the same task owns.
        assert_eq!(
            told.recv_timeout(LONG).unwrap_err(),
            mpsc::RecvTimeoutError::Disconnected
        );
    }
}

#[test]
fn four_thousand_dials_of_a_name_ask_once() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    struct Slow(SocketAddr);
    impl Lookup for Slow {
        fn lookup(&self, _host: &str) -> LookupFuture {
            let address = self.0;
            ASKED.fetch_add(1, Ordering::SeqCst);
            Box::pin(async move {
                sleep(Duration::from_millis(20)).await;
                Ok(vec![address])
            })
        }
    }
    let dead = refusing("127.0.0.1", 0);
    let dials = Dials::with(Arc::new(Slow(dead)));
    let started: Vec<_> = (0..4096)
        .map(|_| dials.start(&tcp("db", dead.port()), LONG))
        .collect();
    for (_task, told) in started {
        assert!(matches!(
            told.recv_timeout(LONG).unwrap().0,
            Err(DialError::Refused { .. })
        ));
    }
    // More than one only if the machine took a second and the answer grew old.
    let asked = ASKED.load(Ordering::SeqCst);
    assert!(asked <= 5, "{asked}");
}

#[test]
fn a_stream_from_a_dial_carries_bytes() {
    let (mut theirs, ours) = {
        let dir = tempfile::tempdir().unwrap();
        let listening = UnixListener::bind(dir.path().join("s")).unwrap();
        let ours = Dials::new().dial(&unix(&dir.path().join("s")), LONG).unwrap();
        let (theirs, _): (UnixStream, _) = listening.accept().unwrap();
        (theirs, ours)
    };
    ours.write(&[io::IoSlice::new(b"hello")]).unwrap();
    drop(ours);
    let mut got = String::new();
    theirs.read_to_string(&mut got).unwrap();
    assert_eq!(got, "hello");
}

const GREETING: &[u8] = b"\r\n\r\n\0\r\nQUIT\n and more";

/// Whatever the way a target is reached: on the spot, by name, or when there was room in its backlog.
#[test]
fn a_greeting_comes_first() {
    let dials = Dials::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("service.sock");
    let unix_service = UnixListener::bind(&path).unwrap();
    let (tcp_service, address) = listener("127.0.0.1:0");
    for target in [
        unix(&path),
        tcp("127.0.0.1", address.port()),
        tcp("localhost", address.port()),
    ] {
        let request = DialRequest {
            target: &target,
            socket_type: SocketType::Stream,
            first_port: 100,
            guest_port: 100,
            cid: 3,
            greeting: GREETING,
            timeout: LONG,
        };
        let (_task, told) = start(&dials.dialer, request, None);
        let stream = told.recv_timeout(LONG).unwrap().0.unwrap();
        stream.write(&[io::IoSlice::new(b"payload")]).unwrap();
        drop(stream);
        let mut got = Vec::new();
        match &target {
            Target::Unix { .. } => unix_service.accept().unwrap().0.read_to_end(&mut got).unwrap(),
            _ => tcp_service.accept().unwrap().0.read_to_end(&mut got).unwrap(),
        };
        assert_eq!(got, [GREETING, b"payload"].concat(), "{target}");
    }
}

/// A connected socket that takes nothing more, and its other end.
fn full() -> (HostStream, UnixStream, usize) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let ours = HostStream::configured(
        Socket::from(std::os::fd::OwnedFd::from(ours)),
        crate::host::stream::Kind::unix(SocketType::Stream),
        "full".to_owned(),
    );
    let mut filled = 0;
    for size in [4096, 1] {
        while let Ok(n) = ours.write(&[io::IoSlice::new(&vec![0; size])]) {
            filled += n;
        }
    }
    (ours, theirs, filled)
}

/// The system was short of memory for sockets, say: the rest is written when there is room, and nothing comes before it.
#[tokio::test]
async fn a_greeting_that_does_not_fit_at_once_is_not_lost() {
    let (ours, mut theirs, filled) = full();
    let mut greeting = Greeting::new(GREETING);
    let Ok(Waiting::Room { stream }) = greeting.begin(ours, LONG) else {
        panic!("there was room");
    };
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        theirs.read_to_end(&mut got).map(|_| got)
    });
    let stream = greeting.end(stream, Instant::now() + LONG, LONG).await.unwrap();
    assert_eq!(stream.peer(), "full");
    drop(stream);
    let got = reader.join().unwrap().unwrap();
    assert_eq!(&got[filled..], GREETING);
}

#[tokio::test]
async fn a_greeting_that_is_never_taken_is_a_dial_that_timed_out() {
    let (ours, _theirs, _) = full();
    let failed = Greeting::new(GREETING)
        .end(ours, Instant::now() + SHORT, SHORT)
        .await
        .unwrap_err();
    assert!(matches!(failed, DialError::TimedOut { .. }), "{failed}");
}

#[test]
fn a_target_that_leaves_before_its_greeting_was_not_reached() {
    let (ours, theirs, _) = full();
    drop(theirs);
    let Err(Err(failed)) = Greeting::new(GREETING).begin(ours, LONG) else {
        panic!("it went to nobody");
    };
    assert!(matches!(failed, DialError::Unreachable { .. }), "{failed}");
}
