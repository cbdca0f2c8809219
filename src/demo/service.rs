//! The services that the guest reaches: a page over HTTP, and a sink and source of bulk data. Plain TCP on loopback.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Error, http};

const PAGE: &str = "Hello from a TCP service that knows nothing of vsock.\n";

/// Asks the bulk service to take bytes; it answers with how many there were and whether all were right.
pub(super) const SINK: &str = "SINK\n";
/// Asks the bulk service to send bytes until the connection ends.
pub(super) const SOURCE: &str = "SOURCE\n";

/// How many bytes one read or write of bulk data has.
pub(super) const CHUNK: usize = 64 * 1024;

/// How long a connection of the demo may stand still.
const PATIENCE: Duration = Duration::from_secs(10);

/// The services, until dropped.
#[derive(Debug)]
pub(super) struct Services {
    /// Where the HTTP service listens.
    pub(super) http: SocketAddr,
    /// Where the bulk service listens.
    pub(super) bulk: SocketAddr,
    stopping: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Services {
    /// Starts them on ports that the kernel chooses.
    pub(super) fn start() -> Result<Services, Error> {
        let mut services = Services {
            http: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            bulk: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            stopping: Arc::default(),
            threads: Vec::new(),
        };
        services.http = services.serve("demo-http", |stream| http::serve(stream, PAGE))?;
        services.bulk = services.serve("demo-bulk", serve_bulk)?;
        Ok(services)
    }

    fn serve(
        &mut self,
        name: &str,
        handle: impl Fn(TcpStream) -> io::Result<()> + Copy + Send + 'static,
    ) -> Result<SocketAddr, Error> {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(Error::io("bind a service to 127.0.0.1"))?;
        let address = listener
            .local_addr()
            .map_err(Error::io("ask for a service's port"))?;
        let stopping = Arc::clone(&self.stopping);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    if stopping.load(Ordering::Relaxed) {
                        return;
                    }
                    // One at a time: the demo has one client. A stream that fails concerns that client only.
                    let _ = stream.set_read_timeout(Some(PATIENCE));
                    let _ = stream.set_write_timeout(Some(PATIENCE));
                    let _ = stream.set_nodelay(true);
                    let _ = handle(stream);
                }
            })
            .map_err(Error::io("start a service's thread"))?;
        self.threads.push(thread);
        Ok(address)
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        for address in [self.http, self.bulk] {
            // accept() returns for a connection.
            let _ = TcpStream::connect(address);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve_bulk(stream: TcpStream) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(CHUNK, &stream);
    let mut wish = String::new();
    reader.by_ref().take(16).read_line(&mut wish)?;
    let pattern = Pattern::new();
    match wish.as_str() {
        SINK => {
            let mut count = 0;
            let mut correct = true;
            let mut bytes = vec![0; CHUNK];
            loop {
                let len = reader.read(&mut bytes)?;
                if len == 0 {
                    break;
                }
                correct &= pattern.matches(count, &bytes[..len]);
                count += len as u64;
            }
            let verdict = if correct { "intact" } else { "damaged" };
            (&stream).write_all(format!("{count} {verdict}\n").as_bytes())
        }
        SOURCE => loop {
            (&stream).write_all(pattern.chunk())?;
        },
        _ => Ok(()),
    }
}

/// The bulk data: a sequence that repeats every [`CHUNK`] bytes and nowhere within.
#[derive(Debug)]
pub(super) struct Pattern(Vec<u8>);

impl Pattern {
    pub(super) fn new() -> Pattern {
        let hash = |i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8;
        Pattern((0..CHUNK as u32).map(hash).collect())
    }

    /// The first [`CHUNK`] bytes, which are also the next, and so on.
    pub(super) fn chunk(&self) -> &[u8] {
        &self.0
    }

    /// Whether these bytes are the data from `offset` on.
    pub(super) fn matches(&self, offset: u64, mut bytes: &[u8]) -> bool {
        let mut at = (offset % CHUNK as u64) as usize;
        while !bytes.is_empty() {
            let len = bytes.len().min(CHUNK - at);
            let (now, later) = bytes.split_at(len);
            if now != &self.0[at..at + len] {
                return false;
            }
            (bytes, at) = (later, 0);
        }
        true
    }
}
