//! What the guest does on a connection: a list of steps, written as words in a command.
//!
//! | step | does |
//! |---|---|
//! | `send:bytes=N,chunk=C,seed=S` | writes N bytes of the pattern S, C at a time (65536) |
//! | `recv:bytes=N,chunk=C,seed=S` | reads N bytes, without `bytes` until the peer's end; with `seed` compares them |
//! | `exchange:bytes=N,chunk=C,seed=S` | writes and reads N bytes at the same time, as a client of an echo service |
//! | `text:WORD` | writes the text that WORD stands for (`text`) |
//! | `head` | reads to an empty line, the end of an HTTP request |
//! | `keep` | reads to the peer's end, 4 KiB at most, and gives it back as `kept=WORD` |
//! | `echo` | sends back what comes, until the peer's end |
//! | `write:bytes=N,chunk=C` | writes N bytes of nothing in particular, C at a time |
//! | `read:bytes=N,chunk=C` | reads N bytes and looks at none |
//! | `ask:count=N,bytes=B` | N times: writes B bytes, reads as many; how long each took comes as `p50_ns=`, `p99_ns=`, `p999_ns=` |
//! | `shutwr`, `shutrd` | shuts one direction down |
//! | `gate:NAME` | goes on only after the command `open NAME` |
//!
//! A connection is closed after the last step. What `text`, `head`, `keep`, `write`, `read` and `ask` write and read is no part of
//! the digests: the last three are for measurements, where making and comparing data would be most of the time.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::pattern::{Digest, Pattern};
use crate::text;

/// The host's CID, `VMADDR_CID_HOST`.
const HOST: u32 = 2;
const ANY: u32 = u32::MAX;
/// How much text a step takes in.
const KEPT: usize = 4096;

/// One thing to do on a connection.
#[derive(Clone, Debug)]
pub enum Step {
    /// Writes a pattern.
    Send(Bulk),
    /// Reads, and compares when a seed is given.
    Receive(Bulk),
    /// Both at once.
    Exchange(Bulk),
    /// Writes a text.
    Text(Vec<u8>),
    /// Reads an HTTP request, as far as it goes without a body.
    Head,
    /// Reads what the answer then tells.
    Keep,
    /// Sends back what comes.
    Echo,
    /// Writes, without a pattern.
    Write(Bulk),
    /// Reads, without a look.
    Read(Bulk),
    /// Round trips.
    Ask(Bulk),
    /// Shuts one direction down.
    Shut(Shutdown),
    /// Waits for the command that opens this gate.
    Gate(String),
}

/// Parameters of a transfer.
#[derive(Clone, Debug)]
pub struct Bulk {
    bytes: Option<u64>,
    chunk: usize,
    seed: Option<u64>,
    /// How often.
    count: usize,
}

/// What went over a connection so far.
#[derive(Default)]
pub struct Outcome {
    /// Time of `connect`.
    pub connect: Duration,
    /// Bytes written.
    pub sent: Digest,
    /// Bytes read.
    pub received: Digest,
    /// What `keep` read.
    pub kept: Option<Vec<u8>>,
    /// How long each round trip of `ask` took.
    pub trips: Vec<Duration>,
}

/// Why a script ended early.
pub enum Fault {
    /// A system call failed.
    Io(io::Error),
    /// Received data differ from the pattern, first at this byte of the stream.
    Different(u64),
    /// The peer's end came before `bytes`.
    Early,
}

impl From<io::Error> for Fault {
    fn from(e: io::Error) -> Fault {
        Fault::Io(e)
    }
}

/// Reads steps from the words of a command.
pub fn parse(words: &[&str]) -> Result<Vec<Step>, String> {
    words
        .iter()
        .map(|word| parse_step(word).ok_or(format!("no such step: {word}")))
        .collect()
}

fn parse_step(word: &str) -> Option<Step> {
    let (name, rest) = word.split_once(':').unwrap_or((word, ""));
    Some(match name {
        "send" => Step::Send(parse_bulk(rest)?),
        "recv" => Step::Receive(parse_bulk(rest)?),
        "exchange" => Step::Exchange(parse_bulk(rest)?),
        "text" => Step::Text(text::decode(rest)?),
        "head" => Step::Head,
        "keep" => Step::Keep,
        "echo" => Step::Echo,
        "write" => Step::Write(parse_bulk(rest)?),
        "read" => Step::Read(parse_bulk(rest)?),
        "ask" => Step::Ask(parse_bulk(rest)?),
        "shutwr" => Step::Shut(Shutdown::Write),
        "shutrd" => Step::Shut(Shutdown::Read),
        "gate" => Step::Gate(rest.to_owned()),
        _ => return None,
    })
}

fn parse_bulk(words: &str) -> Option<Bulk> {
    let mut bulk = Bulk {
        bytes: None,
        chunk: 65536,
        seed: None,
        count: 1,
    };
    for word in words.split(',').filter(|word| !word.is_empty()) {
        let (key, value) = word.split_once('=')?;
        match key {
            "bytes" => bulk.bytes = Some(value.parse().ok()?),
            "chunk" => bulk.chunk = value.parse().ok().filter(|&n| n > 0)?,
            "seed" => bulk.seed = Some(value.parse().ok()?),
            "count" => bulk.count = value.parse().ok()?,
            _ => return None,
        }
    }
    Some(bulk)
}

/// Connects to a port of the host, with the kernel's own timeout of 2 s.
pub fn connect(port: u32) -> io::Result<Socket> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.connect(&SockAddr::vsock(HOST, port))?;
    Ok(socket)
}

/// Listens on a port of the guest.
pub fn listen(port: u32) -> io::Result<Socket> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.bind(&SockAddr::vsock(ANY, port))?;
    socket.listen(128)?;
    Ok(socket)
}

/// Connects and runs the steps. `index` is added to every seed, so that many connections carry different data.
pub fn client(
    port: u32,
    steps: &[Step],
    index: u64,
    connected: impl FnOnce(),
) -> (Outcome, Result<(), Failure>) {
    let mut outcome = Outcome::default();
    let begin = Instant::now();
    let socket = connect(port);
    outcome.connect = begin.elapsed();
    connected();
    let result = match socket {
        Ok(socket) => run(&socket, steps, index, &mut outcome),
        Err(e) => Err(Failure {
            step: "connect".to_owned(),
            fault: Fault::Io(e),
        }),
    };
    (outcome, result)
}

/// A fault and the step it happened in.
pub struct Failure {
    /// The step, or `connect`.
    pub step: String,
    /// What happened.
    pub fault: Fault,
}

/// Runs the steps on an open connection.
pub fn run(socket: &Socket, steps: &[Step], index: u64, outcome: &mut Outcome) -> Result<(), Failure> {
    for step in steps {
        let result = match step {
            Step::Send(bulk) => send(socket, bulk, index, &mut outcome.sent),
            Step::Receive(bulk) => receive(socket, bulk, index, &mut outcome.received),
            Step::Exchange(bulk) => {
                let (sent, received) = (&mut outcome.sent, &mut outcome.received);
                std::thread::scope(|scope| {
                    let sender = spawn_small(scope, || send(socket, bulk, index, sent));
                    let result = receive(socket, bulk, index, received);
                    if result.is_err() {
                        let _ = socket.shutdown(Shutdown::Both);
                    }
                    result.and(sender.join().expect("the sender does not panic"))
                })
            }
            Step::Text(text) => (&*socket).write_all(text).map_err(Fault::from),
            Step::Head => read_head(socket),
            Step::Keep => keep(socket, outcome),
            Step::Echo => echo(socket, outcome),
            Step::Write(bulk) => write(socket, bulk),
            Step::Read(bulk) => read(socket, bulk),
            Step::Ask(bulk) => ask(socket, bulk, &mut outcome.trips),
            Step::Shut(how) => socket.shutdown(*how).map_err(Fault::from),
            Step::Gate(name) => {
                GATES.pass(name);
                Ok(())
            }
        };
        result.map_err(|fault| Failure {
            step: format!("{step:?}").replace(' ', ""),
            fault,
        })?;
    }
    Ok(())
}

/// A scoped thread whose stack fits a hundred of them into a small guest.
pub fn spawn_small<'scope, T: Send + 'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    f: impl FnOnce() -> T + Send + 'scope,
) -> std::thread::ScopedJoinHandle<'scope, T> {
    std::thread::Builder::new()
        .stack_size(256 << 10)
        .spawn_scoped(scope, f)
        .expect("the guest can start threads")
}

fn send(mut socket: &Socket, bulk: &Bulk, index: u64, sent: &mut Digest) -> Result<(), Fault> {
    let mut pattern = Pattern::new(bulk.seed.unwrap_or(0) + index);
    let mut buffer = vec![0; bulk.chunk];
    let mut left = bulk.bytes.unwrap_or(0);
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

fn receive(mut socket: &Socket, bulk: &Bulk, index: u64, received: &mut Digest) -> Result<(), Fault> {
    let mut pattern = bulk.seed.map(|seed| Pattern::new(seed + index));
    let mut buffer = vec![0; bulk.chunk];
    let mut left = bulk.bytes.unwrap_or(u64::MAX);
    while left > 0 {
        let room = left.min(buffer.len() as u64) as usize;
        let n = socket.read(&mut buffer[..room])?;
        if n == 0 {
            return if bulk.bytes.is_some() {
                Err(Fault::Early)
            } else {
                Ok(())
            };
        }
        received.update(&buffer[..n]);
        if let Some(pattern) = &mut pattern {
            pattern.check(&buffer[..n]).map_err(Fault::Different)?;
        }
        left -= n as u64;
    }
    Ok(())
}

/// Byte by byte, so that nothing behind the empty line is taken from the next step.
fn read_head(mut socket: &Socket) -> Result<(), Fault> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if socket.read(&mut byte)? == 0 || head.len() == KEPT {
            return Err(Fault::Early);
        }
        head.extend(byte);
    }
    Ok(())
}

fn keep(socket: &Socket, outcome: &mut Outcome) -> Result<(), Fault> {
    let mut kept = Vec::new();
    socket.take(KEPT as u64).read_to_end(&mut kept)?;
    outcome.kept = Some(kept);
    Ok(())
}

fn echo(mut socket: &Socket, outcome: &mut Outcome) -> Result<(), Fault> {
    let mut buffer = vec![0; 65536];
    loop {
        let n = socket.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        outcome.received.update(&buffer[..n]);
        socket.write_all(&buffer[..n])?;
        outcome.sent.update(&buffer[..n]);
    }
}

fn write(mut socket: &Socket, bulk: &Bulk) -> Result<(), Fault> {
    let buffer = vec![0x55; bulk.chunk];
    let mut left = bulk.bytes.unwrap_or(0);
    while left > 0 {
        let n = left.min(buffer.len() as u64) as usize;
        socket.write_all(&buffer[..n])?;
        left -= n as u64;
    }
    Ok(())
}

fn read(mut socket: &Socket, bulk: &Bulk) -> Result<(), Fault> {
    let mut buffer = vec![0; bulk.chunk];
    let mut left = bulk.bytes.unwrap_or(0);
    while left > 0 {
        let room = left.min(buffer.len() as u64) as usize;
        match socket.read(&mut buffer[..room])? {
            0 => return Err(Fault::Early),
            n => left -= n as u64,
        }
    }
    Ok(())
}

fn ask(mut socket: &Socket, bulk: &Bulk, trips: &mut Vec<Duration>) -> Result<(), Fault> {
    let mut buffer = vec![0; bulk.bytes.unwrap_or(1) as usize];
    trips.reserve(bulk.count);
    for _ in 0..bulk.count {
        let begin = Instant::now();
        socket.write_all(&buffer)?;
        socket.read_exact(&mut buffer)?;
        trips.push(begin.elapsed());
    }
    Ok(())
}

/// The gates that are open.
pub static GATES: Gates = Gates {
    open: Mutex::new(None),
    changed: Condvar::new(),
};

/// Named gates: closed until opened, then open for good.
pub struct Gates {
    open: Mutex<Option<HashSet<String>>>,
    changed: Condvar,
}

impl Gates {
    /// Lets everyone through.
    pub fn open(&self, name: &str) {
        self.open
            .lock()
            .unwrap()
            .get_or_insert_default()
            .insert(name.to_owned());
        self.changed.notify_all();
    }

    /// Blocks until the gate is open.
    fn pass(&self, name: &str) {
        let closed =
            |open: &mut Option<HashSet<String>>| !open.as_ref().is_some_and(|open| open.contains(name));
        drop(
            self.changed
                .wait_while(self.open.lock().unwrap(), closed)
                .unwrap(),
        );
    }
}
