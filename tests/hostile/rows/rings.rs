//! Rings that make no sense: indices, notifications, and what belongs to the device.

use vsock_sidecar::embedded_guest::{RX, Shape, TX};
use vsock_sidecar::vsock::Op;

use crate::raw::{Raw, header};
use crate::stage::{ECHO, NO_RULE};
use crate::table::{Answer, ONCE, Row, Survives, plain};

pub const TITLE: &str = "Rings";

const RESTART: Row = Row {
    survives: Survives::Restart,
    ..Row::USUAL
};

/// Moves the available index without having made anything available.
fn jump(raw: &mut Raw<'_>, queue: u16, by: u16) {
    let at = raw.quiet(queue).avail_idx();
    raw.guest.driver.queue(queue).write_avail_idx(at.wrapping_add(by));
    raw.guest.driver.queue(queue).kick();
}

pub const ROWS: &[Row] = &[
    Row {
        trick: "the TX ring's available index jumps by 5000",
        source: "vhost-device-vsock (the worker ended, silently)",
        play: |raw| jump(raw, TX, 5000),
        counted: &[("vring_errors tx avail_index", ONCE)],
        ..RESTART
    },
    Row {
        trick: "the TX ring's available index goes back by one",
        source: "vhost-device-vsock (the worker ended, silently)",
        play: |raw| jump(raw, TX, u16::MAX),
        counted: &[("vring_errors tx avail_index", ONCE)],
        ..RESTART
    },
    Row {
        trick: "the TX ring's available index goes one beyond the ring's size",
        source: "virtio 1.2, 2.7.13.3.1 (never more than Queue Size ahead)",
        play: |raw| jump(raw, TX, 129),
        counted: &[("vring_errors tx avail_index", ONCE)],
        ..RESTART
    },
    Row {
        trick: "the RX ring's available index jumps by 5000",
        source: "vhost-device-vsock (the worker ended, silently)",
        play: |raw| {
            let at = raw.quiet(RX).avail_idx();
            raw.guest.driver.queue(RX).write_avail_idx(at.wrapping_add(5000));
            let port = raw.port();
            raw.send(header(Op::Request as u16, port, NO_RULE), &[]);
        },
        counted: &[("vring_errors rx avail_index", ONCE), ("refused no_rule -", ONCE)],
        ..RESTART
    },
    Row {
        trick: "a thousand kicks of a ring that rests",
        source: "vhost-device-vsock (the worker ended, silently)",
        play: |raw| {
            jump(raw, TX, 5000);
            for _ in 0..1000 {
                raw.guest.driver.queue(TX).kick();
            }
        },
        counted: &[("vring_errors tx avail_index", ONCE)],
        ..RESTART
    },
    Row {
        trick: "ring broken and restarted, 20 times",
        source: "libvhost-user (broken until reconnect)",
        play: |raw| {
            for _ in 0..20 {
                jump(raw, TX, 5000);
                raw.guest.reboot().unwrap();
                raw.open_good();
                raw.good_goes_on();
            }
        },
        // Seen or not before the restart; each time the connection of before is gone.
        counted: &[
            ("vring_errors tx avail_index", 0..=20),
            ("closed session_lost echo", 20..=20),
        ],
        ..Row::USUAL
    },
    Row {
        trick: "the whole ring again: the index moves by its size, over chains that were used long ago",
        play: |raw| {
            let queue = raw.quiet(TX);
            let at = queue.avail_idx();
            for slot in 0..128 {
                queue.write_avail_entry(slot, crate::raw::SPARE);
            }
            queue.write_descriptor(crate::raw::SPARE, crate::raw::NOWHERE, 44, 0, 0);
            queue.write_avail_idx(at.wrapping_add(128));
            queue.kick();
            raw.until_taken();
        },
        counted: &[("vring_errors tx address_unmapped", 128..=128)],
        ..Row::USUAL
    },
    Row {
        trick: "the device's own used index overwritten",
        source: "virtio 1.2, 2.7.8 (only the device writes there)",
        play: |raw| {
            let queue = raw.quiet(TX);
            let at = queue.used_idx();
            queue.write_used_idx(at.wrapping_add(1000));
            // The next packet shows the right one again.
            raw.good_goes_on();
        },
        ..Row::USUAL
    },
    Row {
        trick: "avail_event and the device's used elements overwritten, 100 times",
        source: "virtio 1.2, 2.7.8 (only the device writes there)",
        play: |raw| {
            for round in 0..100u8 {
                // Behind the table and the available ring, at the next multiple of 64: flags, index, elements, avail_event.
                let used = raw.ring_at(TX) + (16 * 128 + 6 + 2 * 128u64).next_multiple_of(64);
                raw.quiet(TX);
                let memory = raw.guest.driver.memory();
                memory.write(used + 4, &[round; 8 * 128]).unwrap();
                memory.write(used + 4 + 8 * 128, &[round; 2]).unwrap();
                raw.guest.driver.queue(TX).kick();
                raw.good_goes_on();
            }
        },
        ..Row::USUAL
    },
    Row {
        trick: "100,000 kicks with nothing behind them",
        source: "Firecracker #6031 (spun)",
        play: |raw| {
            for _ in 0..50_000 {
                raw.guest.driver.queue(TX).kick();
                raw.guest.driver.queue(RX).kick();
            }
        },
        ..Row::USUAL
    },
    Row {
        trick: "the kick eventfd at its highest count",
        play: |raw| {
            let kick = raw.guest.driver.queue(TX).setup(0).kick;
            let _ = rustix::io::write(kick, &(u64::MAX - 1).to_ne_bytes());
            raw.guest.driver.queue(TX).kick();
        },
        ..Row::USUAL
    },
    Row {
        trick: "packets without a kick",
        source: "virtio 1.2, 2.7.10",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            let mut head = flow.header(Op::Rw);
            head.len = 5;
            for _ in 0..10 {
                raw.guest
                    .driver
                    .queue_packet(&head, b"still", &Shape::single())
                    .unwrap();
            }
            // Found at the next kick at the latest.
            raw.good_goes_on();
            raw.receive(&mut flow, 50);
        },
        answer: Answer::Seen("every byte, with the next kick at the latest"),
        ..Row::USUAL
    },
    Row {
        trick: "a used_event that is nowhere near, a thousand times",
        source: "virtio 1.2, 2.7.7",
        play: |raw| {
            let port = raw.port();
            let mut seed = 1u16;
            raw.storm(1000, |_| (header(Op::Rst as u16, port, ECHO), b""));
            for _ in 0..1000 {
                seed = seed.wrapping_mul(25173).wrapping_add(13849);
                raw.guest.driver.queue(TX).write_used_event(seed);
                raw.guest.driver.queue(RX).write_used_event(seed);
                let head = header(Op::Request as u16, port, NO_RULE);
                let _ = raw.guest.driver.send_packet(&head, &[], &Shape::single());
                raw.guest.driver.reclaim_tx();
            }
            raw.until_taken();
            raw.good_goes_on();
            raw.take_heard();
        },
        answer: Answer::Seen("RSTs, and interrupts where it asked for them"),
        counted: &[("refused no_rule -", 1..=1000)],
        ..Row::USUAL
    },
    Row {
        trick: "an available ring whose flags are all set",
        source: "virtio 1.2, 2.7.6",
        boot: plain,
        play: |raw| {
            let at = raw.ring_at(TX) + 16 * 128;
            let sent = raw.guest.driver.send_packet(
                &header(Op::Request as u16, raw.port(), NO_RULE),
                &[],
                &Shape::single(),
            );
            sent.unwrap();
            raw.guest.driver.memory().write(at, &[0xff, 0xff]).unwrap();
        },
        answer: Answer::Rst,
        counted: &[("refused no_rule -", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "a TX ring that is disabled in the middle of a burst, 50 times",
        source: "vhost-device PR #827 (hung when a ring was disabled)",
        play: |raw| {
            let port = raw.port();
            for _ in 0..50 {
                for _ in 0..20 {
                    let head = header(Op::Rst as u16, port, ECHO);
                    let _ = raw.guest.driver.queue_packet(&head, &[], &Shape::single());
                }
                raw.guest.driver.notify_tx();
                raw.guest.front_end.set_vring_enable(TX, false).unwrap();
                raw.guest.front_end.set_vring_enable(TX, true).unwrap();
                raw.guest.driver.queue(TX).kick();
                raw.until_taken();
                raw.guest.driver.reclaim_tx();
            }
        },
        ..Row::USUAL
    },
    Row {
        trick: "an RX ring that is disabled while data comes, 50 times",
        source: "Firecracker #6100 (RX suppressed after a pause)",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            for _ in 0..50 {
                raw.send(flow.header(Op::Rw), &[4; 5000]);
                raw.guest.front_end.set_vring_enable(RX, false).unwrap();
                raw.guest.front_end.set_vring_enable(RX, true).unwrap();
                raw.receive(&mut flow, 5000);
            }
        },
        answer: Answer::Seen("every byte"),
        ..Row::USUAL
    },
];
