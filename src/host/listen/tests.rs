use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::process::Resource;
use socket2::SockRef;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;
use crate::host::Packet;

/// Longer than anything here takes, so that a test which hits it has failed.
const LONG: Duration = Duration::from_secs(20);

const PLAIN: InboundProtocol = InboundProtocol::Plain { port: 22 };

/// A listener that is being served, and what comes out.
struct Served {
    address: ListenAddress,
    out: mpsc::UnboundedReceiver<Result<Incoming, Rejected>>,
    terms: watch::Sender<Arc<Terms>>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<io::Result<()>>,
}

/// Terms, and what comes out by them.
fn terms(
    protocol: InboundProtocol,
    allow: Vec<Cidr>,
) -> (Arc<Terms>, mpsc::UnboundedReceiver<Result<Incoming, Rejected>>) {
    let (sink, out) = mpsc::unbounded_channel();
    let spec = InboundSpec {
        protocol,
        handshake_timeout: Duration::from_secs(5),
        wait_for_guest: false,
        socket_type: SocketType::Stream,
        framing: None,
    };
    let terms = Terms {
        allow,
        spec,
        sink: Box::new(move |outcome| drop(sink.send(outcome))),
    };
    (Arc::new(terms), out)
}

impl Served {
    fn new(listener: Listener, protocol: InboundProtocol) -> Served {
        Served::allowing(listener, Vec::new(), protocol)
    }

    fn allowing(listener: Listener, allow: Vec<Cidr>, protocol: InboundProtocol) -> Served {
        let (stop, stopped) = oneshot::channel();
        let address = listener.address().clone();
        let (terms, out) = terms(protocol, allow);
        let (terms, current) = watch::channel(terms);
        let stopped = async {
            let _ = stopped.await;
        };
        let task = tokio::spawn(listener.serve(current, stopped));
        Served {
            address,
            out,
            terms,
            stop,
            task,
        }
    }

    fn packets(path: &Path) -> Served {
        Served::new(Listener::bind(&unix(path), SocketType::Seqpacket).unwrap(), PLAIN)
    }

    fn tcp(protocol: InboundProtocol) -> Served {
        Served::new(bind(&loopback()).unwrap(), protocol)
    }

    fn connect(&self) -> TcpStream {
        match &self.address {
            ListenAddress::Tcp(address) => TcpStream::connect(address).unwrap(),
            _ => panic!("not a TCP listener"),
        }
    }

    async fn next(&mut self) -> Result<Incoming, Rejected> {
        self.out.recv().await.expect("the listener is served")
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        timeout(LONG, self.task).await.unwrap().unwrap().unwrap();
    }
}

fn bind(address: &ListenAddress) -> Result<Listener, ListenError> {
    Listener::bind(address, SocketType::Stream)
}

fn loopback() -> ListenAddress {
    ListenAddress::Tcp("127.0.0.1:0".parse().unwrap())
}

fn unix(path: &Path) -> ListenAddress {
    ListenAddress::Unix(path.to_owned())
}

/// That the client was closed and was told nothing. A reset is as good as an end: bytes of the client were left unread.
fn assert_closed(client: &mut impl Read) {
    let mut got = Vec::new();
    match client.read_to_end(&mut got) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
    }
    assert_eq!(got, b"");
}

#[tokio::test]
async fn a_plain_tcp_client_is_for_the_rules_port() {
    let mut served = Served::tcp(PLAIN);
    let client = served.connect();
    let incoming = served.next().await.unwrap();
    assert_eq!((incoming.port, incoming.wants_ok), (22, false));
    assert!(incoming.preface.is_empty());
    assert_eq!(incoming.peer, client.local_addr().unwrap().to_string());
    assert_eq!(incoming.stream.peer(), incoming.peer);
    // What `HostStream::new` would have set for each connection comes from the listener.
    let fd = incoming.stream.as_fd();
    let socket = SockRef::from(&fd);
    assert!(socket.nonblocking().unwrap() && socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
    assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(60));
    assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(15));
    assert_eq!(socket.tcp_keepalive_retries().unwrap(), 4);
}

#[tokio::test]
async fn a_plain_unix_client_is_for_the_rules_port() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut served = Served::new(bind(&unix(&path)).unwrap(), PLAIN);
    let mut client = UnixStream::connect(&path).unwrap();
    let incoming = served.next().await.unwrap();
    assert_eq!((incoming.port, incoming.wants_ok), (22, false));
    assert_eq!(incoming.peer, path.display().to_string());
    assert_eq!(
        incoming.stream.read(&mut [0]).unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
    drop(incoming);
    assert_closed(&mut client);
}

#[tokio::test]
async fn a_line_in_pieces_names_the_port_and_the_rest_is_kept() {
    let mut served = Served::tcp(InboundProtocol::Connect);
    let mut client = served.connect();
    client.set_nodelay(true).unwrap();
    for piece in ["CONN", "ECT 1", "024", "\r", "\nhel"] {
        client.write_all(piece.as_bytes()).unwrap();
        // Gives the listener a chance to see this piece alone; the result does not depend on it.
        tokio::task::yield_now().await;
    }
    let incoming = served.next().await.unwrap();
    assert_eq!((incoming.port, incoming.wants_ok), (1024, true));
    client.write_all(b"lo").unwrap();
    drop(client);
    let mut got = incoming.preface;
    let mut buffer = [0; 16];
    loop {
        match incoming.stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => got.extend(&buffer[..n]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(got, b"hello");
}

#[tokio::test]
async fn a_client_that_says_nothing_keeps_nobody_waiting() {
    let mut served = Served::tcp(InboundProtocol::Connect);
    let _silent = served.connect();
    let mut client = served.connect();
    client.write_all(b"CONNECT 5\n").unwrap();
    assert_eq!(served.next().await.unwrap().port, 5);
}

#[tokio::test]
async fn bad_lines_are_closed_without_a_word() {
    let mut served = Served::tcp(InboundProtocol::Connect);
    for (bytes, why) in [
        (&b"GET / HTTP/1.1\r\n"[..], Rejection::NotConnect),
        (b"CONNECT 0\n", Rejection::BadPort),
        (&[b'x'; 40_000], Rejection::TooLong),
    ] {
        let mut client = served.connect();
        client.write_all(bytes).unwrap();
        let rejected = served.next().await.unwrap_err();
        assert_eq!(
            rejected,
            Rejected {
                peer: client.local_addr().unwrap().to_string(),
                why
            }
        );
        assert_closed(&mut client);
    }
    let mut client = served.connect();
    client.write_all(b"CONNECT 2").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(served.next().await.unwrap_err().why, Rejection::Closed);
    assert_closed(&mut client);

    let mut client = served.connect();
    client.write_all(b"CONNECT 2").unwrap();
    HostStream::new(client.into()).unwrap().abort();
    assert_eq!(
        served.next().await.unwrap_err().why,
        Rejection::Failed(io::ErrorKind::ConnectionReset)
    );
}

/// The clock stands still but for timers that are waited for, so this takes no time.
#[tokio::test(start_paused = true)]
async fn a_slow_line_times_out() {
    let mut served = Served::tcp(InboundProtocol::Connect);
    let begun = Instant::now();
    let mut client = served.connect();
    client.write_all(b"CONNECT 2").unwrap();
    assert_eq!(served.next().await.unwrap_err().why, Rejection::TimedOut);
    assert!(
        (Duration::from_secs(5)..Duration::from_secs(6)).contains(&begun.elapsed()),
        "{:?}",
        begun.elapsed()
    );
    assert_closed(&mut client);
}

#[tokio::test]
async fn of_too_many_without_a_line_the_oldest_goes() {
    let (terms, _out) = terms(InboundProtocol::Connect, Vec::new());
    let mut handshakes = Handshakes::new(2);
    let mut clients = Vec::new();
    for name in ["first", "second", "third", "fourth"] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let client = Client {
            socket: ours.into(),
            kind: Kind::unix(SocketType::Stream),
            ip: None,
            peer: name.to_owned(),
            descriptor: None,
        };
        clients.push((theirs, handshakes.begin(&terms, client)));
        assert!(handshakes.open.len() <= 2);
    }
    let crowded: Vec<_> = clients
        .iter_mut()
        .filter_map(|(_, crowded)| crowded.take())
        .collect();
    let told: Vec<_> = crowded
        .into_iter()
        .map(|(_, outcome)| outcome.unwrap_err())
        .collect();
    let expected = |peer: &str| Rejected {
        peer: peer.to_owned(),
        why: Rejection::Crowded,
    };
    assert_eq!(told, [expected("first"), expected("second")]);
    for (client, _) in &mut clients[2..] {
        client.write_all(b"CONNECT 9\n").unwrap();
    }
    let mut reached = Vec::new();
    // Long before the lines that do not come time out.
    let all = async {
        while let Some(outcome) = handshakes.next().await {
            reached.extend(outcome.map(|(_, outcome)| outcome.unwrap().peer));
        }
    };
    timeout(LONG / 2, all)
        .await
        .expect("those who had to go are not waited for");
    reached.sort();
    assert_eq!(reached, ["fourth", "third"]);
    assert!(handshakes.open.is_empty());
    for (client, _) in &mut clients[..2] {
        assert_closed(client);
    }
}

#[tokio::test]
async fn a_client_that_resets_in_the_queue_harms_nobody() {
    let listener = bind(&loopback()).unwrap();
    let ListenAddress::Tcp(address) = *listener.address() else {
        panic!("TCP")
    };
    for _ in 0..3 {
        HostStream::new(TcpStream::connect(address).unwrap().into())
            .unwrap()
            .abort();
    }
    let good = TcpStream::connect(address).unwrap();
    let mut served = Served::new(listener, PLAIN);
    loop {
        if served.next().await.unwrap().peer == good.local_addr().unwrap().to_string() {
            break;
        }
    }
}

#[tokio::test]
async fn stopping_closes_the_listener_and_who_is_not_through() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut served = Served::new(bind(&unix(&path)).unwrap(), InboundProtocol::Connect);
    let mut through = UnixStream::connect(&path).unwrap();
    through.write_all(b"CONNECT 3\n").unwrap();
    let mut half = UnixStream::connect(&path).unwrap();
    half.write_all(b"CONNECT").unwrap();
    let incoming = served.next().await.unwrap();
    served.stop().await;
    assert!(!path.exists());
    assert_closed(&mut half);
    // Who is through is the device's, and lives on.
    incoming.stream.write(&[io::IoSlice::new(b"OK 3\n")]).unwrap();
    let mut got = [0; 5];
    through.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"OK 3\n");
}

#[tokio::test]
async fn a_stopped_tcp_port_refuses_and_can_be_bound_again() {
    let mut served = Served::tcp(PLAIN);
    let _client = served.connect();
    // Closed by us first, so that it lingers in TIME_WAIT on our port.
    drop(served.next().await.unwrap());
    let address = served.address.clone();
    served.stop().await;
    let ListenAddress::Tcp(tcp) = address else {
        panic!("TCP")
    };
    assert_eq!(
        TcpStream::connect(tcp).unwrap_err().kind(),
        io::ErrorKind::ConnectionRefused
    );
    bind(&address).unwrap();
}

#[test]
fn errors_of_tcp_name_the_address_and_the_remedy() {
    let taken = bind(&loopback()).unwrap();
    let error = bind(taken.address()).unwrap_err();
    assert!(matches!(error, ListenError::InUse { .. }), "{error:?}");
    let text = format!(
        "cannot listen on {}: another socket listens there; ",
        Shown(taken.address())
    );
    assert!(error.to_string().starts_with(&text), "{error}");

    // TEST-NET-1, which is nobody's.
    let error = bind(&ListenAddress::Tcp("192.0.2.1:80".parse().unwrap())).unwrap_err();
    assert!(matches!(error, ListenError::NotLocal { .. }), "{error:?}");

    let denied = ListenError::Denied {
        address: "0.0.0.0:80".parse().unwrap(),
        source: Errno::ACCESS.into(),
    };
    assert!(denied.to_string().contains("choose a higher one"), "{denied}");
}

#[test]
fn an_ipv6_listener_leaves_ipv4_alone() {
    let v6 = bind(&ListenAddress::Tcp("[::]:0".parse().unwrap())).unwrap();
    let ListenAddress::Tcp(bound) = *v6.address() else {
        panic!("TCP")
    };
    let v4 = ListenAddress::Tcp(SocketAddr::new("0.0.0.0".parse().unwrap(), bound.port()));
    bind(&v4).unwrap();
}

#[test]
fn what_is_in_a_unix_sockets_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    drop(UnixListener::bind(path("stale")).unwrap());
    let live = UnixListener::bind(path("live")).unwrap();
    std::fs::write(path("regular"), "precious").unwrap();
    for name in ["free", "stale"] {
        let listener = bind(&unix(&path(name))).unwrap();
        let metadata = std::fs::metadata(path(name)).unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o7777, 0o660);
        drop(listener);
        assert!(!path(name).exists());
    }
    for (name, text) in [
        ("live", "is served by another process"),
        ("regular", "is not a socket"),
        ("missing/s", "does not exist"),
        (&*"x".repeat(150), "takes at most 107"),
    ] {
        let error = bind(&unix(&path(name))).unwrap_err().to_string();
        assert!(error.contains(text) && error.contains(name), "{error}");
    }
    UnixStream::connect(path("live")).unwrap();
    live.accept().unwrap();
    assert_eq!(std::fs::read_to_string(path("regular")).unwrap(), "precious");
}

#[test]
fn a_pause_doubles_up_to_a_second_and_starts_anew() {
    let address = loopback();
    let mut pause = Pause::default();
    let error = io::Error::from(Errno::MFILE);
    let mut lengths = Vec::new();
    for _ in 0..7 {
        pause.begin(&address, &error);
        lengths.push(pause.length.as_millis());
    }
    assert_eq!(lengths, [50, 100, 200, 400, 800, 1000, 1000]);
    let since = pause.since.unwrap();
    pause.begin(&address, &error);
    assert_eq!(pause.since, Some(since), "one episode, one warning");
    pause.end(&address);
    pause.begin(&address, &error);
    assert_eq!(pause.length, Pause::FIRST);
}

#[test]
fn a_lack_of_our_own_is_not_the_clients_fault() {
    for errno in [Errno::CONNABORTED, Errno::PROTO, Errno::NETUNREACH, Errno::INTR] {
        assert!(is_clients_fault(&errno.into()), "{errno}");
    }
    for errno in [
        Errno::MFILE,
        Errno::NFILE,
        Errno::NOMEM,
        Errno::NOBUFS,
        Errno::PERM,
        Errno::BADF,
    ] {
        assert!(!is_clients_fault(&errno.into()), "{errno}");
    }
}

/// The limit is the process's, so this runs [`without_descriptors`] in a process of its own.
#[test]
fn without_descriptors_it_waits_and_goes_on() {
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--ignored",
            "--nocapture",
            "host::listen::tests::without_descriptors",
        ])
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && out.contains("1 passed"),
        "{out}{}",
        String::from_utf8_lossy(&child.stderr)
    );
}

#[tokio::test]
#[ignore = "lowers a limit of the process; run by without_descriptors_it_waits_and_goes_on"]
async fn without_descriptors() {
    let stat = std::fs::File::open("/proc/self/stat").unwrap();
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let mut served = Served::tcp(PLAIN);
    // Runs once, so that whatever opens descriptors lazily has done so.
    let _client = served.connect();
    let _incoming = served.next().await.unwrap();

    let lower = rustix::process::Rlimit {
        current: Some(64),
        maximum: limit.maximum,
    };
    rustix::process::setrlimit(Resource::Nofile, lower).unwrap();
    let waiting = [served.connect(), served.connect()];
    let mut hoard = Vec::new();
    while let Ok(fd) = waiting[0].try_clone() {
        hoard.push(fd);
    }
    // Two pauses at least: nothing comes, and the thread is not busy. A loop that spins has a third of the time even where
    // it shares the processor with others.
    let busy = cpu_time(&stat);
    assert!(timeout(Duration::from_millis(300), served.next()).await.is_err());
    let busy = cpu_time(&stat) - busy;
    assert!(busy < Duration::from_millis(60), "{busy:?}");
    drop(hoard);
    for client in &waiting {
        let incoming = timeout(LONG, served.next()).await.expect("goes on").unwrap();
        assert_eq!(incoming.peer, client.local_addr().unwrap().to_string());
    }
    rustix::process::setrlimit(Resource::Nofile, limit).unwrap();
}

/// Processor time of this process, in user mode and in the kernel, by /proc/self/stat (fields 14 and 15, proc(5)); only
/// its name may contain spaces, and ends with the last parenthesis.
fn cpu_time(stat: &std::fs::File) -> Duration {
    let mut text = [0; 1024];
    let length = stat.read_at(&mut text, 0).unwrap();
    let text = String::from_utf8_lossy(&text[..length]);
    let (_, fields) = text.rsplit_once(')').unwrap();
    let ticks = |n: usize| {
        fields
            .split_whitespace()
            .nth(n - 3)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    Duration::from_millis((ticks(14) + ticks(15)) * 10)
}

fn allowing(ranges: &[(&str, u8)]) -> Vec<Cidr> {
    let range = |(ip, prefix): &(&str, u8)| Cidr::new(ip.parse().unwrap(), *prefix).unwrap();
    ranges.iter().map(range).collect()
}

/// Closed before a byte of it was read, and so before anybody could make it say something.
#[tokio::test]
async fn a_client_that_is_not_allowed_is_closed_at_once() {
    for protocol in [PLAIN, InboundProtocol::Connect] {
        let listener = bind(&loopback()).unwrap();
        let allow = allowing(&[("127.0.0.2", 32), ("::", 0)]);
        let mut served = Served::allowing(listener, allow, protocol);
        let mut stranger = served.connect();
        let _ = stranger.write_all(b"CONNECT 22\n");
        let rejected = served.next().await.unwrap_err();
        assert_eq!(
            rejected,
            Rejected {
                peer: stranger.local_addr().unwrap().to_string(),
                why: Rejection::NotAllowed
            }
        );
        assert_closed(&mut stranger);

        // Loopback has 2^24 addresses, so a client can come from the one that is allowed.
        let ListenAddress::Tcp(address) = served.address else {
            panic!("not a TCP listener")
        };
        let friend = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        friend
            .bind(&"127.0.0.2:0".parse::<SocketAddr>().unwrap().into())
            .unwrap();
        friend.connect(&address.into()).unwrap();
        friend.send(b"CONNECT 22\n").unwrap();
        let incoming = served.next().await.unwrap();
        assert!(incoming.peer.starts_with("127.0.0.2:"), "{}", incoming.peer);
        served.stop().await;
    }
}

#[tokio::test]
async fn an_ipv6_client_is_held_against_the_ipv6_ranges() {
    let address = ListenAddress::Tcp("[::1]:0".parse().unwrap());
    for (ranges, is_allowed) in [
        (allowing(&[("10.0.0.0", 8), ("::1", 128)]), true),
        (allowing(&[("0.0.0.0", 0), ("fd00::", 8)]), false),
    ] {
        let mut served = Served::allowing(bind(&address).unwrap(), ranges, PLAIN);
        let _client = served.connect();
        assert_eq!(served.next().await.is_ok(), is_allowed);
        served.stop().await;
    }
}

/// A socket of both families shows an IPv4 peer so; ours are none, today.
#[test]
fn an_ipv4_client_in_ipv6_clothes_is_an_ipv4_client() {
    let client = |ip: Option<&str>| {
        let (socket, _) = UnixStream::pair().unwrap();
        Client {
            socket: socket.into(),
            kind: Kind::stream(Transport::Tcp),
            ip: ip.map(|ip| ip.parse().unwrap()),
            peer: String::new(),
            descriptor: None,
        }
    };
    let allow = allowing(&[("10.0.0.0", 8)]);
    assert!(client(Some("::ffff:10.1.2.3")).is_allowed(&allow));
    assert!(!client(Some("::ffff:11.1.2.3")).is_allowed(&allow));
    assert!(
        !client(None).is_allowed(&allow),
        "nobody knows where it comes from"
    );
    assert!(client(None).is_allowed(&[]));
}

/// A client's socket of messages, connected.
fn packet_client(path: &Path) -> HostStream {
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    socket.connect(&socket2::SockAddr::unix(path).unwrap()).unwrap();
    HostStream::new(socket).unwrap()
}

#[tokio::test]
async fn a_packet_listener_gives_out_packet_sockets() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut served = Served::packets(&path);
    let client = packet_client(&path);
    let stream = served.next().await.unwrap().stream;
    assert!(stream.is_packet() && !stream.is_tcp());
    let fd = stream.as_fd();
    assert!(SockRef::from(&fd).nonblocking().unwrap());

    // What an accepted socket does not inherit: empty messages are seen, and the longest usual one fits.
    client.send_packet(&[]).unwrap();
    let mut got = Vec::new();
    assert_eq!(stream.receive_packet(&mut got, 8).unwrap(), Packet::Message);
    assert_eq!(got, b"");
    let long = vec![7; 256 * 1024];
    let sent = rustix::net::send(&stream, &long, rustix::net::SendFlags::NOSIGNAL);
    assert_eq!(sent.unwrap(), long.len());
    assert_eq!(
        client.receive_packet(&mut got, long.len()).unwrap(),
        Packet::Message
    );
    assert_eq!(got, long);
    served.stop().await;
    assert!(!path.exists());
}

/// A stale file says nothing of the type of the socket that was there.
#[tokio::test]
async fn a_listener_of_either_type_takes_the_place_of_a_stale_one_of_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let served = Served::packets(&path);
    let error = bind(&unix(&path)).unwrap_err().to_string();
    assert!(error.contains("served by another process"), "{error}");
    packet_client(&path);
    served.stop().await;

    drop(Listener::bind(&unix(&path), SocketType::Seqpacket).unwrap());
    bind(&unix(&path)).unwrap();
}

/// The budget of descriptors is used up: a client learns it at once, by a reset, and when one is given back the next is let in.
#[tokio::test]
async fn a_client_beyond_the_budget_of_descriptors_is_closed_and_named() {
    let pool = Pool::new(Some(1));
    let listener = bind(&loopback()).unwrap().within(Arc::clone(&pool));
    let mut served = Served::new(listener, PLAIN);
    let _first = served.connect();
    let held = served.next().await.unwrap();
    assert_eq!(pool.used(), 1);

    let mut second = served.connect();
    let refused = served.next().await.unwrap_err();
    assert_eq!(refused.why, Rejection::NoDescriptors);
    second.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let error = second.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);

    // The descriptor goes with the socket, wherever that is taken.
    drop(held.stream);
    assert_eq!(pool.used(), 0);
    let _third = served.connect();
    assert!(served.next().await.is_ok());
    served.stop().await;
}

/// Clients that have not sent their line yet have a descriptor too, which is given back however they end.
#[tokio::test]
async fn a_client_without_a_line_holds_a_descriptor() {
    let pool = Pool::new(Some(2));
    let listener = bind(&loopback()).unwrap().within(Arc::clone(&pool));
    let mut served = Served::new(listener, InboundProtocol::Connect);
    let silent = served.connect();
    let mut wrong = served.connect();
    wrong.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(served.next().await.unwrap_err().why, Rejection::NotConnect);
    assert_eq!(pool.used(), 1, "the silent one's");
    drop(silent);
    assert_eq!(served.next().await.unwrap_err().why, Rejection::Closed);
    assert_eq!(pool.used(), 0);
    served.stop().await;
}

/// A reload: the socket stays, who is accepted from then on is judged anew, and who has not sent its line yet belongs to whom it
/// came to.
#[tokio::test]
async fn other_terms_are_for_those_who_come_after() {
    let mut served = Served::tcp(InboundProtocol::Connect);
    let mut early = served.connect();
    early.write_all(b"CONNECT ").unwrap();
    // Handled in order: when this one is, the other one was accepted.
    let mut first = served.connect();
    first.write_all(b"CONNECT 1\n").unwrap();
    assert_eq!(served.next().await.unwrap().port, 1);

    let (other, mut out) = terms(PLAIN, Vec::new());
    served.terms.send_replace(other);
    let _plain = served.connect();
    assert_eq!(out.recv().await.unwrap().unwrap().port, 22);
    early.write_all(b"2\n").unwrap();
    let incoming = served.next().await.unwrap();
    assert_eq!((incoming.port, incoming.wants_ok), (2, true));

    let (strict, mut out) = terms(PLAIN, allowing(&[("10.0.0.0", 8)]));
    served.terms.send_replace(strict);
    let _stranger = served.connect();
    assert_eq!(out.recv().await.unwrap().unwrap_err().why, Rejection::NotAllowed);
    served.stop().await;
}
