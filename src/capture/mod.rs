//! A guest's packets as a pcapng file that is written while it is read: for Wireshark, tshark and tcpdump.
//!
//! ```text
//!   device thread                                    admin thread
//!   Tap: record, record, flush  ──chunks, bounded──> Recording: poll_next  ──> the client
//! ```
//!
//! A [`Tap`] is given to the device thread, which offers it each packet: the header as it was judged or written, and the first
//! bytes of the payload. It makes blocks of them and passes those on once a turn, never waiting: a reader that is too slow
//! loses packets, the guest loses nothing. The [`Recording`] is the file: what it begins with, the blocks, statistics once a
//! second and at its end.
//!
//! The statistics say how many packets are missing. They are also how a client that has left is noticed while the guest is
//! silent: nothing else would be written to it.
//!
//! # Invariants
//!
//! 1. No more than [`Options::queue`] bytes of blocks wait for the reader; a packet beyond that is dropped and counted. One tap
//!    is the only writer of its queue, so that a look before each packet is enough.
//! 2. A file is whole blocks, in the order in which the device dealt with the packets, and their times never go back: they are
//!    those of a monotonic clock, from the wall clock's time at the beginning on.
//! 3. A recording ends when its time is up, whatever the device does, or when its tap is dropped; a tap is closed when its
//!    recording is dropped.

#![forbid(unsafe_code)]

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Sleep;

mod pcapng;
#[cfg(test)]
pub(crate) mod tests;
mod vsockmon;

use crate::metrics::Direction;
use crate::vsock::header::{HEADER_LEN, Header};
use vsockmon::VSOCKMON_LEN;

/// Bytes of every packet of a file that come before payload.
pub const HEADERS_LEN: usize = VSOCKMON_LEN + HEADER_LEN;

/// How often a file says how many packets it lacks.
const PULSE: Duration = Duration::from_secs(1);
/// Blocks are passed on at this length even if the turn is not over, and together until they have it.
const CHUNK: usize = 64 * 1024;
/// What a chunk costs in memory beside its bytes, at most: small ones must not be free of charge.
const CHUNK_COST: usize = 96;

/// What is to be captured, and how much of it.
#[derive(Clone, Debug)]
pub struct Options {
    /// The guest's name; the interface in the file has it.
    pub guest: String,
    /// The guest's context identifier.
    pub cid: u32,
    /// How long.
    pub duration: Duration,
    /// Most payload bytes of a packet. Headers are always whole.
    pub snaplen: u32,
    /// Most bytes that wait for the reader.
    pub queue: usize,
}

/// A capture: the end for the device, and the file. To be called in a tokio runtime with time, whose thread reads the file.
pub fn capture(options: &Options) -> (Tap, Recording) {
    let clock = Clock::new();
    let (sender, queue) = unbounded_channel();
    let shared = Arc::<Shared>::default();
    let tap = Tap {
        snaplen: options.snaplen,
        most_queued: options.queue,
        clock,
        blocks: Vec::new(),
        packets: 0,
        shared: Arc::clone(&shared),
        queue: sender,
    };
    let head = pcapng::head(
        concat!("vsock-sidecar ", env!("CARGO_PKG_VERSION")),
        &options.guest,
        &format!("vsock of guest {} (CID {})", options.guest, options.cid),
        options.snaplen.saturating_add(HEADERS_LEN as u32),
    );
    let recording = Recording {
        head: Some(head),
        queue,
        shared,
        clock,
        packets: 0,
        end: Box::pin(tokio::time::sleep(options.duration)),
        pulse: Box::pin(tokio::time::sleep(PULSE)),
        ended: false,
    };
    (tap, recording)
}

/// Where the device puts packets. Never waits.
#[derive(Debug)]
pub struct Tap {
    snaplen: u32,
    most_queued: usize,
    clock: Clock,
    /// Blocks that have not been passed on.
    blocks: Vec<u8>,
    /// How many packets are in them.
    packets: u64,
    shared: Arc<Shared>,
    queue: UnboundedSender<Chunk>,
}

impl Tap {
    /// Takes a packet: its header, and what is known of its payload, of which it keeps the first bytes. `payload_len` is how much
    /// payload the packet has. `false` if the packet was dropped, since the reader has not taken those before.
    pub fn record(
        &mut self,
        direction: Direction,
        header: &[u8; HEADER_LEN],
        payload: &[u8],
        payload_len: u32,
    ) -> bool {
        let kept = payload.get(..self.snaplen as usize).unwrap_or(payload);
        let waiting = self.shared.queued.load(Ordering::Relaxed) + self.blocks.len();
        let needs = pcapng::PACKET_OVERHEAD + HEADERS_LEN + kept.len().next_multiple_of(4) + CHUNK_COST;
        // Invariant 1.
        if waiting.saturating_add(needs) > self.most_queued {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        let monitor = vsockmon::header(&Header::decode(header));
        let original = payload_len.saturating_add(HEADERS_LEN as u32);
        let parts = [&monitor[..], header, kept];
        pcapng::packet(&mut self.blocks, self.clock.now(), direction, parts, original);
        self.packets += 1;
        if self.blocks.len() >= CHUNK {
            self.flush();
        }
        true
    }

    /// Passes on what was taken.
    pub fn flush(&mut self) {
        if self.blocks.is_empty() {
            return;
        }
        let chunk = Chunk {
            blocks: std::mem::take(&mut self.blocks),
            packets: std::mem::take(&mut self.packets),
        };
        self.shared.queued.fetch_add(chunk.cost(), Ordering::Relaxed);
        // A recording that is gone misses nothing.
        let _ = self.queue.send(chunk);
    }

    /// Most payload bytes of a packet.
    pub fn snaplen(&self) -> u32 {
        self.snaplen
    }

    /// Whether the recording has ended.
    pub fn is_closed(&self) -> bool {
        self.queue.is_closed()
    }
}

/// The file, in pieces. Dropping it closes the tap.
#[derive(Debug)]
pub struct Recording {
    head: Option<Vec<u8>>,
    queue: UnboundedReceiver<Chunk>,
    shared: Arc<Shared>,
    clock: Clock,
    /// Packets that have been given to the reader.
    packets: u64,
    end: Pin<Box<Sleep>>,
    /// When to say something although there are no packets.
    pulse: Pin<Box<Sleep>>,
    ended: bool,
}

impl Recording {
    /// The next piece of the file, whole blocks; `None` when it is complete.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Vec<u8>>> {
        if let Some(head) = self.head.take() {
            return Poll::Ready(Some(head));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        if !self.queue.is_closed() && self.end.as_mut().poll(cx).is_ready() {
            // What is in it still comes out.
            self.queue.close();
        }
        if self.pulse.as_mut().poll(cx).is_ready() {
            self.pulse.as_mut().reset(tokio::time::Instant::now() + PULSE);
            return Poll::Ready(Some(self.statistics()));
        }
        let Some(chunk) = ready!(self.queue.poll_recv(cx)) else {
            self.ended = true;
            return Poll::Ready(Some(self.statistics()));
        };
        let mut blocks = self.receive(chunk);
        while blocks.len() < CHUNK
            && let Ok(next) = self.queue.try_recv()
        {
            blocks.append(&mut self.receive(next));
        }
        Poll::Ready(Some(blocks))
    }

    fn receive(&mut self, chunk: Chunk) -> Vec<u8> {
        self.shared.queued.fetch_sub(chunk.cost(), Ordering::Relaxed);
        self.packets += chunk.packets;
        chunk.blocks
    }

    fn statistics(&self) -> Vec<u8> {
        let dropped = self.shared.dropped.load(Ordering::Relaxed);
        let began = self.clock.began;
        pcapng::statistics(self.clock.now(), began, self.packets + dropped, dropped)
    }
}

/// Blocks on their way from the tap to the recording.
#[derive(Debug)]
struct Chunk {
    blocks: Vec<u8>,
    packets: u64,
}

impl Chunk {
    fn cost(&self) -> usize {
        self.blocks.len() + CHUNK_COST
    }
}

/// What both ends count. Only numbers: nothing is ordered by them.
#[derive(Default, Debug)]
struct Shared {
    /// Cost of the chunks in the queue. The tap adds, the recording subtracts.
    queued: AtomicUsize,
    /// Packets that found no room.
    dropped: AtomicU64,
}

/// The time of day that nobody can set back.
#[derive(Clone, Copy, Debug)]
struct Clock {
    /// When the capture began, since 1970.
    began: Duration,
    since: Instant,
}

impl Clock {
    fn new() -> Clock {
        Clock {
            began: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            since: Instant::now(),
        }
    }

    fn now(&self) -> Duration {
        self.began.saturating_add(self.since.elapsed())
    }
}
