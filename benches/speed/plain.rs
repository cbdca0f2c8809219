//! The yardstick: clients of the services with nothing between, and with a thread between that passes on.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::bulk::{Direction, Load};
use crate::contender::{Contender, Measures, Outcome, quantiles};
use crate::process;
use crate::service::{Service, Stream, Work};
use crate::through::{Kind, PORT};

/// Clients that read or write in bulk: one a stream, each on a thread of its own if they are several.
pub struct Clients {
    streams: Vec<Stream>,
    service: Service,
    load: Load,
    /// What each reads into: its buffers, one behind the other.
    memory: Vec<Vec<u8>>,
    _dir: tempfile::TempDir,
}

/// One client's work; the bytes it read, and the processor time it took.
type Job<'j> = Box<dyn FnOnce() -> std::io::Result<(u64, Duration)> + Send + 'j>;

impl Clients {
    /// Each with one buffer, which stays in the processor's cache.
    pub fn start(load: Load) -> Outcome<Clients> {
        Clients::with_buffers(load, 1)
    }

    /// Each with as many buffers as the guest posts: what a ring of them costs, whoever fills it.
    pub fn spread(load: Load) -> Outcome<Clients> {
        Clients::with_buffers(load, load.ring.into())
    }

    fn with_buffers(load: Load, buffers: usize) -> Outcome<Clients> {
        let dir = tempfile::tempdir()?;
        let service = Service::start(&load.kind.place(dir.path(), PORT), load.work())?;
        let count = load.streams * load.guests as usize;
        let streams = (0..count)
            .map(|_| service.address.connect())
            .collect::<Result<_, _>>()?;
        Ok(Clients {
            streams,
            service,
            load,
            // Touched before there is a clock.
            memory: vec![vec![0x55; load.size as usize * buffers]; count],
            _dir: dir,
        })
    }

    /// Works until then; bytes that each client read, and the processor time of all of them.
    fn run(&mut self, until: Instant) -> Outcome<(Vec<u64>, Duration)> {
        let size = self.load.size as usize;
        let mut jobs: Vec<Job<'_>> = Vec::new();
        for (stream, memory) in self.streams.iter_mut().zip(&mut self.memory) {
            let direction = self.load.direction;
            if direction == Direction::Both {
                let mut other = stream.try_clone()?;
                jobs.push(Box::new(move || write_until(&mut other, size, until)));
            }
            jobs.push(Box::new(move || match direction {
                Direction::Out => write_until(stream, size, until),
                Direction::In | Direction::Both => read_until(stream, size, memory, until),
            }));
        }
        let done = if jobs.len() == 1 {
            jobs.into_iter().map(|job| job()).collect()
        } else {
            thread::scope(|scope| {
                let threads: Vec<_> = jobs.into_iter().map(|job| scope.spawn(job)).collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().expect("a client's thread ends"))
                    .collect::<Vec<_>>()
            })
        };
        let done: Vec<(u64, Duration)> = done.into_iter().collect::<Result<_, _>>()?;
        let cpu = done.iter().map(|(_, cpu)| *cpu).sum();
        Ok((done.into_iter().map(|(bytes, _)| bytes).collect(), cpu))
    }
}

impl Contender for Clients {
    fn turn(&mut self, window: Duration) -> Outcome<Measures> {
        self.run(Instant::now() + window / 5)?;
        let (began, taken) = (Instant::now(), self.service.received());
        let (read, cpu) = self.run(began + window)?;
        let taken_now = self.service.received();
        let seconds = began.elapsed().as_secs_f64();
        let out: Vec<u64> = taken_now
            .iter()
            .zip(&taken)
            .map(|(now, before)| now - before)
            .collect();
        let bytes = (out.iter().sum::<u64>() + read.iter().sum::<u64>()) as f64;
        let streams = if self.load.direction == Direction::Out {
            &out
        } else {
            &read
        };
        let fewest = streams
            .iter()
            .copied()
            .filter(|bytes| *bytes > 0)
            .min()
            .unwrap_or(0)
            .max(1);
        let most = streams.iter().copied().max().unwrap_or(0);
        Ok(vec![
            ("rate", bytes / seconds / 1e9),
            ("cpu", cpu.as_secs_f64() / (bytes / 1e9)),
            ("max/min", most as f64 / fewest as f64),
            ("busy", cpu.as_secs_f64() / seconds),
        ])
    }
}

fn write_until(stream: &mut Stream, size: usize, until: Instant) -> std::io::Result<(u64, Duration)> {
    let (began, chunk) = (process::cpu_of_this_thread(), vec![0x55; size]);
    while Instant::now() < until {
        stream.write_all(&chunk)?;
    }
    Ok((0, process::cpu_of_this_thread() - began))
}

fn read_until(
    stream: &mut Stream,
    size: usize,
    memory: &mut [u8],
    until: Instant,
) -> std::io::Result<(u64, Duration)> {
    let (began, mut bytes, mut next) = (process::cpu_of_this_thread(), 0, 0);
    while Instant::now() < until {
        let len = stream.read(&mut memory[next..next + size])?;
        next = (next + size) % memory.len();
        if len == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        bytes += len as u64;
    }
    Ok((bytes, process::cpu_of_this_thread() - began))
}

/// A client that asks and is answered.
pub struct Asker {
    stream: Stream,
    chunk: Vec<u8>,
    _service: Service,
    _dir: tempfile::TempDir,
}

impl Asker {
    /// With nothing between: two wake-ups a round trip.
    pub fn direct(kind: Kind, bytes: usize) -> Outcome<Asker> {
        Asker::start(kind, bytes, false)
    }

    /// With a thread between, connected by a unix socket pair as the guest is by its eventfds: four wake-ups a round trip.
    pub fn relayed(kind: Kind, bytes: usize) -> Outcome<Asker> {
        Asker::start(kind, bytes, true)
    }

    fn start(kind: Kind, bytes: usize, relayed: bool) -> Outcome<Asker> {
        let dir = tempfile::tempdir()?;
        let service = Service::start(&kind.place(dir.path(), PORT), Work::Echo(bytes))?;
        let mut stream = service.address.connect()?;
        if relayed {
            let (near, far) = UnixStream::pair()?;
            let (mut far, mut service) = (Stream::Unix(far), stream);
            thread::spawn(move || -> std::io::Result<()> {
                let mut chunk = vec![0; bytes];
                loop {
                    far.read_exact(&mut chunk)?;
                    service.write_all(&chunk)?;
                    service.read_exact(&mut chunk)?;
                    far.write_all(&chunk)?;
                }
            });
            stream = Stream::Unix(near);
        }
        Ok(Asker {
            stream,
            chunk: vec![0x55; bytes],
            _service: service,
            _dir: dir,
        })
    }
}

impl Contender for Asker {
    fn turn(&mut self, window: Duration) -> Outcome<Measures> {
        let mut times = Vec::new();
        let began = Instant::now();
        let warm = began + window / 5;
        loop {
            let asked = Instant::now();
            if asked > warm + window {
                return Ok(quantiles(times));
            }
            self.stream.write_all(&self.chunk)?;
            self.stream.read_exact(&mut self.chunk)?;
            if asked > warm {
                times.push(asked.elapsed());
            }
        }
    }
}
