//! The services behind all contenders: blocking sockets, a thread for each connection.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use slab::Slab;

use crate::contender::Outcome;

/// What a service reads and writes at a time in bulk.
pub const CHUNK: usize = 64 * 1024;

/// Where a service listens.
#[derive(Clone, Debug)]
pub enum Place {
    Tcp,
    Unix(PathBuf),
}

/// Where it is found.
#[derive(Clone, Debug)]
pub enum Address {
    Tcp(u16),
    Unix(PathBuf),
}

impl Address {
    /// As a rule of the configuration has it.
    pub fn url(&self) -> String {
        match self {
            Address::Tcp(port) => format!("tcp://127.0.0.1:{port}"),
            Address::Unix(path) => format!("unix://{}", path.display()),
        }
    }

    pub fn connect(&self) -> io::Result<Stream> {
        Ok(match self {
            Address::Tcp(port) => {
                let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, *port))?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
            Address::Unix(path) => Stream::Unix(UnixStream::connect(path)?),
        })
    }
}

/// What a service does with a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Work {
    /// Reads.
    Sink,
    /// Writes.
    Source,
    /// Does both at once, a thread each.
    Both,
    /// Reads so many bytes, then writes as many, again and again.
    Echo(usize),
    /// Keeps it open.
    Hold,
    /// Reads to the end and closes: one thread for all, since connections come and go.
    Brief,
}

/// A running service. Its threads end with their connections.
pub struct Service {
    pub address: Address,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Nobody is to be served any more.
    over: AtomicBool,
    /// Bytes read so far, by connection in the order in which they came.
    received: Mutex<Vec<Arc<AtomicU64>>>,
    held: Mutex<Vec<Stream>>,
}

impl Service {
    pub fn start(place: &Place, work: Work) -> Outcome<Service> {
        let shared = Arc::new(Shared::default());
        if work == Work::Brief {
            return Service::start_brief(place, shared);
        }
        let serving = shared.clone();
        let address = match place {
            Place::Tcp => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
                let port = listener.local_addr()?.port();
                thread::spawn(move || {
                    for stream in listener.incoming().flatten() {
                        if serving.over.load(Ordering::Relaxed) {
                            break;
                        }
                        let _ = stream.set_nodelay(true);
                        serving.begin(Stream::Tcp(stream), work);
                    }
                });
                Address::Tcp(port)
            }
            Place::Unix(path) => {
                let listener = UnixListener::bind(path)?;
                thread::spawn(move || {
                    for stream in listener.incoming().flatten() {
                        if serving.over.load(Ordering::Relaxed) {
                            break;
                        }
                        serving.begin(Stream::Unix(stream), work);
                    }
                });
                Address::Unix(path.clone())
            }
        };
        Ok(Service { address, shared })
    }

    fn start_brief(place: &Place, shared: Arc<Shared>) -> Outcome<Service> {
        let serving = shared.clone();
        let address = match place {
            Place::Tcp => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
                let port = listener.local_addr()?.port();
                thread::spawn(move || {
                    brief(&listener, &serving.over, || Ok(Stream::Tcp(listener.accept()?.0)))
                });
                Address::Tcp(port)
            }
            Place::Unix(path) => {
                let listener = UnixListener::bind(path)?;
                thread::spawn(move || {
                    brief(&listener, &serving.over, || {
                        Ok(Stream::Unix(listener.accept()?.0))
                    })
                });
                Address::Unix(path.clone())
            }
        };
        Ok(Service { address, shared })
    }

    /// Bytes read so far, by connection in the order in which they came.
    pub fn received(&self) -> Vec<u64> {
        let all = self
            .shared
            .received
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|bytes| bytes.load(Ordering::Relaxed)).collect()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // The thread that accepts sleeps; a last connection wakes it to see that it is over.
        self.shared.over.store(true, Ordering::Relaxed);
        let _ = self.address.connect();
        self.shared
            .held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

impl Shared {
    fn begin(&self, stream: Stream, work: Work) {
        if work == Work::Hold {
            self.held
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(stream);
            return;
        }
        let received = Arc::new(AtomicU64::new(0));
        self.received
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(received.clone());
        thread::spawn(move || {
            // The end of the connection is the end of the work, however it comes.
            let _ = match work {
                Work::Sink => sink(stream, &received),
                Work::Source => source(stream),
                Work::Both => match stream.try_clone() {
                    Ok(other) => {
                        thread::spawn(move || source(other));
                        sink(stream, &received)
                    }
                    Err(error) => Err(error),
                },
                Work::Echo(bytes) => echo(stream, bytes),
                Work::Hold | Work::Brief => Ok(()),
            };
        });
    }
}

fn sink(mut stream: Stream, received: &AtomicU64) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let len = stream.read(&mut chunk)?;
        if len == 0 {
            return Ok(());
        }
        received.fetch_add(len as u64, Ordering::Relaxed);
    }
}

fn source(mut stream: Stream) -> io::Result<()> {
    let chunk = vec![0x55; CHUNK];
    loop {
        stream.write_all(&chunk)?;
    }
}

/// Accepts, reads what comes, and closes at the end, until it is over.
fn brief(listener: impl AsFd, over: &AtomicBool, accept: impl Fn() -> io::Result<Stream>) -> io::Result<()> {
    const LISTENER: u64 = u64::MAX;
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&poller, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
    let mut streams: Slab<Stream> = Slab::new();
    let mut events = Vec::with_capacity(128);
    loop {
        epoll::wait(&poller, spare_capacity(&mut events), None)?;
        for event in events.drain(..) {
            let data = event.data;
            if data.u64() == LISTENER {
                if over.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let Ok(stream) = accept() else { continue };
                let entry = streams.vacant_entry();
                let data = EventData::new_u64(entry.key() as u64);
                epoll::add(&poller, entry.insert(stream), data, EventFlags::IN)?;
                continue;
            }
            let key = data.u64() as usize;
            let Some(stream) = streams.get_mut(key) else {
                continue;
            };
            if matches!(stream.read(&mut [0; 64]), Ok(0) | Err(_)) {
                // Closed, and so out of the set.
                streams.remove(key);
            }
        }
    }
}

fn echo(mut stream: Stream, bytes: usize) -> io::Result<()> {
    let mut chunk = vec![0; bytes];
    loop {
        stream.read_exact(&mut chunk)?;
        stream.write_all(&chunk)?;
    }
}

/// A blocking socket of either family.
#[derive(Debug)]
pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    pub fn try_clone(&self) -> io::Result<Stream> {
        Ok(match self {
            Stream::Tcp(stream) => Stream::Tcp(stream.try_clone()?),
            Stream::Unix(stream) => Stream::Unix(stream.try_clone()?),
        })
    }
}

impl Stream {
    /// Says that no more will come.
    pub fn end(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.shutdown(std::net::Shutdown::Write),
            Stream::Unix(stream) => stream.shutdown(std::net::Shutdown::Write),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Tcp(stream) => stream.as_fd(),
            Stream::Unix(stream) => stream.as_fd(),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(into),
            Stream::Unix(stream) => stream.read(into),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write(bytes),
            Stream::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
