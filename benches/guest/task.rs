//! The host's end: a service that does with a connection what it has been told, and says when and how that went.

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use socket2::Socket;

use crate::contender::Outcome;
use crate::vm::pattern::Pattern;
use crate::vm::service::Service;

/// What the service reads and writes at a time in bulk, as in the other bench.
const CHUNK: usize = 64 * 1024;

/// What a service does with the connections to come.
#[derive(Clone, Copy, Debug)]
pub enum Task {
    /// Reads so many bytes, then writes one as a receipt.
    Take(Bulk),
    /// Writes so many bytes, then reads one as a receipt.
    Give(Bulk),
    /// Reads so many bytes, writes as many, to the end of the connection.
    Answer(usize),
}

/// A transfer.
#[derive(Clone, Copy, Debug)]
pub struct Bulk {
    pub bytes: u64,
    /// What the bytes are made from, to compare them; none: any bytes will do.
    pub seed: Option<u64>,
}

/// How a connection went. Times are the host's.
#[derive(Debug)]
pub struct Done {
    /// When the first byte was there, or was about to be sent.
    pub began: Instant,
    /// When the last byte, the guest's receipt, or the end of the connection was there.
    pub ended: Instant,
    pub result: io::Result<()>,
}

/// A service on a unix socket.
pub struct Tasks {
    next: Arc<Mutex<Task>>,
    done: Receiver<Done>,
    _service: Service,
}

impl Tasks {
    pub fn start(path: &Path) -> Tasks {
        let next = Arc::new(Mutex::new(Task::Answer(1)));
        let (report, done) = channel();
        // A Sender for each connection, out of one that threads may share.
        let (told, report) = (Arc::clone(&next), Mutex::new(report));
        let service = Service::unix(
            path,
            Arc::new(move |socket, _| {
                let task = *told.lock().unwrap_or_else(PoisonError::into_inner);
                let report: Sender<Done> = report.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let (began, result) = carry_out(task, socket);
                let ended = Instant::now();
                let _ = report.send(Done { began, ended, result });
                Ok(())
            }),
        );
        Tasks {
            next,
            done,
            _service: service,
        }
    }

    /// What is to be done with connections from now on.
    pub fn set(&self, task: Task) {
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = task;
    }

    /// How the next connection that ended went, well or not.
    pub fn done(&self, patience: Duration) -> Outcome<Done> {
        self.done
            .recv_timeout(patience)
            .map_err(|_| format!("bytes are missing after {} s", patience.as_secs()).into())
    }
}

/// When it began, and how it ended.
fn carry_out(task: Task, mut socket: &Socket) -> (Instant, io::Result<()>) {
    let mut began = Instant::now();
    let result = match task {
        Task::Take(bulk) => take(socket, bulk, &mut began).and_then(|()| socket.write_all(&[1])),
        Task::Give(bulk) => give(socket, bulk).and_then(|()| socket.read_exact(&mut [0])),
        Task::Answer(bytes) => answer(socket, bytes, &mut began),
    };
    (began, result)
}

fn take(mut socket: &Socket, bulk: Bulk, began: &mut Instant) -> io::Result<()> {
    let mut pattern = bulk.seed.map(Pattern::new);
    let (mut buffer, mut left) = (vec![0; CHUNK], bulk.bytes);
    while left > 0 {
        let room = left.min(CHUNK as u64) as usize;
        let len = socket.read(&mut buffer[..room])?;
        if left == bulk.bytes {
            *began = Instant::now();
        }
        if len == 0 {
            return Err(io::Error::other(format!(
                "the connection ended, and {left} bytes are missing"
            )));
        }
        if let Some(pattern) = &mut pattern {
            let differs = |at| io::Error::other(format!("byte {at} is not what was sent"));
            pattern.check(&buffer[..len]).map_err(differs)?;
        }
        left -= len as u64;
    }
    Ok(())
}

fn give(mut socket: &Socket, bulk: Bulk) -> io::Result<()> {
    let mut pattern = bulk.seed.map(Pattern::new);
    let (mut buffer, mut left) = (vec![0x55; CHUNK], bulk.bytes);
    while left > 0 {
        let len = left.min(CHUNK as u64) as usize;
        if let Some(pattern) = &mut pattern {
            pattern.fill(&mut buffer[..len]);
        }
        socket.write_all(&buffer[..len])?;
        left -= len as u64;
    }
    Ok(())
}

fn answer(mut socket: &Socket, bytes: usize, began: &mut Instant) -> io::Result<()> {
    let (mut buffer, mut first) = (vec![0; bytes], true);
    loop {
        match socket.read_exact(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            result => result?,
        }
        if std::mem::take(&mut first) {
            *began = Instant::now();
        }
        socket.write_all(&buffer)?;
    }
}
