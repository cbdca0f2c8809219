//! The host's side: services that rules lead to, clients of listeners.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::Instant;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vsock_sidecar::embedded_guest::wait_readable;

use super::LONG;

/// A host socket, of whichever family. Reads and writes give up after [`LONG`].
pub trait Service: Read + Write + Send + 'static {
    fn shutdown(&self, how: Shutdown);
    fn patient(&self);
}

impl Service for TcpStream {
    fn shutdown(&self, how: Shutdown) {
        let _ = TcpStream::shutdown(self, how);
    }

    fn patient(&self) {
        self.set_read_timeout(Some(LONG)).unwrap();
        self.set_write_timeout(Some(LONG)).unwrap();
    }
}

impl Service for UnixStream {
    fn shutdown(&self, how: Shutdown) {
        let _ = UnixStream::shutdown(self, how);
    }

    fn patient(&self) {
        self.set_read_timeout(Some(LONG)).unwrap();
        self.set_write_timeout(Some(LONG)).unwrap();
    }
}

/// Serves every connection to a port of 127.0.0.1 (the answer) with `handler`, each on a thread, for as long as the test
/// process lives.
pub fn serve(handler: impl Fn(TcpStream) + Clone + Send + 'static) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let handler = handler.clone();
            thread::spawn(move || handler(stream));
        }
    });
    port
}

/// Sends back what comes until its end, then ends.
pub fn echo(mut stream: impl Service) {
    let mut chunk = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => break,
            Ok(n) => {
                if stream.write_all(&chunk[..n]).is_err() {
                    return;
                }
            }
        }
    }
    stream.shutdown(Shutdown::Write);
}

/// A port of 127.0.0.1 that nobody has: below the range from which the kernel chooses, so that it stays free.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 10_000 + ((std::process::id() as u16 % 200) * 100 + step) % 20_000;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// The next client of a listener.
#[track_caller]
pub fn accept_tcp(listener: &TcpListener) -> TcpStream {
    assert!(
        wait_readable(&[listener.as_fd()], Some(Instant::now() + LONG)).unwrap(),
        "no connection came"
    );
    let (stream, _) = listener.accept().unwrap();
    stream.patient();
    stream
}

/// The next client of a listener.
#[track_caller]
pub fn accept_unix(listener: &UnixListener) -> UnixStream {
    assert!(
        wait_readable(&[listener.as_fd()], Some(Instant::now() + LONG)).unwrap(),
        "no connection came"
    );
    let (stream, _) = listener.accept().unwrap();
    stream.patient();
    stream
}

/// All that comes until the end; a reset is the end as well.
pub fn read_to_end(mut from: impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    let mut chunk = vec![0; 64 * 1024];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return all,
            Ok(n) => all.extend_from_slice(&chunk[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return all,
            Err(error) => panic!("{error} after {} bytes", all.len()),
        }
    }
}

/// Lets this process hold as many descriptors as it may.
pub fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}

/// A socket file's directory entry, for those who ask whether it is gone.
#[allow(dead_code)]
pub fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}
