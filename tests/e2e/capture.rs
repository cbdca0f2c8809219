//! `GET /capture`: what the guest and the device said to each other, as a file for Wireshark.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::Instant;

use vsock_sidecar::embedded_guest::Sockets;
use vsock_sidecar::vsock::Op;

use crate::support::pcapng::{self, File, Packet};
use crate::support::*;

fn echoing() -> Sidecar {
    Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{}\"}}]\n  \
         inbound: [{{name: mux, listen: \"unix://{{dir}}/mux.sock\", protocol: connect}}]\n",
        serve(echo)
    ))
}

/// A capture that is being read.
struct Capture {
    stream: UnixStream,
    bytes: Vec<u8>,
    ended: bool,
}

/// Asks for a capture; the head of the answer.
fn ask(sidecar: &Sidecar, query: &str) -> (UnixStream, String) {
    let mut stream = UnixStream::connect(sidecar.path("admin.sock")).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    // HTTP/1.0 knows no chunks: the body is the rest of the stream.
    write!(stream, "GET /capture?{query} HTTP/1.0\r\n\r\n").unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    (stream, String::from_utf8(head).unwrap())
}

impl Capture {
    /// Begins one; when this returns, the next packet is part of it.
    #[track_caller]
    fn begin(sidecar: &Sidecar, query: &str) -> Capture {
        let (stream, head) = ask(sidecar, query);
        assert!(head.starts_with("HTTP/1.0 200 "), "{head}");
        Capture {
            stream,
            bytes: Vec::new(),
            ended: false,
        }
    }

    fn read(&mut self) {
        let mut piece = vec![0; 256 * 1024];
        match self.stream.read(&mut piece) {
            Ok(0) => self.ended = true,
            Ok(n) => self.bytes.extend_from_slice(&piece[..n]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("{error}"),
        }
    }

    /// Reads until the file is as it should be.
    #[track_caller]
    fn until(&mut self, what: &str, holds: impl Fn(&File) -> bool) -> File {
        let deadline = Instant::now() + LONG;
        loop {
            self.read();
            let whole = pcapng::whole_blocks(&self.bytes);
            // Section and interface come together.
            let file = pcapng::parse(&self.bytes[..whole]);
            if holds(&file) {
                return file;
            }
            assert!(!self.ended, "the capture has ended: {what}");
            assert!(Instant::now() < deadline, "not within {LONG:?}: {what}");
        }
    }

    /// Reads until the end, which must come by itself.
    #[track_caller]
    fn read_to_end(&mut self) -> File {
        while !self.ended {
            self.read();
        }
        pcapng::parse(&self.bytes)
    }
}

fn count(packets: &[Packet], inbound: bool, op: Op) -> u64 {
    let same = |packet: &&Packet| packet.inbound == inbound && packet.op == op as u16;
    packets.iter().filter(same).count() as u64
}

/// The payload of one direction of a connection, in the order of the file.
fn payload(packets: &[Packet], src: (u64, u32)) -> Vec<u8> {
    let of = packets.iter().filter(|packet| packet.op == Op::Rw as u16);
    of.filter(|packet| packet.src == src)
        .flat_map(|packet| packet.payload.clone())
        .collect()
}

/// Both ways through an echo: `len` bytes.
fn exchange(guest: &Sockets, len: u64) {
    let stream = guest.connect(7).unwrap();
    stream.set_read_timeout(Some(LONG));
    thread::scope(|scope| {
        scope.spawn(|| {
            Bytes::new(len).write_to(&stream, len).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        Bytes::new(len).expect_from(&stream, len);
        assert_eq!((&stream).read(&mut [0; 1]).unwrap(), 0);
    });
    drop(stream);
    until("the connection is over", || guest.open_connections() == 0);
}

#[test]
fn a_capture_has_every_packet_and_every_byte_of_both_ways() {
    let sidecar = echoing();
    let guest = linux(&sidecar.path("web.sock"));
    let mut capture = Capture::begin(&sidecar, "guest=web&seconds=300&snaplen=65536");
    exchange(&guest, 300_000);
    // What a client says together with its CONNECT line takes another way to the guest.
    let listener = guest.listen(22).unwrap();
    let mut client = UnixStream::connect(sidecar.path("mux.sock")).unwrap();
    client.write_all(b"CONNECT 22\npreface").unwrap();
    let mut server = listener.accept_timeout(LONG).unwrap();
    server.set_read_timeout(Some(LONG));
    server.read_exact(&mut [0; 7]).unwrap();
    drop((server, client));
    until("the connection is over", || guest.open_connections() == 0);
    sidecar.until_metric("vsock_connections_active", &[], 0.0);

    let ops = [
        Op::Request,
        Op::Response,
        Op::Rst,
        Op::Shutdown,
        Op::Rw,
        Op::CreditUpdate,
        Op::CreditRequest,
    ];
    let file = capture.until(
        "every packet that the guest sent and received is in the file",
        |file| {
            let stats = guest.stats();
            ops.iter().all(|op| {
                count(&file.packets, true, *op) == stats.sent.count(*op)
                    && count(&file.packets, false, *op) == stats.received.count(*op)
            })
        },
    );
    assert_eq!(file.interface, "web");
    assert!(file.packets.is_sorted_by_key(|packet| packet.at));
    let guest_port = file.packets[0].src.1;
    let said = Bytes::new(300_000).take(300_000);
    assert!(
        payload(&file.packets, (3, guest_port)) == said,
        "the guest's bytes"
    );
    assert!(payload(&file.packets, (2, 7)) == said, "the service's bytes");
    assert!(
        file.packets
            .iter()
            .any(|packet| !packet.inbound && packet.payload == b"preface")
    );
    assert!(
        file.packets
            .iter()
            .all(|packet| packet.original_payload == packet.len)
    );
    assert_eq!(
        sidecar
            .logged("a capture of the guest's packets begins", |_| true)
            .len(),
        1
    );
    assert_eq!(sidecar.metric("vsock_capture_dropped_packets_total", &[]), 0.0);
    assert_lawful(&guest);
}

/// A VM that is rebooted, or a VMM that comes back, is just what somebody wants to look at.
#[test]
fn a_capture_goes_on_when_the_vmm_leaves_and_ends_whole_when_the_sidecar_does() {
    let mut sidecar = echoing();
    let mut capture = Capture::begin(&sidecar, "guest=web&seconds=300");
    for _ in 0..2 {
        let guest = linux(&sidecar.path("web.sock"));
        exchange(&guest, 1000);
        drop(guest);
        sidecar.until_metric("vsock_session_active", &[], 0.0);
    }
    sidecar.terminate();
    let file = capture.read_to_end();
    assert_eq!(count(&file.packets, true, Op::Request), 2);
    assert_eq!(count(&file.packets, false, Op::Response), 2);
    let packets = file.packets.len() as u64;
    assert_eq!(file.statistics.last(), Some(&(packets, 0)));
    assert_eq!(sidecar.wait(LONG).code(), Some(0));
}

#[test]
fn a_capture_ends_by_itself_when_its_time_is_up() {
    let sidecar = echoing();
    let file = Capture::begin(&sidecar, "guest=web&seconds=1").read_to_end();
    assert!(file.packets.is_empty());
    assert_eq!(file.statistics.last(), Some(&(0, 0)));
}

#[test]
fn there_are_two_captures_of_a_guest_at_once_and_a_client_that_leaves_makes_room() {
    let sidecar = echoing();
    let captures = [0, 256].map(|snaplen| {
        let query = format!("guest=web&seconds=300&snaplen={snaplen}");
        Capture::begin(&sidecar, &query)
    });
    let (status, said) = sidecar.try_get("/capture?guest=web").unwrap();
    assert_eq!(status, 503);
    assert!(said.contains("two captures of this guest are running"), "{said}");
    let (status, said) = sidecar.try_get("/capture?guest=db").unwrap();
    assert_eq!(
        (status, said.as_str()),
        (404, "no guest of that name; there are: web\n")
    );
    drop(captures);
    // The guest is silent all the time: nothing but the file's own statistics can find out.
    until("there is room", || {
        ask(&sidecar, "guest=web&seconds=1")
            .1
            .starts_with("HTTP/1.0 200 ")
    });
}

/// A terminal that was stopped, a pipe that is full: the guest must not notice.
#[test]
fn a_reader_that_takes_nothing_loses_packets_and_the_guest_loses_nothing() {
    let sidecar = echoing();
    let guest = linux(&sidecar.path("web.sock"));
    let mut capture = Capture::begin(&sidecar, "guest=web&seconds=300&snaplen=65536");
    exchange(&guest, 24 << 20);
    let file = capture.until("the file tells of all packets", |file| {
        let stats = guest.stats();
        let packets = stats.sent.total() + stats.received.total();
        file.statistics.last().is_some_and(|(all, _)| *all == packets)
    });
    let (all, missing) = *file.statistics.last().unwrap();
    assert!(missing > 100, "{missing} packets of {all} were dropped");
    assert_eq!(file.packets.len() as u64, all - missing);
    let counted = sidecar.metric("vsock_capture_dropped_packets_total", &[("guest", "web")]);
    assert_eq!(counted, missing as f64);
    assert_lawful(&guest);
}

/// Wireshark's own dissector is the judge.
#[test]
fn tshark_decodes_a_capture_without_an_error() {
    let sidecar = echoing();
    let guest = linux(&sidecar.path("web.sock"));
    let mut capture = Capture::begin(&sidecar, "guest=web&seconds=300");
    exchange(&guest, 100_000);
    let path = sidecar.path("web.pcapng");
    let file = capture.until("the guest's last word is in the file", |file| {
        count(&file.packets, true, Op::Rst) + count(&file.packets, false, Op::Rst) > 0
    });
    std::fs::write(&path, &capture.bytes[..pcapng::whole_blocks(&capture.bytes)]).unwrap();
    let tshark = |arguments: &[&str]| {
        let output = Command::new("tshark")
            .arg("-r")
            .arg(&path)
            .args(arguments)
            .output();
        let output = match output {
            Ok(output) => output,
            Err(error) => {
                let advice = format!("cannot run tshark: {error}; install it with: apt-get install tshark");
                assert!(std::env::var_os("CI").is_none(), "{advice}");
                eprintln!("NOT TESTED: {advice}");
                return None;
            }
        };
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{complaint}");
        // It dislikes root, and says nothing else when all is well.
        let complaints = complaint.lines().filter(|line| !line.contains("root"));
        assert_eq!(complaints.collect::<Vec<_>>(), [""; 0]);
        Some(String::from_utf8(output.stdout).unwrap())
    };
    let fields = [
        "frame.interface_name",
        "vsock.src_cid",
        "vsock.src_port",
        "vsock.dst_cid",
        "vsock.dst_port",
        "vsock.op",
        "vsock.virtio.op",
        "vsock.virtio.len",
        "frame.len",
    ];
    let mut arguments = vec!["-T", "fields", "-E", "separator=/s"];
    for field in fields {
        arguments.extend(["-e", field]);
    }
    let Some(decoded) = tshark(&arguments) else { return };
    let expected: String = file
        .packets
        .iter()
        .map(|packet| {
            let ((src, src_port), (dst, dst_port)) = (packet.src, packet.dst);
            let (class, op, len) = (packet.class, packet.op, packet.len);
            format!(
                "web {src} {src_port} {dst} {dst_port} {class} {op} {len} {}\n",
                len + 76
            )
        })
        .collect();
    assert_eq!(decoded, expected);
    let wrong = tshark(&["-Y", "_ws.malformed || _ws.expert.severity >= 6291456 || !vsock"]);
    assert_eq!(wrong.as_deref(), Some(""), "malformed, warned of, or no vsock");
}
