//! The services that the guest reaches: a page over HTTP, and a sink and source of bulk data. Plain TCP on loopback.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::vm::pattern;
use super::{Error, http};

const PAGE: &str = "Hello from a TCP service that knows nothing of vsock.\n";

/// Asks the bulk service to take bytes; it answers with how many there were and whether all were right.
pub(super) const SINK: &str = "SINK\n";
/// Asks the bulk service to send bytes until the connection ends.
pub(super) const SOURCE: &str = "SOURCE\n";

/// Asks the bulk service to take bytes; it answers with how many there were and their digest. For guests whose data come
/// from [`pattern`].
pub(super) const DIGEST: &str = "DIGEST\n";
/// Asks the bulk service to send so many bytes of the pattern of a seed: `PATTERN bytes seed`.
pub(super) const PATTERN: &str = "PATTERN";

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
    /// Bytes of bulk data that went through so far, for progress bars.
    pub(super) moved: Arc<AtomicU64>,
    stopping: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Services {
    /// Starts them on ports that the kernel chooses.
    pub(super) fn start() -> Result<Services, Error> {
        let mut services = Services {
            http: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            bulk: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            moved: Arc::default(),
            stopping: Arc::default(),
            threads: Vec::new(),
        };
        services.http = services.serve("demo-http", |stream| http::serve(stream, PAGE))?;
        services.bulk = {
            let moved = Arc::clone(&services.moved);
            services.serve("demo-bulk", move |stream| serve_bulk(stream, &moved))?
        };
        Ok(services)
    }

    fn serve(
        &mut self,
        name: &str,
        handle: impl Fn(TcpStream) -> io::Result<()> + Send + 'static,
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

fn serve_bulk(stream: TcpStream, moved: &AtomicU64) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(CHUNK, &stream);
    let mut wish = String::new();
    reader.by_ref().take(64).read_line(&mut wish)?;
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
        DIGEST => {
            let mut digest = pattern::Digest::default();
            let mut bytes = vec![0; CHUNK];
            loop {
                let len = reader.read(&mut bytes)?;
                if len == 0 {
                    break;
                }
                digest.update(&bytes[..len]);
                moved.fetch_add(len as u64, Ordering::Relaxed);
            }
            (&stream).write_all(format!("{} {:016x}\n", digest.length(), digest.finish()).as_bytes())
        }
        wish => match wish.split_whitespace().collect::<Vec<_>>().as_slice() {
            [PATTERN, bytes, seed] => {
                let number = |word: &str| word.parse().map_err(io::Error::other);
                send_pattern(&stream, number(bytes)?, number(seed)?, moved)
            }
            _ => Ok(()),
        },
    }
}

fn send_pattern(mut stream: &TcpStream, bytes: u64, seed: u64, moved: &AtomicU64) -> io::Result<()> {
    let mut data = pattern::Pattern::new(seed);
    let mut buffer = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let chunk = &mut buffer[..left.min(CHUNK as u64) as usize];
        data.fill(chunk);
        stream.write_all(chunk)?;
        left -= chunk.len() as u64;
        moved.fetch_add(chunk.len() as u64, Ordering::Relaxed);
    }
    Ok(())
}

/// The embedded guest's bulk data, which cost next to nothing to make: a sequence that repeats every [`CHUNK`] bytes and nowhere within.
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
