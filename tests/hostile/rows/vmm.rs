//! A VMM that makes no sense. It is trusted not to attack its own guest, but it may be wrong, killed, or somebody else.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, eventfd};
use vsock_sidecar::embedded_guest::message::{self, NEED_REPLY, request};
use vsock_sidecar::embedded_guest::{EmbeddedGuest, RX, Region, TX};
use vsock_sidecar::vsock::Op;

use crate::raw::{Raw, SCRATCH};
use crate::stage::ECHO;
use crate::support::LONG;
use crate::table::{Answer, ONCE, Row, Survives, linux};

pub const TITLE: &str = "VMMs";

const RECONNECT: Row = Row {
    source: "vhost-user.rst",
    survives: Survives::Reconnect,
    ..Row::USUAL
};

const USUAL: Row = Row {
    source: "vhost-user.rst",
    ..Row::USUAL
};

/// Asks for something that makes no sense and waits for the refusal.
#[track_caller]
fn refused(raw: &mut Raw<'_>, number: u32, body: &[u8]) {
    let answer = raw.guest.front_end.ask(number, NEED_REPLY, body, &[]).unwrap();
    assert_ne!(answer.u64(), Some(0), "{} {body:02x?}", message::name(number));
}

/// Says something that makes no sense without waiting.
#[track_caller]
fn say(raw: &mut Raw<'_>, number: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
    raw.guest.front_end.send(number, 0, body, fds).unwrap();
}

fn closed(raw: &mut Raw<'_>) {
    raw.guest.front_end.wait_closed(LONG).unwrap();
}

/// The body of SET_MEM_TABLE.
fn table(regions: &[(u64, u64, u64, u64)]) -> Vec<u8> {
    let mut body = [regions.len() as u32, 0].map(u32::to_ne_bytes).concat();
    for (gpa, size, user, offset) in regions {
        body.extend(message::memory_region(*gpa, *size, *user, *offset));
    }
    body
}

/// The body of ADD_MEM_REG.
fn region(gpa: u64, size: u64, user: u64, offset: u64) -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend(message::memory_region(gpa, size, user, offset));
    body
}

/// An address of the VMM's that no region has.
const FREE: u64 = 0x7000_0000_0000;

/// Descriptors that are no eventfd.
fn odd_descriptors() -> Vec<OwnedFd> {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(writer);
    let (_, broken) = rustix::pipe::pipe().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(ours);
    vec![
        reader,
        broken,
        theirs.into(),
        File::open("/dev/null").unwrap().into(),
        File::open("/proc/self/exe").unwrap().into(),
    ]
}

pub const ROWS: &[Row] = &[
    // ---- requests that are refused -------------------------------------------------------------------------------
    Row {
        trick: "rings 2, 3, 255 and 65536 of two, and rings of 0, 3, 2048 and 2^31 entries, by who waits for the answer",
        play: |raw| {
            for index in [3, 255, 65536] {
                refused(raw, request::SET_VRING_NUM, &message::vring_state(index, 128));
                refused(raw, request::SET_VRING_BASE, &message::vring_state(index, 0));
                refused(raw, request::SET_VRING_ENABLE, &message::vring_state(index, 1));
            }
            for size in [0, 2048, 1 << 31] {
                refused(raw, request::SET_VRING_NUM, &message::vring_state(2, size));
            }
        },
        counted: &[("request_errors", 12..=12)],
        ..USUAL
    },
    Row {
        trick: "a request that nobody knows, and half a body, by who waits for the answer",
        source: "libvhost-user (vu_panic)",
        play: |raw| {
            refused(raw, 200, &[0; 8]);
            refused(raw, request::SET_VRING_NUM, &[0; 4]);
        },
        counted: &[("request_errors", 2..=2)],
        ..USUAL
    },
    Row {
        trick: "a request that nobody knows, by who does not wait",
        source: "libvhost-user (vu_panic)",
        play: |raw| {
            say(raw, 200, &[0; 8], &[]);
            closed(raw);
        },
        counted: &[("session_errors protocol", ONCE), ("request_errors", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "ring 7, by who does not wait",
        play: |raw| {
            say(raw, request::SET_VRING_NUM, &message::vring_state(7, 128), &[]);
            closed(raw);
        },
        counted: &[("session_errors vring", ONCE), ("request_errors", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "feature bits that were not offered",
        source: "QEMU (bits in no list pass from its own features)",
        play: |raw| {
            say(raw, request::SET_FEATURES, &u64::MAX.to_ne_bytes(), &[]);
            closed(raw);
        },
        counted: &[("session_errors feature", ONCE), ("request_errors", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "a body of 4 GiB less one",
        play: |raw| {
            let mut head = message::header(request::SET_MEM_TABLE, 1, 0);
            head[8..].copy_from_slice(&u32::MAX.to_ne_bytes());
            raw.guest.front_end.send_bytes(&head, &[]).unwrap();
            closed(raw);
        },
        counted: &[("session_errors protocol", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "bytes that are no message",
        play: |raw| {
            raw.guest
                .front_end
                .send_bytes(b"GET / HTTP/1.1\r\nHost: sidecar\r\n\r\n", &[])
                .unwrap();
            closed(raw);
        },
        counted: &[("session_errors protocol", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "a connection cut in the middle of a message",
        source: "vhost-device-vsock (state was kept until the VMM came again)",
        play: |raw| {
            let head = message::header(request::SET_VRING_NUM, 1, 8);
            raw.guest.front_end.send_bytes(&head[..7], &[]).unwrap();
            raw.guest
                .front_end
                .socket()
                .shutdown(std::net::Shutdown::Both)
                .unwrap();
        },
        counted: &[("session_errors protocol", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "a VMM that is killed with packets and dials under way",
        source: "vhost-device-vsock (state was kept until the VMM came again)",
        play: |raw| {
            let port = raw.port();
            for at in 0..20 {
                let head = crate::raw::header(Op::Request as u16, port + 1000 + at, crate::stage::HOLE);
                raw.guest
                    .driver
                    .queue_packet(&head, &[], &vsock_sidecar::embedded_guest::Shape::single())
                    .unwrap();
            }
            raw.guest.driver.notify_tx();
            raw.until_taken();
            raw.guest
                .front_end
                .socket()
                .shutdown(std::net::Shutdown::Both)
                .unwrap();
        },
        counted: &[
            ("session_errors peer_closed", ONCE),
            ("refused session_lost hole", 20..=20),
        ],
        ..RECONNECT
    },
    Row {
        trick: "a message byte by byte, and two at once",
        play: |raw| {
            let mut socket = raw.guest.front_end.socket();
            let body = message::vring_state(u32::from(TX), 1);
            let mut bytes = message::header(request::SET_VRING_ENABLE, 1, body.len()).to_vec();
            bytes.extend(&body);
            for byte in &bytes {
                socket.write_all(&[*byte]).unwrap();
            }
            bytes.extend(bytes.clone());
            socket.write_all(&bytes).unwrap();
        },
        ..USUAL
    },
    // ---- configuration space -------------------------------------------------------------------------------------
    Row {
        trick: "GET_CONFIG of bytes that are not there",
        source: "Cloud Hypervisor (a failing GET_CONFIG panics the VMM)",
        play: |raw| {
            for (offset, len) in [(8, 8), (0, 256), (4, 100), (255, 1)] {
                let got = raw.guest.front_end.config(offset, len).unwrap();
                assert_eq!(got.len(), len, "{offset} {len}");
            }
            assert_eq!(raw.guest.front_end.config(0, 8).unwrap(), 3u64.to_le_bytes());
        },
        answer: Answer::Seen("zeros"),
        ..USUAL
    },
    Row {
        trick: "SET_CONFIG of the CID",
        source: "virtio 1.2, 5.10.4 (guest_cid is read-only)",
        play: |raw| {
            say(
                raw,
                request::SET_CONFIG,
                &message::config(0, 0, &9u64.to_le_bytes()),
                &[],
            );
            assert_eq!(raw.guest.front_end.config(0, 8).unwrap(), 3u64.to_le_bytes());
        },
        answer: Answer::Seen("the CID that it had"),
        ..USUAL
    },
    // ---- memory --------------------------------------------------------------------------------------------------
    Row {
        trick: "a region that is larger than its file",
        source: "a SIGBUS to come",
        play: |raw| {
            let small = Region::new(0x2_0000_0000, 4096).unwrap();
            say(
                raw,
                request::ADD_MEM_REG,
                &region(0x2_0000_0000, 1 << 20, FREE, 0),
                &[small.fd()],
            );
            closed(raw);
        },
        counted: &[("session_errors memory", ONCE), ("request_errors", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "a region that ends beyond the address space",
        play: |raw| {
            let small = Region::new(0x2_0000_0000, 4096).unwrap();
            say(
                raw,
                request::ADD_MEM_REG,
                &region(u64::MAX - 100, 4096, FREE, 0),
                &[small.fd()],
            );
            closed(raw);
        },
        counted: &[("session_errors memory", ONCE), ("request_errors", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "a region over another one",
        play: |raw| {
            let small = Region::new(0x2_0000_0000, 4096).unwrap();
            say(
                raw,
                request::ADD_MEM_REG,
                &region(0x10_0000, 4096, FREE, 0),
                &[small.fd()],
            );
            closed(raw);
        },
        counted: &[("session_errors memory", ONCE), ("request_errors", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "a region of no bytes",
        play: |raw| {
            let small = Region::new(0x2_0000_0000, 4096).unwrap();
            say(
                raw,
                request::ADD_MEM_REG,
                &region(0x2_0000_0000, 0, FREE, 0),
                &[small.fd()],
            );
            closed(raw);
        },
        counted: &[("session_errors memory", ONCE), ("request_errors", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "a region of memory that may only be read",
        play: |raw| {
            let file = File::open("/proc/self/exe").unwrap();
            say(
                raw,
                request::ADD_MEM_REG,
                &region(0x2_0000_0000, 4096, FREE, 0),
                &[file.as_fd()],
            );
            closed(raw);
        },
        counted: &[("session_errors memory", ONCE), ("request_errors", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "a region that is an eventfd",
        play: |raw| {
            let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            say(
                raw,
                request::ADD_MEM_REG,
                &region(0x2_0000_0000, 4096, FREE, 0),
                &[fd.as_fd()],
            );
            closed(raw);
        },
        counted: &[("session_errors memory", ONCE), ("request_errors", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "a table with fewer descriptors than regions",
        play: |raw| {
            let small = Region::new(0x2_0000_0000, 4096).unwrap();
            let body = table(&[
                (0x2_0000_0000, 4096, FREE, 0),
                (0x3_0000_0000, 4096, FREE + 4096, 0),
            ]);
            say(raw, request::SET_MEM_TABLE, &body, &[small.fd()]);
            closed(raw);
        },
        counted: &[("session_errors memory", ONCE), ("request_errors", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "the region that its rings are in, taken away while they run",
        play: |raw| {
            let first = raw.guest.driver.memory().regions()[0].clone();
            raw.guest.front_end.rem_mem_reg(&first).unwrap();
            raw.guest.driver.queue(TX).kick();
            let port = raw.port();
            let _ = raw.guest.driver.send_packet(
                &crate::raw::header(Op::Request as u16, port, ECHO),
                &[],
                &vsock_sidecar::embedded_guest::Shape::single(),
            );
        },
        counted: &[("vring_errors tx ring_memory", ONCE)],
        survives: Survives::Restart,
        ..USUAL
    },
    Row {
        trick: "a region added and taken away 200 times while bytes flow",
        source: "KubeVirt (memory hot-plug)",
        play: |raw| {
            for _ in 0..200 {
                let extra = Region::new(0x2_0000_0000, 1 << 20).unwrap();
                raw.guest.front_end.add_mem_reg(&extra).unwrap();
                raw.good_goes_on();
                raw.guest.front_end.rem_mem_reg(&extra).unwrap();
            }
        },
        ..USUAL
    },
    // ---- rings ---------------------------------------------------------------------------------------------------
    Row {
        trick: "ring addresses outside of memory",
        play: |raw| {
            let body = message::vring_addr(u32::from(TX), 0, FREE, FREE + 4096, FREE + 8192, 0);
            say(raw, request::SET_VRING_ADDR, &body, &[]);
            closed(raw);
        },
        counted: &[("session_errors vring", ONCE), ("request_errors", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "ring addresses that are not aligned",
        source: "virtio 1.2, 2.7",
        play: |raw| {
            let base = raw.guest.driver.memory().regions()[0].user_addr() + SCRATCH;
            let body = message::vring_addr(u32::from(TX), 0, base + 1, base + 0x1001, base + 0x2001, 0);
            say(raw, request::SET_VRING_ADDR, &body, &[]);
            closed(raw);
        },
        counted: &[("session_errors vring", ONCE), ("request_errors", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "the ring's address said again, 50 times, while it runs",
        play: |raw| {
            for _ in 0..50 {
                let address = {
                    let setup = raw.guest.driver.queue(TX).setup(0);
                    message::vring_addr(u32::from(TX), 0, setup.desc, setup.used, setup.avail, 0)
                };
                say(raw, request::SET_VRING_ADDR, &address, &[]);
                raw.good_goes_on();
            }
        },
        ..USUAL
    },
    Row {
        trick: "a ring told to be elsewhere, where nothing is, while it runs",
        play: |raw| {
            let base = raw.guest.driver.memory().regions()[0].user_addr() + SCRATCH;
            let body = message::vring_addr(u32::from(TX), 0, base, base + 0x2000, base + 0x1000, 0);
            say(raw, request::SET_VRING_ADDR, &body, &[]);
            raw.guest
                .front_end
                .ask(request::GET_FEATURES, 0, &[], &[])
                .unwrap();
            raw.guest.driver.queue(TX).kick();
        },
        survives: Survives::Restart,
        ..USUAL
    },
    Row {
        trick: "a stopped ring set up in the wrong order: enabled, kick, base, address, size",
        play: |raw| {
            let base = raw.guest.front_end.vring_base(TX).unwrap();
            let setup = raw.guest.driver.queue(TX).setup(base);
            let front_end = &mut raw.guest.front_end;
            front_end.set_vring_enable(TX, true).unwrap();
            front_end.set_vring_kick(TX, setup.kick).unwrap();
            front_end.set_vring_base(TX, base).unwrap();
            front_end.set_vring_addr(&setup).unwrap();
            front_end.set_vring_call(TX, setup.call).unwrap();
            front_end.set_vring_num(TX, 128).unwrap();
        },
        ..USUAL
    },
    Row {
        trick: "GET_VRING_BASE of a ring that never ran, and twice of one that did",
        play: |raw| {
            raw.guest.front_end.vring_base(2).unwrap();
            let first = raw.guest.front_end.vring_base(TX).unwrap();
            assert_eq!(raw.guest.front_end.vring_base(TX).unwrap(), first);
        },
        answer: Answer::Seen("the same position"),
        survives: Survives::Restart,
        ..USUAL
    },
    Row {
        trick: "rings enabled and disabled 200 times",
        source: "vhost-device PR #827 (hung when a ring was disabled)",
        play: |raw| {
            for round in 0..200 {
                for queue in [RX, TX] {
                    raw.guest
                        .front_end
                        .set_vring_enable(queue, round % 2 == 1)
                        .unwrap();
                }
            }
        },
        ..USUAL
    },
    Row {
        trick: "a second VMM on the socket of a guest that runs",
        play: |raw| {
            let socket = raw.stage.sidecar.path("web.sock");
            let (profile, options) = linux();
            assert!(EmbeddedGuest::boot(&socket, profile, options).is_err());
        },
        answer: Answer::Seen("the second is turned away"),
        ..USUAL
    },
    Row {
        trick: "100 connections that say nothing, or half a word, and go",
        play: |raw| {
            for at in 0..100 {
                let mut socket = UnixStream::connect(raw.stage.sidecar.path("web.sock")).unwrap();
                let _ = socket.write_all(&vec![1; at % 12]);
            }
        },
        ..USUAL
    },
    // ---- descriptors ---------------------------------------------------------------------------------------------
    Row {
        trick: "a call descriptor that blocks, at its highest count",
        source: "virtio 1.2, 2.7.7 (interrupts that nobody takes)",
        play: |raw| {
            let call = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            raw.guest.front_end.set_vring_call(TX, call.as_fd()).unwrap();
            for _ in 0..100 {
                raw.guest.driver.queue(TX).enable_interrupts();
                raw.good_goes_on();
            }
        },
        ..USUAL
    },
    Row {
        trick: "call descriptors that are pipes, sockets and files",
        play: |raw| {
            for fd in odd_descriptors() {
                raw.guest.front_end.set_vring_call(TX, fd.as_fd()).unwrap();
                raw.guest.driver.queue(TX).enable_interrupts();
                raw.good_goes_on();
            }
        },
        ..USUAL
    },
    Row {
        trick: "kick descriptors that are pipes, sockets and files",
        play: |raw| {
            for fd in odd_descriptors() {
                raw.guest.front_end.set_vring_kick(TX, fd.as_fd()).unwrap();
            }
            let kick = raw
                .guest
                .driver
                .queue(TX)
                .setup(0)
                .kick
                .try_clone_to_owned()
                .unwrap();
            raw.guest.front_end.set_vring_kick(TX, kick.as_fd()).unwrap();
        },
        ..USUAL
    },
    Row {
        trick: "800 descriptors with messages that take none",
        play: |raw| {
            let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            let body = message::vring_state(u32::from(TX), 1);
            // The first ends the session; the others find it open still, or not.
            for _ in 0..100 {
                let _ = raw
                    .guest
                    .front_end
                    .send(request::SET_VRING_ENABLE, 0, &body, &[fd.as_fd(); 8]);
            }
            closed(raw);
        },
        counted: &[("session_errors vring", ONCE), ("request_errors", ONCE)],
        ..RECONNECT
    },
    Row {
        trick: "a call descriptor set 1000 times",
        play: |raw| {
            let call = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
            for _ in 0..1000 {
                raw.guest.front_end.set_vring_call(TX, call.as_fd()).unwrap();
            }
        },
        ..USUAL
    },
    Row {
        trick: "5000 questions",
        play: |raw| {
            for _ in 0..5000 {
                raw.guest
                    .front_end
                    .ask(request::GET_FEATURES, 0, &[], &[])
                    .unwrap();
            }
        },
        ..USUAL
    },
];
