//! The commands of the control line. One line in, one line out: `ok key=value ...` or `err NAME key=value ...`.
//!
//! | command | does |
//! |---|---|
//! | `cid`, `release`, `memory` | what the guest knows of itself |
//! | `iommu` | what its vsock device negotiated, and how an IOMMU handles the device |
//! | `client PORT step...` | connects to the host and runs the steps (see `script`) |
//! | `repeat N PORT step...` | the same N times, one after the other |
//! | `parallel N PORT step...` | the same N times at once; the steps begin when all have connected |
//! | `serve PORT step...` | accepts from now on and runs the steps on every connection |
//! | `served PORT MS` | the outcome of the next connection that ended on a served port |
//! | `hold NAME PORT`, `watch NAME MS`, `drop NAME` | an idle connection: opens it, waits for its end, closes it |
//! | `bg NAME command...`, `join NAME` | runs a command in the background; its answer |
//! | `open NAME` | opens a gate of `script` |
//! | `address INTERFACE IPV4` | gives a network interface an address and switches it on |
//! | `spawn NAME PROGRAM argument...`, `kill NAME` | starts a program of the initramfs; ends it |
//! | `output NAME OFFSET` | whether it runs, and what it has written behind so many bytes |
//! | `rebind`, `reload` | takes the vsock device from its driver and gives it back; the same with the module |
//! | `log` | writes the kernel's log to the console |
//! | `poweroff` | the end |

use std::collections::HashMap;
use std::fmt::Write;
use std::io::{self, Read};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use socket2::Socket;

use crate::program::Program;
use crate::script::{self, Failure, Fault, GATES, Outcome, Step};
use crate::{sys, text};

/// What lives from one command to the next. Shared, since a command may run in the background.
#[derive(Default)]
pub struct Guest {
    held: Mutex<HashMap<String, Arc<Socket>>>,
    jobs: Mutex<HashMap<String, thread::JoinHandle<String>>>,
    served: Mutex<HashMap<u32, Arc<Mutex<Receiver<String>>>>>,
    programs: Mutex<HashMap<String, Program>>,
}

/// A command that could not be carried out.
enum Error {
    /// The command itself is wrong.
    Usage(String),
    /// A system call failed.
    Io(io::Error),
    /// A complete `err` answer.
    Answer(String),
}

impl From<io::Error> for Error {
    fn from(e: io::Error) -> Error {
        Error::Io(e)
    }
}

impl Guest {
    /// Carries a command out and returns the answer, without its newline.
    pub fn answer(self: &Arc<Guest>, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        match self.run(&words) {
            Ok(fields) => format!("ok {fields}").trim_end().to_owned(),
            Err(Error::Usage(text)) => format!("err USAGE {text}"),
            Err(Error::Io(e)) => format!("err {} {e}", name(&e)),
            Err(Error::Answer(text)) => text,
        }
    }

    fn run(self: &Arc<Guest>, words: &[&str]) -> Result<String, Error> {
        match words {
            ["cid"] => Ok(format!("cid={}", sys::local_cid()?)),
            ["release"] => Ok(format!("release={}", sys::release())),
            ["iommu"] => {
                let device = sys::vsock_device()?;
                let (features, domain) = (sys::features(&device)?, sys::iommu_domain(&device)?);
                Ok(format!("features={features:016x} domain={domain}"))
            }
            ["memory"] => Ok(format!("available_kib={}", sys::available_memory()?)),
            ["client", port, steps @ ..] => {
                let begin = Instant::now();
                let (outcome, result) = script::client(number(port)?, &parse(steps)?, 0, || ());
                report(&outcome, result.as_ref().err(), begin.elapsed())
            }
            ["repeat", times, port, steps @ ..] => repeat(number(times)?, number(port)?, &parse(steps)?),
            ["parallel", times, port, steps @ ..] => parallel(number(times)?, number(port)?, &parse(steps)?),
            ["serve", port, steps @ ..] => self.serve(number(port)?, parse(steps)?),
            ["served", port, ms] => self.served(number(port)?, Duration::from_millis(number(ms)?)),
            ["hold", name, port] => {
                let begin = Instant::now();
                let socket = script::connect(number(port)?)?;
                let connect = begin.elapsed().as_micros();
                self.held
                    .lock()
                    .unwrap()
                    .insert((*name).to_owned(), Arc::new(socket));
                Ok(format!("connect_us={connect}"))
            }
            ["watch", name, ms] => self.watch(name, Duration::from_millis(number(ms)?)),
            ["drop", name] => {
                self.held
                    .lock()
                    .unwrap()
                    .remove(*name)
                    .ok_or_else(|| usage("nothing held by this name"))?;
                Ok(String::new())
            }
            ["bg", name, command @ ..] => {
                let (guest, command) = (Arc::clone(self), command.join(" "));
                let job = thread::Builder::new().spawn(move || guest.answer(&command))?;
                self.jobs.lock().unwrap().insert((*name).to_owned(), job);
                Ok(String::new())
            }
            ["join", name] => {
                let job = self
                    .jobs
                    .lock()
                    .unwrap()
                    .remove(*name)
                    .ok_or_else(|| usage("no such job"))?;
                Err(Error::Answer(job.join().unwrap_or("err PANIC".to_owned())))
            }
            ["open", name] => {
                GATES.open(name);
                Ok(String::new())
            }
            ["address", interface, address] => {
                let address = address.parse().map_err(|_| usage("no IPv4 address"))?;
                Ok(sys::set_address(interface, address).map(|()| String::new())?)
            }
            ["spawn", name, program, arguments @ ..] => {
                let program = Program::start(name, program, arguments)?;
                self.programs.lock().unwrap().insert((*name).to_owned(), program);
                Ok(String::new())
            }
            ["output", name, offset] => {
                let mut programs = self.programs.lock().unwrap();
                let program = programs.get_mut(*name).ok_or_else(|| usage("no such program"))?;
                let (state, piece) = program.look(number(offset)?)?;
                Ok(format!(
                    "state={state} bytes={} text={}",
                    piece.len(),
                    text::encode(&piece)
                ))
            }
            ["kill", name] => {
                let mut programs = self.programs.lock().unwrap();
                let program = programs.get_mut(*name).ok_or_else(|| usage("no such program"))?;
                Ok(program.kill().map(|()| String::new())?)
            }
            ["rebind"] => Ok(sys::rebind_transport().map(|()| String::new())?),
            ["reload"] => Ok(sys::reload_transport().map(|()| String::new())?),
            ["log"] => Ok(sys::dump_log().map(|()| String::new())?),
            ["poweroff"] => Ok(sys::power_off().map(|()| String::new())?),
            _ => Err(usage("no such command")),
        }
    }

    fn serve(&self, port: u32, steps: Vec<Step>) -> Result<String, Error> {
        let listener = script::listen(port)?;
        let (ended, outcomes) = channel();
        self.served
            .lock()
            .unwrap()
            .insert(port, Arc::new(Mutex::new(outcomes)));
        thread::Builder::new().spawn(move || {
            // A rebind of the device leaves listeners as they are; only their closing ends this loop.
            while let Ok((socket, _)) = listener.accept() {
                let (steps, ended) = (steps.clone(), ended.clone());
                let run = move || {
                    let (begin, mut outcome) = (Instant::now(), Outcome::default());
                    let result = script::run(&socket, &steps, 0, &mut outcome);
                    drop(socket);
                    let _ = ended.send(match report(&outcome, result.as_ref().err(), begin.elapsed()) {
                        Ok(fields) => format!("ok {fields}"),
                        Err(Error::Answer(answer)) => answer,
                        Err(_) => "err UNKNOWN".to_owned(),
                    });
                };
                if thread::Builder::new().stack_size(256 << 10).spawn(run).is_err() {
                    return;
                }
            }
        })?;
        Ok(String::new())
    }

    fn served(&self, port: u32, patience: Duration) -> Result<String, Error> {
        let outcomes = self
            .served
            .lock()
            .unwrap()
            .get(&port)
            .cloned()
            .ok_or_else(|| usage("port not served"))?;
        let outcome = outcomes.lock().unwrap().recv_timeout(patience);
        Err(Error::Answer(
            outcome.unwrap_or("err NONE no connection ended".to_owned()),
        ))
    }

    /// How a held connection ended, by its next read.
    fn watch(&self, held: &str, patience: Duration) -> Result<String, Error> {
        let socket = self
            .held
            .lock()
            .unwrap()
            .get(held)
            .cloned()
            .ok_or_else(|| usage("nothing held by this name"))?;
        socket.set_read_timeout(Some(patience))?;
        let begin = Instant::now();
        let end = match (&*socket).read(&mut [0]) {
            Ok(0) => "eof".to_owned(),
            Ok(_) => "data".to_owned(),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(Error::Answer("err OPEN".to_owned()));
            }
            // A reset that came between two reads is only told through SO_ERROR; the read finds no connection.
            Err(e) if e.kind() == io::ErrorKind::NotConnected => name(&socket.take_error()?.unwrap_or(e)),
            Err(e) => name(&e),
        };
        Ok(format!("end={end} us={}", begin.elapsed().as_micros()))
    }
}

fn repeat(times: u64, port: u32, steps: &[Step]) -> Result<String, Error> {
    let begin = Instant::now();
    for index in 0..times {
        let (outcome, result) = script::client(port, steps, index, || ());
        if let Err(failure) = result {
            return Err(Error::Answer(
                fault(&outcome, &failure, begin.elapsed()) + &format!(" index={index}"),
            ));
        }
    }
    Ok(format!("times={times} us={}", begin.elapsed().as_micros()))
}

fn parallel(times: u64, port: u32, steps: &[Step]) -> Result<String, Error> {
    let begin = Instant::now();
    let barrier = Barrier::new(times as usize);
    let faults: Vec<String> = thread::scope(|scope| {
        let run = |index| {
            let barrier = &barrier;
            move || {
                script::client(port, steps, index, || {
                    barrier.wait();
                })
            }
        };
        let threads: Vec<_> = (0..times)
            .map(|index| script::spawn_small(scope, run(index)))
            .collect();
        let ends = threads
            .into_iter()
            .map(|thread| thread.join().expect("scripts do not panic"));
        ends.filter_map(|(outcome, result)| Some(fault(&outcome, &result.err()?, begin.elapsed())))
            .collect()
    });
    match faults.first() {
        Some(first) => Err(Error::Answer(format!(
            "{first} failed={} of={times}",
            faults.len()
        ))),
        None => Ok(format!("times={times} us={}", begin.elapsed().as_micros())),
    }
}

fn report(outcome: &Outcome, failure: Option<&Failure>, time: Duration) -> Result<String, Error> {
    match failure {
        Some(failure) => Err(Error::Answer(fault(outcome, failure, time))),
        None => Ok(fields(outcome, time)),
    }
}

fn fault(outcome: &Outcome, failure: &Failure, time: Duration) -> String {
    let what = match &failure.fault {
        Fault::Io(e) => name(e),
        Fault::Different(at) => format!("DIFFERENT at={at}"),
        Fault::Early => "EARLY".to_owned(),
    };
    format!("err {what} step={} {}", failure.step, fields(outcome, time))
}

fn fields(outcome: &Outcome, time: Duration) -> String {
    let mut line = format!(
        "connect_us={} us={}",
        outcome.connect.as_micros(),
        time.as_micros()
    );
    for (name, digest) in [("sent", &outcome.sent), ("received", &outcome.received)] {
        let _ = write!(
            line,
            " {name}={} {name}_digest={:016x}",
            digest.length(),
            digest.finish()
        );
    }
    if let Some(kept) = &outcome.kept {
        let _ = write!(line, " kept={}", text::encode(kept));
    }
    if !outcome.trips.is_empty() {
        let mut sorted = outcome.trips.clone();
        sorted.sort_unstable();
        for (name, per_mille) in [("p50", 500), ("p99", 990), ("p999", 999)] {
            // Below the length, since the quotient is below one.
            let time = sorted[sorted.len() * per_mille / 1000];
            let _ = write!(line, " {name}_ns={}", time.as_nanos());
        }
    }
    line
}

fn parse(steps: &[&str]) -> Result<Vec<Step>, Error> {
    script::parse(steps).map_err(Error::Usage)
}

fn number<T: std::str::FromStr>(word: &str) -> Result<T, Error> {
    word.parse()
        .map_err(|_| Error::Usage(format!("not a number: {word}")))
}

fn usage(text: &str) -> Error {
    Error::Usage(text.to_owned())
}

/// The name of an error number, for those that sockets give.
fn name(e: &io::Error) -> String {
    let known = match e.raw_os_error() {
        Some(11) => "EAGAIN",
        Some(19) => "ENODEV",
        Some(32) => "EPIPE",
        Some(71) => "EPROTO",
        Some(98) => "EADDRINUSE",
        Some(99) => "EADDRNOTAVAIL",
        Some(103) => "ECONNABORTED",
        Some(104) => "ECONNRESET",
        Some(107) => "ENOTCONN",
        Some(110) => "ETIMEDOUT",
        Some(111) => "ECONNREFUSED",
        Some(other) => return format!("E{other}"),
        None => "EOTHER",
    };
    known.to_owned()
}
