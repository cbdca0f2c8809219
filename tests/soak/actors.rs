//! What a sidecar is for: connections of every kind, each with bytes of its own that are compared.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};
use vsock_sidecar::embedded_guest::{GuestListener, GuestSeqpacket, GuestStream};

use crate::disturbances::Machine;
use crate::support::{Bytes, LONG, echo};
use crate::{DB, Stage};

pub const SERVERS: [fn(&Stage); 2] = [served_by_web, served_by_db];

pub const CLIENTS: [fn(&Stage); 10] = [
    outbound,
    outbound,
    outbound,
    refused,
    clients,
    clients,
    siblings,
    sibling_messages,
    packets,
    frames,
];

/// How long a length is: mostly short, now and then much.
fn length(seed: u64) -> u64 {
    match seed % 7 {
        0 => 1,
        1 => 4096,
        2 => 3_000_000,
        n => n * 9_973,
    }
}

fn next_seed() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Runs `act` until the time is up. What it answers is a failure, unless one of the machines was disturbed meanwhile.
fn again_and_again(
    stage: &Stage,
    what: &str,
    machines: &[&Machine],
    mut act: impl FnMut(u64) -> Result<(), String>,
) {
    let ages = || machines.iter().map(|machine| machine.age()).collect::<Vec<_>>();
    while stage.goes_on() {
        let before = ages();
        // Odd while a machine is being disturbed.
        let calm = before.iter().all(|age| age % 2 == 0);
        let outcome = act(next_seed());
        if let Err(error) = outcome {
            if calm && ages() == before {
                return stage.ledger.fail(format!("{what}: {error}"));
            }
            stage.ledger.count("excused: an end was disturbed", 1);
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Sends so many bytes, half-closes, and compares what comes back.
fn there_and_back<S>(
    stream: &S,
    seed: u64,
    shutdown: impl Fn() -> std::io::Result<()> + Sync,
) -> Result<u64, String>
where
    S: Sync,
    for<'a> &'a S: Read + Write,
{
    let len = length(seed);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            Bytes::new(seed)
                .write_to(stream, len)
                .and_then(|()| shutdown())
                .map_err(|error| format!("sending {len} bytes: {error}"))
        });
        let read = compare(stream, seed, len);
        writer.join().unwrap().and(read)
    })?;
    Ok(len)
}

fn compare<S>(stream: &S, seed: u64, len: u64) -> Result<(), String>
where
    for<'a> &'a S: Read,
{
    let mut expected = Bytes::new(seed);
    let mut stream: &S = stream;
    let mut chunk = vec![0; 64 * 1024];
    let mut got = 0;
    loop {
        match stream.read(&mut chunk) {
            Ok(0) if got == len => return Ok(()),
            Ok(0) => return Err(format!("the end after {got} of {len} bytes")),
            Ok(n) => {
                if got + n as u64 > len || expected.take(n) != chunk[..n] {
                    return Err(format!("other bytes, between {got} and {}", got + n as u64));
                }
                got += n as u64;
            }
            Err(error) => return Err(format!("after {got} of {len} bytes: {error}")),
        }
    }
}

fn patient(stream: &GuestStream) {
    stream.set_read_timeout(Some(LONG));
    stream.set_write_timeout(Some(LONG));
}

/// The guest and a TCP service.
fn outbound(stage: &Stage) {
    again_and_again(stage, "guest to service", &[&stage.web], |seed| {
        let guest = stage.web.sockets();
        let stream = guest.connect(80).map_err(|error| format!("connect: {error}"))?;
        patient(&stream);
        if seed % 11 == 0 {
            // Somebody who loses interest.
            let _ = (&stream).write_all(&[0; 10_000]);
            stream.abort();
            return Ok(());
        }
        let len = there_and_back(&stream, seed, || stream.shutdown(Shutdown::Write))?;
        stage.ledger.count("bytes: guest to service and back", len);
        Ok(())
    });
}

/// Ports where nothing is.
fn refused(stage: &Stage) {
    again_and_again(stage, "refusals", &[&stage.web], |seed| {
        let guest = stage.web.sockets();
        let port = [81, 82][(seed % 2) as usize];
        match guest.connect(port) {
            Ok(stream) => {
                stream.set_read_timeout(Some(Duration::from_millis(500)));
                let said = (&stream).read(&mut [0; 100]);
                return Err(format!(
                    "connected to port {port}, where nothing is; it said {said:?}"
                ));
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                stage.ledger.count("refusals seen by the guest", 1);
            }
            Err(error) => return Err(error.to_string()),
        }
        thread::sleep(Duration::from_millis(5));
        Ok(())
    });
}

/// Echo servers in a guest: a stream and one of messages, anew whenever the guest is.
fn serve_in(stage: &Stage, machine: &Machine) {
    while stage.has_clients() {
        let guest = machine.sockets();
        let age = machine.age();
        if age % 2 == 1 {
            thread::sleep(Duration::from_millis(1));
            continue;
        }
        let (Ok(streams), Ok(messages)) = (guest.listen(22), guest.listen_seqpacket(23)) else {
            thread::sleep(Duration::from_millis(5));
            continue;
        };
        while stage.has_clients() && machine.age() == age {
            take(&streams, |stream| {
                patient(&stream);
                echo_to(stream);
            });
            take(&messages, |socket: GuestSeqpacket| {
                socket.set_read_timeout(Some(LONG));
                socket.set_write_timeout(Some(LONG));
                while let Ok(Some(message)) = socket.recv() {
                    let sent = match message.end_of_record {
                        true => socket.send_end_of_record(&message.bytes),
                        false => socket.send(&message.bytes),
                    };
                    if sent.is_err() {
                        return;
                    }
                }
                let _ = socket.shutdown(Shutdown::Write);
            });
        }
    }
}

fn take<S>(listener: &GuestListener<S>, serve: impl FnOnce(S) + Send + 'static)
where
    S: vsock_sidecar::embedded_guest::Accepted + Send + 'static,
{
    if let Ok(accepted) = listener.accept_timeout(Duration::from_millis(2)) {
        thread::spawn(move || serve(accepted));
    }
}

fn echo_to(stream: GuestStream) {
    let mut chunk = vec![0; 64 * 1024];
    loop {
        match (&stream).read(&mut chunk) {
            Ok(0) => break,
            Err(_) => return stream.abort(),
            Ok(n) => {
                if (&stream).write_all(&chunk[..n]).is_err() {
                    return;
                }
            }
        }
    }
    let _ = stream.shutdown(Shutdown::Write);
}

fn served_by_web(stage: &Stage) {
    serve_in(stage, &stage.web);
}

fn served_by_db(stage: &Stage) {
    serve_in(stage, &stage.db);
}

/// Whether the echo server in the guest may not be there yet.
fn starting(error: &str) -> bool {
    ["connect", "no OK"].iter().any(|word| error.starts_with(word))
}

/// TCP clients and the guest.
fn clients(stage: &Stage) {
    again_and_again(stage, "client to guest", &[&stage.web], |seed| {
        let [mux, plain] = stage.inbound;
        let through_mux = seed % 2 == 0;
        let port = if through_mux { mux } else { plain };
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map_err(|error| error.to_string())?;
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.set_write_timeout(Some(LONG)).unwrap();
        if through_mux {
            let mut answer = [0; 3];
            let asked = (&stream)
                .write_all(b"CONNECT 22\n")
                .and_then(|()| (&stream).read_exact(&mut answer));
            if asked.is_err() {
                // The server in the guest is not up yet, after a reboot.
                stage.ledger.count("clients refused by the guest", 1);
                thread::sleep(Duration::from_millis(20));
                return Ok(());
            }
            let mut byte = [0];
            while byte != *b"\n" {
                (&stream)
                    .read_exact(&mut byte)
                    .map_err(|error| format!("half an OK: {error}"))?;
            }
        }
        match there_and_back(&stream, seed, || stream.shutdown(Shutdown::Write)) {
            Ok(len) => stage.ledger.count("bytes: client to guest and back", len),
            // Without a line nothing tells a refusal from the end.
            Err(error) if !through_mux && error.contains("0 of ") => {
                stage.ledger.count("clients refused by the guest", 1);
                thread::sleep(Duration::from_millis(20));
            }
            Err(error) if !through_mux && error.starts_with("sending") => {
                stage.ledger.count("clients refused by the guest", 1);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    });
}

/// Streams between the guests.
fn siblings(stage: &Stage) {
    again_and_again(stage, "guest to guest", &[&stage.web, &stage.db], |seed| {
        let guest = stage.web.sockets();
        let stream = match guest.connect_to(DB, 22) {
            Ok(stream) => stream,
            Err(error) => return not_up(stage, &format!("connect: {error}")),
        };
        patient(&stream);
        let len = there_and_back(&stream, seed, || stream.shutdown(Shutdown::Write))?;
        stage.ledger.count("bytes: guest to guest and back", len);
        Ok(())
    });
}

/// The server of a guest that was disturbed a moment ago.
fn not_up(stage: &Stage, error: &str) -> Result<(), String> {
    match starting(error) {
        true => {
            stage.ledger.count("servers in a guest not up yet", 1);
            thread::sleep(Duration::from_millis(20));
            Ok(())
        }
        false => Err(error.to_owned()),
    }
}

/// Sends messages of all lengths and compares what comes back, boundaries and marks included.
fn messages_there_and_back(
    stage: &Stage,
    what: &'static str,
    socket: &GuestSeqpacket,
    seed: u64,
    marks: bool,
) -> Result<(), String> {
    socket.set_read_timeout(Some(LONG));
    socket.set_write_timeout(Some(LONG));
    let lengths: Vec<usize> = (0..40)
        .map(|i| match (seed + i) % 9 {
            0 => 200_000,
            1 => 65_536,
            n => (n * 517 + i) as usize,
        })
        .collect();
    let lengths = &lengths;
    let ends_record = |i: usize| marks && i.is_multiple_of(3);
    thread::scope(|scope| {
        let writer = scope.spawn(move || {
            for (i, len) in lengths.iter().enumerate() {
                let message = Bytes::new(seed + i as u64).take(*len);
                let sent = match ends_record(i) {
                    true => socket.send_end_of_record(&message),
                    false => socket.send(&message),
                };
                sent.map_err(|error| format!("sending message {i}: {error}"))?;
            }
            socket
                .shutdown(Shutdown::Write)
                .map_err(|error| format!("shutdown: {error}"))
        });
        let read = || {
            for (i, len) in lengths.iter().enumerate() {
                let message = match socket.recv() {
                    Ok(Some(message)) => message,
                    Ok(None) => return Err(format!("the end before message {i}")),
                    Err(error) => return Err(format!("message {i}: {error}")),
                };
                let same = message.bytes == Bytes::new(seed + i as u64).take(*len);
                if !same || message.end_of_record != ends_record(i) {
                    return Err(format!(
                        "message {i} of {len} bytes came as {} with mark {}",
                        message.bytes.len(),
                        message.end_of_record
                    ));
                }
            }
            match socket.recv() {
                Ok(None) => Ok(()),
                other => Err(format!("no end behind the last message: {other:?}")),
            }
        };
        let read = read();
        if read.is_err() {
            socket.abort();
        }
        // What was read wrong is what the writer then stumbles over.
        read.and(writer.join().unwrap())
    })
    .map_err(|error| {
        format!(
            "from port {}: {error}, was reset: {}",
            socket.local_port(),
            socket.was_reset()
        )
    })?;
    stage.ledger.count(what, lengths.len() as u64);
    Ok(())
}

fn sibling_messages(stage: &Stage) {
    again_and_again(
        stage,
        "messages between guests",
        &[&stage.web, &stage.db],
        |seed| {
            let guest = stage.web.sockets();
            match guest.connect_seqpacket_to(DB, 23) {
                Ok(socket) => messages_there_and_back(stage, "messages: guest to guest", &socket, seed, true),
                Err(error) => not_up(stage, &format!("connect: {error}")),
            }
        },
    );
}

fn packets(stage: &Stage) {
    again_and_again(stage, "packet socket", &[&stage.web], |seed| {
        let guest = stage.web.sockets();
        let socket = guest
            .connect_seqpacket(90)
            .map_err(|error| format!("connect: {error}"))?;
        messages_there_and_back(stage, "messages: packet socket", &socket, seed, false)
    });
}

fn frames(stage: &Stage) {
    again_and_again(stage, "frames", &[&stage.web], |seed| {
        let guest = stage.web.sockets();
        let socket = guest
            .connect_seqpacket(91)
            .map_err(|error| format!("connect: {error}"))?;
        messages_there_and_back(stage, "messages: frames", &socket, seed, false)
    });
}

/// A TCP service that speaks in frames; to it they are bytes.
pub fn echo_frames(stream: TcpStream) {
    echo(stream);
}

/// A service on a SOCK_SEQPACKET socket that sends every message back.
pub fn serve_packets(path: &Path) {
    let listener = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    listener.bind(&SockAddr::unix(path).unwrap()).unwrap();
    listener.listen(64).unwrap();
    thread::spawn(move || {
        while let Ok((socket, _)) = listener.accept() {
            thread::spawn(move || echo_packets(&socket));
        }
    });
}

fn echo_packets(socket: &Socket) {
    let mut room = vec![0; 256 * 1024];
    // `Read for &Socket` is recv(): one call, one message.
    let mut from = socket;
    loop {
        match from.read(&mut room) {
            Ok(0) | Err(_) => break,
            Ok(n) if socket.send(&room[..n]).is_err() => break,
            Ok(_) => {}
        }
    }
    let _ = socket.shutdown(Shutdown::Write);
}
