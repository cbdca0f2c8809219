//! The embedded guest's bulk run: as much as an [`Effort`] allows, each way, through one guest connection.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use super::interrupt::Interrupt;
use super::service::{CHUNK, Pattern, SINK, SOURCE};
use super::stage::{BULK_PORT, Way};
use super::terminal::Terminal;
use super::{Effort, Error};
use crate::embedded_guest::{GuestStream, Sockets};

/// The guest sends, the service counts and checks.
pub(super) fn guest_to_host(
    guest: &Sockets,
    t: &mut Terminal,
    interrupt: &Interrupt,
    effort: Effort,
) -> Result<(), Error> {
    let label = Way::GuestToHost.label();
    let mut stream = connect(guest, SINK)?;
    let pattern = Pattern::new();
    let started = Instant::now();
    let mut sent = 0;
    while sent < effort.bytes && started.elapsed() < effort.time {
        interrupt.check()?;
        stream
            .write_all(pattern.chunk())
            .map_err(Error::io("send from the guest"))?;
        sent += CHUNK as u64;
        t.progress(label, fraction(sent, started, effort), sent, started.elapsed())?;
    }
    stream
        .shutdown(Shutdown::Write)
        .map_err(Error::io("shut down sending"))?;
    let mut verdict = String::new();
    BufReader::new(&stream)
        .read_line(&mut verdict)
        .map_err(Error::io("read the service's count"))?;
    let took = started.elapsed();
    if verdict.trim_end() != format!("{sent} intact") {
        let what = format!(
            "the guest sent {sent} bytes, the service saw {}",
            verdict.trim_end()
        );
        return Err(Error::Unexpected(what));
    }
    t.result(label, sent, took)
}

/// The service sends, the guest checks.
pub(super) fn host_to_guest(
    guest: &Sockets,
    t: &mut Terminal,
    interrupt: &Interrupt,
    effort: Effort,
) -> Result<(), Error> {
    let label = Way::HostToGuest.label();
    let mut stream = connect(guest, SOURCE)?;
    let pattern = Pattern::new();
    let mut bytes = vec![0; 4 * CHUNK];
    let started = Instant::now();
    let mut received = 0;
    while received < effort.bytes && started.elapsed() < effort.time {
        interrupt.check()?;
        let len = stream
            .read(&mut bytes)
            .map_err(Error::io("receive in the guest"))?;
        if len == 0 || !pattern.matches(received, &bytes[..len]) {
            let what = if len == 0 { "ended" } else { "is damaged" };
            return Err(Error::Unexpected(format!(
                "the stream {what} after {received} bytes"
            )));
        }
        received += len as u64;
        t.progress(
            label,
            fraction(received, started, effort),
            received,
            started.elapsed(),
        )?;
    }
    t.result(label, received, started.elapsed())
}

fn connect(guest: &Sockets, wish: &str) -> Result<GuestStream, Error> {
    const PATIENCE: Option<Duration> = Some(Duration::from_secs(10));
    let mut stream = guest
        .connect(BULK_PORT)
        .map_err(Error::io("connect to the bulk service"))?;
    stream.set_read_timeout(PATIENCE);
    stream.set_write_timeout(PATIENCE);
    stream
        .write_all(wish.as_bytes())
        .map_err(Error::io("ask the bulk service"))?;
    Ok(stream)
}

fn fraction(bytes: u64, started: Instant, effort: Effort) -> f64 {
    let by_bytes = bytes as f64 / effort.bytes.max(1) as f64;
    let by_time = started.elapsed().as_secs_f64() / effort.time.as_secs_f64().max(1e-9);
    by_bytes.max(by_time).min(1.0)
}
