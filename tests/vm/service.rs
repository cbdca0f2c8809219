//! The host's side of a test: services that the guest connects to and clients of the guest's services, with checked data.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use super::pattern::{Digest, Pattern};

/// No read or write of a healthy test takes as long, not even on a loaded machine without KVM.
const PATIENCE: Duration = Duration::from_secs(60);

/// What went over one connection of a service.
#[derive(Debug)]
pub struct Report {
    /// Bytes read.
    pub received: Digest,
    /// Bytes written.
    pub sent: Digest,
    /// How the last operation ended.
    pub end: io::Result<()>,
    /// When.
    pub at: Instant,
}

/// What a service does with a connection; it is closed afterwards.
pub type Behavior = Arc<dyn Fn(&Socket, &mut Report) -> io::Result<()> + Send + Sync>;

/// A service on a unix or TCP socket, which ends when it is dropped.
pub struct Service {
    address: SockAddr,
    reports: Receiver<Report>,
    stopped: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl Service {
    /// A service on a port of 127.0.0.1 that the kernel chooses.
    pub fn tcp(behavior: Behavior) -> Service {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket
            .bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
            .unwrap();
        Service::start(socket, behavior)
    }

    /// A service on a unix socket.
    pub fn unix(path: &Path, behavior: Behavior) -> Service {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        socket.bind(&SockAddr::unix(path).unwrap()).unwrap();
        Service::start(socket, behavior)
    }

    fn start(listener: Socket, behavior: Behavior) -> Service {
        listener.listen(256).unwrap();
        let address = listener.local_addr().unwrap();
        let (report, reports) = channel();
        let stopped = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopped);
        let acceptor = thread::spawn(move || {
            while let Ok((socket, _)) = listener.accept() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let (behavior, report) = (Arc::clone(&behavior), report.clone());
                thread::spawn(move || {
                    socket.set_read_timeout(Some(PATIENCE)).unwrap();
                    socket.set_write_timeout(Some(PATIENCE)).unwrap();
                    let mut about = Report {
                        received: Digest::default(),
                        sent: Digest::default(),
                        end: Ok(()),
                        at: Instant::now(),
                    };
                    about.end = behavior(&socket, &mut about);
                    about.at = Instant::now();
                    drop(socket);
                    let _ = report.send(about);
                });
            }
        });
        Service {
            address,
            reports,
            stopped,
            acceptor: Some(acceptor),
        }
    }

    /// The TCP port; zero for a unix socket.
    pub fn port(&self) -> u16 {
        self.address.as_socket().map_or(0, |address| address.port())
    }

    /// The report of the next connection that ended.
    pub fn next(&self) -> Report {
        match self.reports.recv_timeout(PATIENCE) {
            Ok(report) => report,
            Err(RecvTimeoutError::Timeout) => {
                panic!("no connection of the service ended within {PATIENCE:?}")
            }
            Err(RecvTimeoutError::Disconnected) => panic!("the service has ended"),
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        // Wakes the acceptor; where even this fails it is left to the end of the process.
        let woken =
            Socket::new(self.address.domain(), Type::STREAM, None).and_then(|s| s.connect(&self.address));
        if woken.is_ok()
            && self
                .acceptor
                .take()
                .is_some_and(|acceptor| acceptor.join().is_err())
        {
            eprintln!("a service panicked");
        }
    }
}

/// A TCP port of 127.0.0.1 on which nobody listens, and nobody will while this value lives.
pub struct ClosedPort(Socket);

impl ClosedPort {
    /// Takes a port without listening on it.
    pub fn new() -> ClosedPort {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket
            .bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
            .unwrap();
        ClosedPort(socket)
    }

    /// Its number.
    pub fn port(&self) -> u16 {
        self.0
            .local_addr()
            .unwrap()
            .as_socket()
            .expect("bound to an address above")
            .port()
    }
}

/// Sends back what comes, until the peer's end.
pub fn echo() -> Behavior {
    Arc::new(|mut socket, report| {
        let mut buffer = vec![0; 65536];
        loop {
            let n = socket.read(&mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            report.received.update(&buffer[..n]);
            socket.write_all(&buffer[..n])?;
            report.sent.update(&buffer[..n]);
        }
    })
}

/// Reads until the peer's end.
pub fn sink() -> Behavior {
    Arc::new(|socket, report| receive(socket, None, &mut report.received))
}

/// Sends a pattern, shuts its direction down, then reads until the peer's end.
pub fn source_then_sink(bytes: u64, seed: u64) -> Behavior {
    Arc::new(move |socket, report| {
        send(socket, bytes, seed, &mut report.sent)?;
        socket.shutdown(Shutdown::Write)?;
        receive(socket, None, &mut report.received)
    })
}

/// Reads until the peer's end, then sends a pattern.
pub fn sink_then_source(bytes: u64, seed: u64) -> Behavior {
    Arc::new(move |socket, report| {
        receive(socket, None, &mut report.received)?;
        send(socket, bytes, seed, &mut report.sent)
    })
}

/// Reads nothing until told to, then as [`sink`]. The second value lets one connection go on.
pub fn stalled() -> (Behavior, std::sync::mpsc::Sender<()>) {
    let (go, wait) = channel();
    let wait = Mutex::new(wait);
    let behavior: Behavior = Arc::new(move |socket, report| {
        wait.lock()
            .unwrap()
            .recv_timeout(PATIENCE)
            .map_err(io::Error::other)?;
        receive(socket, None, &mut report.received)
    });
    (behavior, go)
}

/// Connects to a TCP port of 127.0.0.1.
pub fn connect_tcp(port: u16) -> io::Result<Socket> {
    connect(
        Domain::IPV4,
        &SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into(),
    )
}

/// Connects to a unix socket and asks for a port of the guest with the `CONNECT` protocol; an error of kind
/// `UnexpectedEof` when the other end closes without an answer.
pub fn connect_unix(path: &Path, port: u32) -> io::Result<Socket> {
    let socket = connect(Domain::UNIX, &SockAddr::unix(path)?)?;
    (&socket).write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut line = Vec::new();
    // Byte by byte: what follows the line is the guest's.
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        (&socket).read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    let line = String::from_utf8_lossy(&line);
    let number = line
        .strip_prefix("OK ")
        .and_then(|rest| rest.trim_end().parse::<u32>().ok());
    number
        .map(|_| socket)
        .ok_or_else(|| io::Error::other(format!("answer to CONNECT: {line:?}")))
}

fn connect(domain: Domain, address: &SockAddr) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::STREAM, None)?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Writes the first `bytes` bytes of the pattern of `seed`.
pub fn send(mut socket: &Socket, bytes: u64, seed: u64, sent: &mut Digest) -> io::Result<()> {
    let mut pattern = Pattern::new(seed);
    let mut buffer = vec![0; 65536];
    let mut left = bytes;
    while left > 0 {
        let n = left.min(buffer.len() as u64) as usize;
        pattern.fill(&mut buffer[..n]);
        let mut from = 0;
        while from < n {
            let taken = socket.write(&buffer[from..n])?;
            sent.update(&buffer[from..from + taken]);
            from += taken;
        }
        left -= n as u64;
    }
    Ok(())
}

/// Reads until the peer's end, and compares with the pattern of `seed` when there is one.
pub fn receive(mut socket: &Socket, seed: Option<u64>, received: &mut Digest) -> io::Result<()> {
    let mut pattern = seed.map(Pattern::new);
    let mut buffer = vec![0; 65536];
    loop {
        let n = socket.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        received.update(&buffer[..n]);
        if let Some(pattern) = &mut pattern {
            pattern
                .check(&buffer[..n])
                .map_err(|at| io::Error::other(format!("byte {at} differs")))?;
        }
    }
}

/// As a client of an echo service: sends and reads `bytes` at the same time, shuts down, reads to the end.
pub fn exchange(socket: &Socket, bytes: u64, seed: u64) -> io::Result<()> {
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            send(socket, bytes, seed, &mut Digest::default())?;
            socket.shutdown(Shutdown::Write)
        });
        let mut received = Digest::default();
        receive(socket, Some(seed), &mut received)?;
        sender.join().expect("the sender does not panic")?;
        if received.length() != bytes {
            return Err(io::Error::other(format!(
                "{} of {bytes} bytes came back",
                received.length()
            )));
        }
        Ok(())
    })
}
