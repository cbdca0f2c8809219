//! Receive buffers that make no sense, are too small, too large, or are not there.

use vsock_sidecar::embedded_guest::{
    DESC_F_INDIRECT, DESC_F_NEXT, DriverOptions, Profile, RX, Refill, RxLayout, Segment, TX, Table,
    descriptor,
};
use vsock_sidecar::vsock::Op;

use crate::raw::{END, NOWHERE, Raw, SCRATCH, SPARE, header, readable, writable};
use crate::stage::{ECHO, NO_RULE, SOURCE};
use crate::support::until;
use crate::table::{Answer, ONCE, Row, Survives, few_buffers, linux};

pub const TITLE: &str = "Receive buffers";

const FEW: Row = Row {
    boot: few_buffers,
    ..Row::USUAL
};

/// Posts a bad buffer behind the good ones, and makes the device come to it.
fn post(raw: &mut Raw<'_>, segments: &[Segment], table: Table) {
    raw.guest.driver.send_chain(RX, segments, table).unwrap();
    raw.turn_buffers_over();
}

/// Posts a buffer that is fine in itself behind the good ones, and has every buffer filled with an RST: what comes into this
/// one is lost to the driver.
fn swallow(raw: &mut Raw<'_>, segments: &[Segment], count: usize) {
    raw.guest.driver.set_refill(Refill::Never);
    for _ in 0..count {
        raw.guest.driver.send_chain(RX, segments, Table::AsLinux).unwrap();
    }
    let posted = raw.guest.driver.queue(RX).outstanding();
    for _ in 0..posted {
        raw.send(header(Op::Request as u16, raw.port(), NO_RULE), &[]);
    }
    until("every buffer has come back", || {
        let queue = raw.guest.driver.queue(RX);
        queue.used_idx() == queue.avail_idx()
    });
    raw.hear();
    assert_eq!(raw.take_heard().len(), posted - count);
    raw.guest.driver.set_refill(Refill::AtHalf);
    raw.guest.driver.post_rx(usize::MAX).unwrap();
}

/// What [`swallow`] is counted as, at most.
const SWALLOWED: &[(&str, std::ops::RangeInclusive<u32>)] = &[("refused no_rule -", 1..=40)];

/// The same for a chain by hand.
fn publish(raw: &mut Raw<'_>, descriptors: &[(u64, u32, u16, u16)]) {
    raw.publish(RX, descriptors);
    raw.turn_buffers_over();
}

fn with_buffers(rx: RxLayout, rx_buffers: u16) -> (Profile, DriverOptions) {
    let (profile, options) = linux();
    let refill = Refill::Each;
    (
        profile,
        DriverOptions {
            rx,
            rx_buffers,
            refill,
            ..options
        },
    )
}

pub const ROWS: &[Row] = &[
    // ---- buffers that are none -----------------------------------------------------------------------------------
    Row {
        trick: "a buffer for the device to read",
        source: "virtio 1.2, 2.7.4.2",
        play: |raw| post(raw, &[readable(SCRATCH, 4096)], Table::Direct),
        counted: &[("vring_errors rx wrong_direction", ONCE)],
        ..FEW
    },
    Row {
        trick: "a buffer to read behind one to write",
        source: "virtio 1.2, 2.7.4.2",
        play: |raw| {
            post(
                raw,
                &[writable(SCRATCH, 4096), readable(SCRATCH, 4096)],
                Table::Indirect,
            )
        },
        counted: &[("vring_errors rx wrong_direction", ONCE)],
        ..FEW
    },
    Row {
        trick: "43 bytes",
        source: "vhost-device-vsock (RX buffer with no header written)",
        play: |raw| post(raw, &[writable(SCRATCH, 43)], Table::Direct),
        counted: &[("vring_errors rx chain_too_short", ONCE)],
        ..FEW
    },
    Row {
        trick: "no bytes",
        play: |raw| post(raw, &[writable(SCRATCH, 0); 5], Table::Direct),
        counted: &[("vring_errors rx chain_too_short", ONCE)],
        ..FEW
    },
    Row {
        trick: "a buffer that is nowhere in memory",
        play: |raw| post(raw, &[writable(NOWHERE, 4096)], Table::Direct),
        counted: &[("vring_errors rx address_unmapped", ONCE)],
        ..FEW
    },
    Row {
        trick: "room for a header, and a payload area over the end of memory",
        play: |raw| {
            post(
                raw,
                &[writable(SCRATCH, 44), writable(END - 10, 4096)],
                Table::Indirect,
            )
        },
        counted: &[("vring_errors rx address_unmapped", ONCE)],
        ..FEW
    },
    Row {
        trick: "a buffer over the end of the address space",
        play: |raw| post(raw, &[writable(u64::MAX - 100, 4096)], Table::Direct),
        counted: &[("vring_errors rx address_wraps", ONCE)],
        ..FEW
    },
    Row {
        trick: "the same MiB 33 times in one buffer",
        play: |raw| swallow(raw, &[writable(SCRATCH, 1 << 20); 33], 1),
        answer: Answer::Seen("a packet in it"),
        counted: SWALLOWED,
        ..FEW
    },
    Row {
        trick: "the whole memory 33 times in one buffer",
        source: "virtio 1.2, 2.7.5 (at most 2^32 bytes)",
        play: |raw| post(raw, &[writable(0, 1 << 27); 33], Table::Indirect),
        counted: &[("vring_errors rx chain_too_big", ONCE)],
        ..FEW
    },
    Row {
        trick: "a loop",
        source: "virtio 1.2, 2.7.5.3",
        play: |raw| {
            publish(
                raw,
                &[
                    (SCRATCH, 10, 2 | DESC_F_NEXT, 1),
                    (SCRATCH, 10, 2 | DESC_F_NEXT, 0),
                ],
            )
        },
        counted: &[("vring_errors rx descriptor_loop", ONCE)],
        ..FEW
    },
    Row {
        trick: "next outside of the ring",
        source: "libvhost-user (vu_panic)",
        play: |raw| publish(raw, &[(SCRATCH, 10, 2 | DESC_F_NEXT, 128)]),
        counted: &[("vring_errors rx next_out_of_range", ONCE)],
        ..FEW
    },
    Row {
        trick: "a head outside of the ring",
        play: |raw| {
            let queue = raw.quiet(RX);
            queue.publish(999);
            queue.kick();
            raw.turn_buffers_over();
        },
        counted: &[("vring_errors rx head_out_of_range", ONCE)],
        ..FEW
    },
    Row {
        trick: "a table in a table",
        source: "virtio 1.2, 2.7.5.3.1",
        play: |raw| {
            let table = descriptor(SCRATCH, 16, DESC_F_INDIRECT | 2, 0);
            raw.guest.driver.memory().write(SCRATCH, &table).unwrap();
            publish(raw, &[(SCRATCH, 16, DESC_F_INDIRECT, 0)]);
        },
        counted: &[("vring_errors rx indirect_nested", ONCE)],
        ..FEW
    },
    Row {
        trick: "a hundred bad buffers in a row",
        source: "vhost-device-vsock (a bad buffer was lost)",
        play: |raw| {
            for _ in 0..60 {
                raw.guest
                    .driver
                    .send_chain(RX, &[writable(NOWHERE, 4096)], Table::Direct)
                    .unwrap();
            }
            raw.turn_buffers_over();
        },
        counted: &[("vring_errors rx address_unmapped", 60..=60)],
        ..FEW
    },
    // ---- sizes ---------------------------------------------------------------------------------------------------
    Row {
        trick: "buffers of 44 bytes for data",
        source: "vhost-device-vsock #963 (packets of 0 bytes)",
        play: |raw| {
            // Behind the good ones: first in line for control packets, given back for data.
            let bad = SCRATCH;
            raw.guest
                .driver
                .send_chain(RX, &[writable(bad, 44)], Table::Direct)
                .unwrap();
            for _ in 0..40 {
                raw.good_goes_on();
            }
        },
        counted: &[("vring_errors rx no_payload_room", ONCE)],
        ..FEW
    },
    Row {
        trick: "buffers of 45 bytes, and no others",
        source: "virtio 1.2, 5.10.6.4 (no least size of a buffer)",
        boot: || with_buffers(RxLayout::OneDescriptor(45), 128),
        play: |raw| {
            let mut flow = raw.open(ECHO);
            raw.round_trip(&mut flow, b"byte by byte, each in a packet of its own");
        },
        answer: Answer::Seen("a byte a packet"),
        ..Row::USUAL
    },
    Row {
        trick: "buffers in pieces of 1 byte",
        source: "Firecracker #4310 (shape of RX buffers assumed)",
        boot: || with_buffers(RxLayout::Pieces(vec![1; 60]), 128),
        play: |raw| {
            let mut flow = raw.open(ECHO);
            raw.round_trip(&mut flow, &[3; 1000]);
        },
        answer: Answer::Seen("every byte"),
        ..Row::USUAL
    },
    Row {
        trick: "buffers of 1 MiB",
        boot: || with_buffers(RxLayout::OneDescriptor(1 << 20), 16),
        play: |raw| {
            let mut flow = raw.open(ECHO);
            for _ in 0..5 {
                raw.round_trip(&mut flow, &[3; 60_000]);
            }
        },
        answer: Answer::Seen("packets no longer than the standard has them"),
        ..Row::USUAL
    },
    Row {
        trick: "buffers that overlap",
        play: |raw| swallow(raw, &[writable(SCRATCH, 4096)], 10),
        answer: Answer::Seen("packets one over the other"),
        counted: SWALLOWED,
        ..FEW
    },
    // ---- no buffers ----------------------------------------------------------------------------------------------
    Row {
        trick: "no buffers while TX goes on",
        source: "Firecracker #6031 (spun); virtio 1.2, 5.10.6.1 (process TX all the same)",
        boot: few_buffers,
        play: |raw| {
            let flow = raw.open(SOURCE);
            raw.guest.driver.set_refill(Refill::Never);
            until("the buffers are used up", || {
                raw.hear();
                raw.stage
                    .sidecar
                    .metric("vsock_vring_full_total", &[("guest", "web"), ("queue", "rx")])
                    >= 1.0
                    && raw.guest.driver.rx_posted() == 0
            });
            // What needs no answer, or one that is owed once, is taken without end.
            raw.storm(20_000, |_| (flow.header(Op::CreditRequest), b""));
            raw.until_taken();
            raw.send(flow.header(Op::Rst), &[]);
            raw.guest.driver.set_refill(Refill::AtHalf);
            raw.guest.driver.post_rx(usize::MAX).unwrap();
            raw.good_goes_on();
            raw.take_heard();
        },
        answer: Answer::Seen("what was owed, when there are buffers again"),
        counted: &[("closed guest_rst source", ONCE)],
        survives: Survives::Others,
        ..Row::USUAL
    },
    Row {
        trick: "no buffers while each packet wants an RST",
        source: "virtio 1.2, 5.10.6.1 (bound the replies); Linux stops at a ring of them",
        play: |raw| {
            raw.guest.driver.set_refill(Refill::Never);
            let port = raw.port();
            let mut sent = 0;
            until("the ring stands still", || {
                let before = sent;
                while raw.guest.driver.queue(TX).outstanding() < 32 {
                    raw.send(header(Op::Request as u16, port, 30_000 + sent), &[]);
                    sent += 1;
                    raw.guest.driver.reclaim_tx();
                }
                assert!(sent < 10_000, "answers without bound are owed");
                // Kicked again, and with time to look, it takes no more.
                raw.guest.driver.queue(TX).kick();
                raw.stage.witnesses.went_on_since(raw.stage.witnesses.now());
                raw.guest.driver.reclaim_tx();
                sent == before && sent > 1000 && raw.guest.driver.queue(TX).outstanding() == 32
            });
            raw.guest.driver.set_refill(Refill::AtHalf);
            let mut resets = 0;
            until("every packet has its RST", || {
                raw.hear();
                raw.guest.driver.post_rx(usize::MAX).unwrap();
                resets += raw.take_heard().len() as u32;
                resets == sent
            });
            raw.good_goes_on();
        },
        answer: Answer::Seen(
            "RSTs up to a bound; then its packets wait in its own ring, and are answered later",
        ),
        counted: &[("refused no_rule -", 1000..=10_000)],
        ..Row::USUAL
    },
    Row {
        trick: "one buffer at a time",
        source: "Firecracker #6100 (RX suppressed)",
        boot: || with_buffers(RxLayout::LINUX_6_12, 1),
        play: |raw| {
            let mut flow = raw.open(ECHO);
            for _ in 0..20 {
                raw.round_trip(&mut flow, &[8; 20_000]);
                raw.send(flow.header(Op::CreditUpdate), &[]);
            }
        },
        answer: Answer::Seen("every byte"),
        ..Row::USUAL
    },
    // ---- buffers in the wrong place ------------------------------------------------------------------------------
    Row {
        trick: "a buffer that is the TX ring's table of spare descriptors",
        play: |raw| {
            let ring = raw.ring_at(TX) + 16 * u64::from(SPARE);
            swallow(raw, &[writable(ring, 256)], 1);
        },
        answer: Answer::Seen("a packet in it"),
        counted: SWALLOWED,
        ..FEW
    },
    Row {
        trick: "a buffer that is its own ring",
        source: "virtio 1.2, 2.7 (the device writes where it is told)",
        boot: few_buffers,
        play: |raw| {
            let ring = raw.ring_at(RX);
            raw.guest
                .driver
                .send_chain(RX, &[writable(ring, 16 * 128 + 6 + 256)], Table::Direct)
                .unwrap();
            raw.by_hand = true;
            // The header lies over its first descriptors, and that is all there is to know: what the ring says from now
            // on is the guest's doing.
            for _ in 0..17 {
                raw.send(header(Op::Request as u16, raw.port(), NO_RULE), &[]);
            }
            until("the device has come to it", || {
                raw.stage.sidecar.metric(
                    "vsock_connections_refused_total",
                    &[("guest", "web"), ("reason", "no_rule")],
                ) >= 17.0
            });
        },
        answer: Answer::Seen("whatever it made of its ring"),
        counted: &[
            ("refused no_rule -", 17..=17),
            ("vring_errors rx avail_index", 0..=1),
            ("vring_errors rx address_unmapped", 0..=200),
            ("vring_errors rx chain_too_short", 0..=200),
            ("vring_errors rx wrong_direction", 0..=200),
        ],
        survives: Survives::Restart,
        ..Row::USUAL
    },
];
