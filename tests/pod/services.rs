//! Services in the pod's network, on the ports that the chart's values name.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;

use socket2::{Domain, Socket, Type};

use crate::vm::pattern::{Digest, Pattern};
use crate::vm::service::{Behavior, Report};
use crate::{PATIENCE, wait_until};

/// Behaves so on every connection to this port of the network that the calling thread is in. It ends with the test's process; the port with
/// the pod.
pub fn serve(port: u16, behavior: Behavior) -> Receiver<Report> {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener
        .bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into())
        .unwrap();
    listener.listen(64).unwrap();
    let (report, reports) = channel();
    thread::spawn(move || {
        while let Ok((socket, _)) = listener.accept() {
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
                drop(socket);
                let _ = report.send(about);
            });
        }
    });
    reports
}

/// A transfer both ways that lasts for as long as a test wants: the service sends without a pause, the guest sends it back, and every byte is
/// compared.
pub struct Transfer {
    shared: Arc<Shared>,
    reports: Receiver<Report>,
}

#[derive(Default)]
struct Shared {
    /// Bytes that came back.
    moved: AtomicU64,
    stop: AtomicBool,
}

const SEED: u64 = 77;

impl Transfer {
    /// Serves it at a port.
    pub fn serve(port: u16) -> Transfer {
        let shared = Arc::new(Shared::default());
        let its = Arc::clone(&shared);
        let behavior: Behavior = Arc::new(move |socket, report| {
            thread::scope(|scope| {
                let sender = scope.spawn(|| send(socket, &its.stop));
                let result = check(socket, report, &its.moved);
                if result.is_err() {
                    let _ = socket.shutdown(Shutdown::Both);
                }
                report.sent = sender.join().expect("the sender does not panic")?;
                result
            })
        });
        Transfer {
            shared,
            reports: serve(port, behavior),
        }
    }

    /// Waits until another mebibyte has gone there and back.
    #[track_caller]
    pub fn goes_on(&self) {
        let until = self.shared.moved.load(Ordering::Relaxed) + (1 << 20);
        wait_until("the transfer goes on", || {
            self.shared.moved.load(Ordering::Relaxed) >= until
        });
    }

    /// Ends it, and tells how it was.
    #[track_caller]
    pub fn ends_whole(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let report = self.reports.recv_timeout(PATIENCE).expect("the transfer ends");
        report.end.unwrap();
        assert_eq!(report.received.length(), report.sent.length());
        assert_eq!(report.received.finish(), report.sent.finish());
        // It was one connection from the beginning to the end.
        assert!(self.reports.try_recv().is_err());
    }
}

fn send(mut socket: &Socket, stop: &AtomicBool) -> std::io::Result<Digest> {
    let (mut pattern, mut sent, mut buffer) = (Pattern::new(SEED), Digest::default(), vec![0; 65536]);
    while !stop.load(Ordering::Relaxed) {
        pattern.fill(&mut buffer);
        socket.write_all(&buffer)?;
        sent.update(&buffer);
    }
    socket.shutdown(Shutdown::Write)?;
    Ok(sent)
}

fn check(mut socket: &Socket, report: &mut Report, moved: &AtomicU64) -> std::io::Result<()> {
    let (mut pattern, mut buffer) = (Pattern::new(SEED), vec![0; 65536]);
    loop {
        let n = socket.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        report.received.update(&buffer[..n]);
        pattern
            .check(&buffer[..n])
            .map_err(|at| std::io::Error::other(format!("byte {at} differs")))?;
        moved.fetch_add(n as u64, Ordering::Relaxed);
    }
}
