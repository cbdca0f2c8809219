//! TX chains that make no sense, and some that only look like it.

use vsock_sidecar::embedded_guest::{
    DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DriverOptions, Profile, Refill, Shape, TX, Table, descriptor,
};
use vsock_sidecar::vsock::Op;

use crate::raw::{END, NOWHERE, Raw, SCRATCH, header, readable, writable};
use crate::stage::{ECHO, NO_RULE};
use crate::support::LONG;
use crate::table::{Answer, ONCE, Row, Survives, linux, plain};

pub const TITLE: &str = "Descriptor chains of the TX ring";

/// A bad chain in the ring itself and through a table: each counted once.
const TWICE: std::ops::RangeInclusive<u32> = 2..=2;

/// The same chain in the ring itself and through a table.
fn both_ways(raw: &mut Raw<'_>, segments: &[vsock_sidecar::embedded_guest::Segment]) {
    for table in [Table::Direct, Table::Indirect] {
        raw.send_chain(segments, table);
    }
}

/// Writes a good REQUEST to a port without a rule at `at`.
fn write_request(raw: &mut Raw<'_>, at: u64) {
    let request = header(Op::Request as u16, raw.port(), NO_RULE);
    raw.guest.driver.memory().write(at, &request.encode()).unwrap();
}

/// Rings of 1024 entries, as many as there can be.
fn large() -> (Profile, DriverOptions) {
    let (profile, options) = linux();
    let options = DriverOptions {
        queue_size: 1024,
        rx_buffers: 64,
        ..options
    };
    (profile, options)
}

/// The smallest rings that can hold a packet.
fn rings_of(queue_size: u16) -> (Profile, DriverOptions) {
    let (profile, options) = linux();
    (
        profile,
        DriverOptions {
            queue_size,
            ..options
        },
    )
}

pub const ROWS: &[Row] = &[
    // ---- lengths and directions ----------------------------------------------------------------------------------
    Row {
        trick: "43 bytes",
        source: "vhost-device-vsock (TX parse errors lost their descriptor)",
        play: |raw| both_ways(raw, &[readable(SCRATCH, 43)]),
        counted: &[("vring_errors tx chain_too_short", TWICE)],
        ..Row::USUAL
    },
    Row {
        trick: "no bytes, in one descriptor and in ten",
        source: "vhost-device-vsock (TX parse errors lost their descriptor)",
        play: |raw| {
            both_ways(raw, &[readable(SCRATCH, 0)]);
            both_ways(raw, &[readable(SCRATCH, 0); 10]);
        },
        counted: &[("vring_errors tx chain_too_short", 4..=4)],
        ..Row::USUAL
    },
    Row {
        trick: "a buffer for the device to write",
        source: "virtio 1.2, 2.7.4.2; libvhost-user (vu_panic)",
        play: |raw| both_ways(raw, &[writable(SCRATCH, 100)]),
        counted: &[("vring_errors tx wrong_direction", TWICE)],
        ..Row::USUAL
    },
    Row {
        trick: "a header to read and a payload to write",
        source: "virtio 1.2, 2.7.4.2; virtiofsd (unwrap on descriptors)",
        play: |raw| both_ways(raw, &[readable(SCRATCH, 44), writable(SCRATCH + 44, 100)]),
        counted: &[("vring_errors tx wrong_direction", TWICE)],
        ..Row::USUAL
    },
    Row {
        trick: "a payload to write and then a header to read",
        source: "virtio 1.2, 2.7.4.2",
        play: |raw| both_ways(raw, &[writable(SCRATCH + 44, 100), readable(SCRATCH, 44)]),
        counted: &[("vring_errors tx wrong_direction", TWICE)],
        ..Row::USUAL
    },
    Row {
        trick: "4 GiB and more in one chain",
        source: "virtio 1.2, 2.7.5 (at most 2^32 bytes)",
        play: |raw| both_ways(raw, &[readable(0x10_0000, 1 << 27); 33]),
        counted: &[("vring_errors tx chain_too_big", TWICE)],
        ..Row::USUAL
    },
    // ---- addresses -----------------------------------------------------------------------------------------------
    Row {
        trick: "a header that is nowhere in memory",
        play: |raw| both_ways(raw, &[readable(NOWHERE, 44)]),
        counted: &[("vring_errors tx address_unmapped", TWICE)],
        ..Row::USUAL
    },
    Row {
        trick: "a header in memory and a payload that is not",
        play: |raw| {
            write_request(raw, SCRATCH);
            both_ways(raw, &[readable(SCRATCH, 44), readable(NOWHERE, 44)]);
        },
        counted: &[("vring_errors tx address_unmapped", TWICE)],
        ..Row::USUAL
    },
    Row {
        trick: "a header over the end of memory",
        play: |raw| both_ways(raw, &[readable(END - 20, 44)]),
        counted: &[("vring_errors tx address_unmapped", TWICE)],
        ..Row::USUAL
    },
    Row {
        trick: "a payload of 4 GiB less one over the end of memory",
        play: |raw| {
            write_request(raw, SCRATCH);
            both_ways(raw, &[readable(SCRATCH, 44), readable(END - 1, u32::MAX - 44)]);
        },
        counted: &[("vring_errors tx address_unmapped", TWICE)],
        ..Row::USUAL
    },
    Row {
        trick: "a buffer over the end of the address space",
        play: |raw| both_ways(raw, &[readable(u64::MAX - 20, 44)]),
        counted: &[("vring_errors tx address_wraps", TWICE)],
        ..Row::USUAL
    },
    Row {
        trick: "a buffer from one region into the next, and over the hole between two",
        play: |raw| {
            // [256 MiB, +1 MiB), a hole of a page, another MiB.
            let near = raw.guest.driver.memory_mut().add_region(END, 1 << 20).unwrap();
            let far = END + (1 << 20) + 0x1000;
            let far_region = raw.guest.driver.memory_mut().add_region(far, 1 << 20).unwrap();
            raw.guest.front_end.add_mem_reg(&near).unwrap();
            raw.guest.front_end.add_mem_reg(&far_region).unwrap();
            let request = header(Op::Request as u16, raw.port(), NO_RULE).encode();
            let memory = raw.guest.driver.memory();
            memory.write(END - 20, &request[..20]).unwrap();
            memory.write(END, &request[20..]).unwrap();
            raw.send_chain(&[readable(END - 20, 44)], Table::Direct);
            raw.send_chain(&[readable(END + (1 << 20) - 20, 44)], Table::Direct);
            raw.send_chain(&[readable(END, (1 << 20) + 0x2000)], Table::Direct);
        },
        // Regions that touch are one memory; a hole is none.
        answer: Answer::Rst,
        counted: &[
            ("vring_errors tx address_unmapped", TWICE),
            ("refused no_rule -", ONCE),
        ],
        ..Row::USUAL
    },
    // ---- chains through the ring's own table ---------------------------------------------------------------------
    Row {
        trick: "a loop of two descriptors",
        source: "virtio 1.2, 2.7.5.3; libvhost-user (vu_panic)",
        play: |raw| {
            raw.publish(
                TX,
                &[(SCRATCH, 10, DESC_F_NEXT, 1), (SCRATCH, 10, DESC_F_NEXT, 0)],
            )
        },
        counted: &[("vring_errors tx descriptor_loop", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "a descriptor that leads to itself",
        source: "virtio 1.2, 2.7.5.3; libvhost-user (vu_panic)",
        play: |raw| raw.publish(TX, &[(SCRATCH, 0, DESC_F_NEXT, 0)]),
        counted: &[("vring_errors tx descriptor_loop", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "next outside of the ring",
        source: "libvhost-user (vu_panic)",
        play: |raw| {
            raw.publish(TX, &[(SCRATCH, 10, DESC_F_NEXT, 128)]);
            raw.until_taken();
            raw.publish(TX, &[(SCRATCH, 10, DESC_F_NEXT, u16::MAX)]);
        },
        counted: &[("vring_errors tx next_out_of_range", TWICE)],
        ..Row::USUAL
    },
    Row {
        trick: "a head outside of the ring",
        source: "vhost-device-vsock (a bad ring ended the worker, silently)",
        play: |raw| {
            for head in [128, 1000, u16::MAX] {
                let queue = raw.quiet(TX);
                queue.publish(head);
                queue.kick();
            }
        },
        counted: &[("vring_errors tx head_out_of_range", 3..=3)],
        ..Row::USUAL
    },
    Row {
        trick: "the same head twice",
        play: |raw| {
            write_request(raw, SCRATCH);
            let queue = raw.quiet(TX);
            queue.write_descriptor(crate::raw::SPARE, SCRATCH, 44, 0, 0);
            queue.publish(crate::raw::SPARE);
            queue.publish(crate::raw::SPARE);
            queue.kick();
        },
        // Two packets; the second begins the flow anew if the first RST has not left.
        answer: Answer::Rsts(1..=2),
        counted: &[("refused no_rule -", TWICE)],
        ..Row::USUAL
    },
    Row {
        trick: "every flag that the standard does not know",
        source: "virtio 1.2, 2.7.5",
        play: |raw| {
            write_request(raw, SCRATCH);
            raw.publish(
                TX,
                &[(SCRATCH, 44, !(DESC_F_NEXT | DESC_F_WRITE | DESC_F_INDIRECT), 0)],
            );
        },
        answer: Answer::Rst,
        counted: &[("refused no_rule -", ONCE)],
        ..Row::USUAL
    },
    // ---- indirect tables -----------------------------------------------------------------------------------------
    Row {
        trick: "a table in a table",
        source: "virtio 1.2, 2.7.5.3.1",
        play: |raw| raw.publish_table(&descriptor(SCRATCH, 16, DESC_F_INDIRECT, 0), 16, 0),
        counted: &[("vring_errors tx indirect_nested", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "a table that goes on in the ring",
        source: "virtio 1.2, 2.7.5.3.1",
        play: |raw| raw.publish_table(&descriptor(SCRATCH + 64, 44, 0, 0), 16, DESC_F_NEXT),
        counted: &[("vring_errors tx indirect_with_next", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "tables of 0, 1, 15, 17 bytes and of 4 GiB less one",
        source: "virtio 1.2, 2.7.5.3.1",
        play: |raw| {
            for len in [0, 1, 15, 17, u32::MAX] {
                raw.publish_table(&descriptor(SCRATCH + 64, 44, 0, 0), len, 0);
                raw.until_taken();
            }
        },
        counted: &[("vring_errors tx indirect_length", 5..=5)],
        ..Row::USUAL
    },
    Row {
        trick: "a table of 1025 entries",
        source: "virtio 1.2, 2.7.5.3.1",
        play: |raw| {
            raw.publish_table(
                &descriptor(SCRATCH + 0x8000, 1, DESC_F_NEXT, 1).repeat(1025),
                1025 * 16,
                0,
            )
        },
        counted: &[("vring_errors tx indirect_length", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "a table of 1024 entries, longer than the ring",
        source: "virtio 1.2, 2.7.5.3.1; Linux does not check it either",
        play: |raw| {
            let request = header(Op::Request as u16, raw.port(), NO_RULE).encode();
            raw.guest
                .driver
                .memory()
                .write(SCRATCH + 0x8000, &request)
                .unwrap();
            let mut table = Vec::new();
            // The header byte by byte, then a byte of payload 980 times.
            for at in 0..1024u16 {
                let next = if at < 1023 { DESC_F_NEXT } else { 0 };
                table.extend(descriptor(SCRATCH + 0x8000 + u64::from(at), 1, next, at + 1));
            }
            raw.publish_table(&table, 1024 * 16, 0);
        },
        answer: Answer::Rst,
        counted: &[("refused no_rule -", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "a loop in a table",
        source: "virtio 1.2, 2.7.5.3",
        play: |raw| {
            let table = [
                descriptor(SCRATCH, 10, DESC_F_NEXT, 1),
                descriptor(SCRATCH, 10, DESC_F_NEXT, 0),
            ];
            raw.publish_table(&table.concat(), 32, 0);
        },
        counted: &[("vring_errors tx descriptor_loop", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "next outside of a table",
        play: |raw| raw.publish_table(&descriptor(SCRATCH, 10, DESC_F_NEXT, 5), 16, 0),
        counted: &[("vring_errors tx next_out_of_range", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "a buffer to write in a table",
        play: |raw| raw.publish_table(&descriptor(SCRATCH, 44, DESC_F_WRITE, 0), 16, 0),
        counted: &[("vring_errors tx wrong_direction", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "a table that is nowhere, over the end of memory, and over the end of the address space",
        play: |raw| {
            for at in [NOWHERE, END - 8, u64::MAX - 7] {
                raw.publish(TX, &[(at, 16, DESC_F_INDIRECT, 0)]);
                raw.until_taken();
            }
        },
        counted: &[
            ("vring_errors tx address_unmapped", TWICE),
            ("vring_errors tx address_wraps", ONCE),
        ],
        ..Row::USUAL
    },
    Row {
        trick: "a table at an odd address",
        play: |raw| {
            write_request(raw, SCRATCH + 64);
            raw.guest
                .driver
                .memory()
                .write(SCRATCH + 1, &descriptor(SCRATCH + 64, 44, 0, 0))
                .unwrap();
            raw.publish(TX, &[(SCRATCH + 1, 16, DESC_F_INDIRECT, 0)]);
        },
        answer: Answer::Rst,
        counted: &[("refused no_rule -", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "a table that was not negotiated",
        boot: plain,
        play: |raw| {
            write_request(raw, SCRATCH + 64);
            raw.publish_table(&descriptor(SCRATCH + 64, 44, 0, 0), 16, 0);
        },
        answer: Answer::Rst,
        counted: &[("refused no_rule -", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "a chain of 2000 descriptors: the whole ring, and a table at its end",
        boot: large,
        play: |raw| {
            let request = header(Op::Request as u16, raw.port(), NO_RULE).encode();
            raw.guest
                .driver
                .memory()
                .write(SCRATCH + 0x8000, &request)
                .unwrap();
            let mut table = Vec::new();
            for at in 0..1000u16 {
                let next = if at < 999 { DESC_F_NEXT } else { 0 };
                table.extend(descriptor(SCRATCH + 0xa000, 1, next, at + 1));
            }
            raw.guest.driver.memory().write(SCRATCH, &table).unwrap();
            let queue = raw.quiet(TX);
            for at in 0..900u16 {
                queue.write_descriptor(
                    100 + at,
                    SCRATCH + 0x8000 + u64::from(at),
                    1,
                    DESC_F_NEXT,
                    101 + at,
                );
            }
            queue.write_descriptor(1000, SCRATCH, 16_000, DESC_F_INDIRECT, 0);
            queue.publish(100);
            queue.kick();
        },
        answer: Answer::Rst,
        counted: &[("refused no_rule -", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "a chain that is longer than its ring",
        boot: || rings_of(8),
        play: |raw| {
            let queue = raw.quiet(TX);
            for at in 0..8 {
                queue.write_descriptor(at, SCRATCH, 1, DESC_F_NEXT, (at + 1) % 8);
            }
            queue.publish(0);
            queue.kick();
        },
        counted: &[("vring_errors tx descriptor_loop", ONCE)],
        ..Row::USUAL
    },
    // ---- shapes that are allowed ---------------------------------------------------------------------------------
    Row {
        trick: "the header in 44 descriptors, the payload in 300",
        source: "vhost-device-vsock #494, Firecracker #4284, Cloud Hypervisor #7672 (two descriptors assumed)",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            for shape in [
                Shape::split_header(44),
                Shape::split_header(44).direct(),
                Shape::cuts(&[0, 20, 0, 0, 24, 0, 1, 0]),
                Shape::cuts(&[1, 43, 1, 1]).scattered(),
                Shape::every(3),
            ] {
                raw.send_shaped(in_full(flow.header(Op::Rw), 140), &[5; 140], &shape);
                assert_eq!(raw.receive(&mut flow, 140), [5; 140]);
            }
        },
        answer: Answer::Seen("every byte, in every shape"),
        ..Row::USUAL
    },
    Row {
        trick: "64 KiB in 17 fragments, as Linux from 6.17 on sends them",
        source: "Firecracker #5485 (bytes sent twice), Cloud Hypervisor #7680",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            let bytes: Vec<u8> = (0..60_000u32).map(|at| (at / 251) as u8).collect();
            for shape in [
                Shape::linux_6_12(),
                Shape::page_fragments(100),
                Shape::page_fragments(100).direct(),
            ] {
                raw.send_shaped(in_full(flow.header(Op::Rw), 60_000), &bytes, &shape);
                assert!(raw.receive(&mut flow, 60_000) == bytes);
                raw.send(flow.header(Op::CreditUpdate), &[]);
            }
        },
        answer: Answer::Seen("every byte, in every shape"),
        ..Row::USUAL
    },
    Row {
        trick: "rings of two entries",
        boot: || rings_of(2),
        play: |raw| {
            for _ in 0..200 {
                raw.good_goes_on();
            }
        },
        ..Row::USUAL
    },
    Row {
        trick: "rings of one entry",
        boot: || {
            let (profile, options) = rings_of(1);
            let refill = Refill::Each;
            (profile, DriverOptions { refill, ..options })
        },
        play: |raw| {
            for _ in 0..200 {
                raw.good_goes_on();
            }
        },
        ..Row::USUAL
    },
    // ---- memory that changes -------------------------------------------------------------------------------------
    Row {
        trick: "a header that changes after the kick, 2000 times",
        source: "virtio 1.2, 2.7 (time of check, time of use)",
        play: |raw| {
            for round in 0..2000u64 {
                let honest = header(Op::Rst as u16, raw.port(), NO_RULE);
                let sent = raw
                    .guest
                    .driver
                    .send_packet_wait(&honest, &[], &Shape::single(), LONG)
                    .unwrap();
                let mut other = honest;
                (other.len, other.flags, other.buf_alloc) = (u32::MAX, 3, round as u32);
                raw.guest
                    .driver
                    .memory()
                    .write(sent.gpa, &other.encode())
                    .unwrap();
            }
        },
        // Either header is an RST, and one of the two has a length that no control packet has.
        counted: &[("misbehavior unexpected_payload", 0..=2000)],
        ..Row::USUAL
    },
    Row {
        trick: "a chain that changes between kick and look, 500 times",
        source: "virtio 1.2, 2.7 (time of check, time of use)",
        play: |raw| {
            write_request(raw, SCRATCH);
            raw.quiet(TX);
            for round in 0..500u16 {
                raw.until_taken();
                let queue = raw.guest.driver.queue(TX);
                let spare = crate::raw::SPARE;
                queue.write_descriptor(spare, SCRATCH, 44, 0, 0);
                queue.publish(spare);
                queue.kick();
                for change in 0..4 {
                    match (round + change) % 4 {
                        0 => queue.write_descriptor(spare, NOWHERE, 44, 0, 0),
                        1 => queue.write_descriptor(spare, SCRATCH, 44, DESC_F_NEXT, spare),
                        2 => queue.write_descriptor(spare, SCRATCH, u32::MAX, DESC_F_WRITE, 0),
                        _ => queue.write_descriptor(spare, SCRATCH, 16, DESC_F_INDIRECT, 0),
                    }
                }
                raw.hear();
            }
            raw.good_goes_on();
            raw.take_heard();
        },
        answer: Answer::Seen("RST for each that was seen as it was meant"),
        counted: &[
            ("vring_errors tx address_unmapped", 0..=500),
            ("vring_errors tx descriptor_loop", 0..=500),
            ("vring_errors tx wrong_direction", 0..=500),
            ("vring_errors tx chain_too_short", 0..=500),
            ("vring_errors tx chain_too_big", 0..=500),
            ("refused no_rule -", 0..=500),
        ],
        ..Row::USUAL
    },
    Row {
        trick: "a payload that lies in the ring itself",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            let mut head = flow.header(Op::Rw);
            head.len = 4000;
            raw.guest.driver.memory().write(SCRATCH, &head.encode()).unwrap();
            let ring = raw.ring_at(TX);
            raw.send_chain(&[readable(SCRATCH, 44), readable(ring, 4000)], Table::Direct);
            raw.receive(&mut flow, 4000);
        },
        answer: Answer::Seen("its own ring, as bytes"),
        survives: Survives::Connection,
        ..Row::USUAL
    },
];

/// The header of a packet with so many payload bytes.
fn in_full(mut header: vsock_sidecar::vsock::Header, len: u32) -> vsock_sidecar::vsock::Header {
    header.len = len;
    header
}
