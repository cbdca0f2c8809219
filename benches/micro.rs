//! Parts of the data path by themselves: `make bench-micro`. For finding what a change costs; what counts in the end is
//! `make bench`.

use std::hint::black_box;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress};
use vsock_sidecar::guest::{GuestRam, Memory, Ring, RingParts, RingPosition, RxBurst, TxBurst};
use vsock_sidecar::sys::iovec::IoVecs;
use vsock_sidecar::vsock::credit::{RecvCredit, SendCredit};
use vsock_sidecar::vsock::{
    Boundary, Cid, ConnectionId, Disposition, Event, HEADER_LEN, Header, Muxer, MuxerConfig, Op, Outgoing,
    Port,
};

const GUEST: Cid = Cid(3);
const BUFFER: u32 = 256 * 1024;

fn header(op: Op, port: u32, len: u32, fwd_cnt: u32) -> Header {
    Header {
        src_cid: GUEST,
        dst_cid: Cid::HOST,
        src_port: Port(port),
        dst_port: Port(5432),
        len,
        socket_type: 1,
        op: op as u16,
        flags: 0,
        buf_alloc: BUFFER,
        fwd_cnt,
    }
}

fn headers(c: &mut Criterion) {
    let head = header(Op::Rw, 1024, 65536, 77);
    let bytes = head.encode();
    c.bench_function("header/encode", |b| b.iter(|| black_box(&head).encode()));
    c.bench_function("header/decode", |b| b.iter(|| Header::decode(black_box(&bytes))));
}

fn credit(c: &mut Criterion) {
    let mut fwd_cnt = 0u32;
    let mut send = SendCredit::new();
    c.bench_function("credit/send a packet", |b| {
        b.iter(|| {
            // The guest has taken everything, says so, and gets 4 KiB.
            send.update(black_box(BUFFER), fwd_cnt).expect("it was sent");
            let room = send.room().min(4096);
            send.sent(room);
            fwd_cnt = fwd_cnt.wrapping_add(room);
            room
        });
    });
    let mut recv = RecvCredit::new(BUFFER);
    c.bench_function("credit/receive a packet", |b| {
        b.iter(|| {
            recv.receive(black_box(65536)).expect("there is room");
            recv.forwarded(65536);
            if recv.update_owed() {
                black_box(recv.announce());
            }
        });
    });
}

/// A muxer with so many established connections, from port 1000 on.
fn muxer(connections: u32, now: Instant) -> (Muxer, Vec<ConnectionId>) {
    let mut muxer = Muxer::new(MuxerConfig {
        guest_cid: GUEST,
        max_connections: 1 << 20,
        buf_alloc: BUFFER,
        connect_timeout: Duration::from_secs(60),
        guest_timeout: Duration::from_secs(60),
        idle_timeout: Duration::ZERO,
    });
    let mut ids = Vec::new();
    for port in 1000..1000 + connections {
        muxer.handle_packet(now, &header(Op::Request, port, 0, 0), 0);
        while let Some(event) = muxer.poll_event() {
            if let Event::Dial { id, .. } = event {
                ids.push(id);
                assert!(muxer.connected(now, id), "the connection is wanted");
            }
        }
        while muxer.poll_outgoing(now).is_some() {}
    }
    assert_eq!(ids.len(), connections as usize);
    (muxer, ids)
}

fn muxers(c: &mut Criterion) {
    let now = Instant::now();
    for connections in [1, 1000, 100_000] {
        let (mut device, ids) = muxer(connections, now);
        let mut at = 0u32;
        // In a stride that is odd, so that all have their turn and none is the neighbour of the one before.
        let mut next = move || {
            at = at.wrapping_add(7919) % connections;
            at
        };
        c.bench_function(
            &format!("muxer/64 KiB from the guest, {connections} connections"),
            |b| {
                b.iter(|| {
                    let packet = header(Op::Rw, 1000 + next(), 65536, 0);
                    match device.handle_packet(now, &packet, 65536) {
                        Disposition::Payload { id, len, .. } => device.host_wrote(now, id, len),
                        Disposition::Consumed => unreachable!("there is credit"),
                    }
                    // What is owed: at most a CREDIT_UPDATE.
                    while black_box(device.poll_outgoing(now)).is_some() {}
                });
            },
        );

        let (mut device, mut sent) = (muxer(connections, now).0, vec![0u32; connections as usize]);
        drop(ids);
        let ids: Vec<_> = device.ids().collect();
        let mut at = 0u32;
        c.bench_function(
            &format!("muxer/4 KiB to the guest, {connections} connections"),
            |b| {
                b.iter(|| {
                    at = at.wrapping_add(7919) % connections;
                    let (id, sent) = (ids[at as usize], &mut sent[at as usize]);
                    device.host_readable(id);
                    match device.poll_outgoing(now) {
                        Some(Outgoing::Data { id, limit }) => {
                            let len = limit.min(4096);
                            black_box(device.data_header(id, len, Boundary::None));
                            device.host_read(now, id, len, false);
                            *sent = sent.wrapping_add(len);
                            if limit < BUFFER / 2 {
                                let Some(port) = device
                                    .connection(id)
                                    .map(|connection| connection.key().guest_port.0)
                                else {
                                    return;
                                };
                                device.handle_packet(now, &header(Op::CreditUpdate, port, 0, *sent), 0);
                            }
                        }
                        other => unreachable!("{other:?}"),
                    }
                });
            },
        );
    }
}

const SIZE: u16 = 128;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x1800;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x10_0000;

/// A ring whose every entry is a buffer of so many bytes behind a header, and the driver's hand in it.
struct Paper {
    memory: Arc<Memory>,
    ram: GuestRam,
    ring: Ring,
    index: u16,
}

impl Paper {
    fn new(payload: u32, write: bool) -> Paper {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 64 << 20)]).expect("64 MiB of memory");
        let memory = Arc::new(memory);
        let stride = u64::from(payload + 4096);
        for index in 0..SIZE {
            let mut wire = [0; 16];
            let at = BUFFERS + u64::from(index) * stride;
            wire[..8].copy_from_slice(&at.to_le_bytes());
            wire[8..12].copy_from_slice(&(HEADER_LEN as u32 + payload).to_le_bytes());
            wire[12] = if write { 2 } else { 0 };
            let put = |bytes: &[u8], to| memory.write_slice(bytes, GuestAddress(to)).expect("in memory");
            put(&wire, DESC + 16 * u64::from(index));
            put(&index.to_le_bytes(), AVAIL + 4 + 2 * u64::from(index));
            put(&header(Op::Rw, 1000, payload, 0).encode(), at);
        }
        let fd = || -> OwnedFd { eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd") };
        let ring = Ring::new(RingParts {
            size: SIZE,
            desc: DESC,
            avail: AVAIL,
            used: USED,
            position: RingPosition::default(),
            event_idx: true,
            translated: false,
            kick: fd(),
            call: None,
        });
        Paper {
            ram: GuestRam::new(Arc::clone(&memory)),
            memory,
            ring: ring.expect("a ring as the standard wants it"),
            index: 0,
        }
    }

    /// The driver makes all entries available once more.
    fn offer(&mut self) {
        self.index = self.index.wrapping_add(SIZE);
        let index = self.index.to_le();
        let at = GuestAddress(AVAIL + 2);
        self.memory
            .store(index, at, Ordering::Release)
            .expect("the available index");
    }
}

fn rings(c: &mut Criterion) {
    let mut group = c.benchmark_group("ring, a burst of 128");
    group.throughput(Throughput::Elements(SIZE.into()));
    for payload in [64, 4096, 65536] {
        let mut paper = Paper::new(payload, false);
        group.bench_function(format!("tx, {payload} bytes"), |b| {
            b.iter(|| {
                paper.offer();
                let mut burst = TxBurst::begin(&mut paper.ring, paper.ram.view()).expect("a ring in memory");
                let mut list = IoVecs::new();
                while let Some(popped) = burst.pop() {
                    let packet = popped.expect("a good chain");
                    for slice in packet.payload(packet.payload_len) {
                        if !list.push(&slice) {
                            // Here would be a writev.
                            list.clear();
                            let _ = list.push(&slice);
                        }
                    }
                }
                assert_eq!(burst.finish().expect("a ring in memory").used, SIZE);
            });
        });
    }
    for payload in [1536, 4096, 65536] {
        let mut paper = Paper::new(payload, true);
        let head = header(Op::Rw, 1000, payload, 0).encode();
        group.bench_function(format!("rx, {payload} bytes"), |b| {
            b.iter(|| {
                paper.offer();
                let mut burst = RxBurst::begin(&mut paper.ring, paper.ram.view()).expect("a ring in memory");
                let mut left = usize::from(SIZE);
                while left > 0 {
                    let want = left.min(64) * payload as usize;
                    let got = burst.reserve(want, 64).expect("a ring in memory");
                    let mut list = IoVecs::new();
                    // Here would be a readv.
                    let read = burst.push_payload(&mut list, got);
                    left -= burst.commit(read, |_| head).expect("a ring in memory");
                }
                assert_eq!(burst.finish().expect("a ring in memory").used, SIZE);
            });
        });
    }
    group.finish();
}

criterion_group!(micro, headers, credit, muxers, rings);
criterion_main!(micro);
