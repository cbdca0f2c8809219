//! A VMM that takes its guest's memory away at every place where a device touches it, and panics of the device thread: what
//! the host side gets to see, what is counted, and that the next session is served.

use std::io::Read;
use std::os::unix::net::UnixStream;

use super::bench::*;
use super::*;
use crate::config::Framing;
use crate::guest::{MemoryLoss, RingPosition};
use crate::host::HostStream;
use crate::host::listen::Incoming;
use crate::metrics::Direction;
use crate::vsock::{CloseReason, Op};

/// Pages of guest memory that stay; rings, headers and [`GOOD`] are among them, [`LOST`] is not.
const LEFT: u64 = 300;
const GOOD: u64 = 30;
const LOST: u64 = 10;

const TRUNCATED: MemoryLoss = MemoryLoss::Truncated {
    start: 0,
    end: PAGES * PAGE,
    len: LEFT * PAGE,
};

/// What the service gets until its connection ends.
fn rest(mut stream: UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // A reset is an end, too.
    let end = stream.read_to_end(&mut all);
    assert!(
        end.as_ref()
            .map_or_else(|e| e.kind() == io::ErrorKind::ConnectionReset, |_| true),
        "{end:?}"
    );
    all
}

/// The session has ended for want of memory, with its one connection, and nobody is blamed.
#[track_caller]
fn assert_lost(bench: &mut Bench, loss: MemoryLoss) {
    bench.crank();
    assert_eq!(bench.events_told(), [DeviceEvent::MemoryLost(loss)]);
    assert_ended(bench);
    let metrics = Arc::clone(&bench.device.config.metrics);
    assert!(metrics.misbehavior.iter().all(|kind| kind.get() == 0));
    for queue in &metrics.queues {
        assert!(queue.errors.iter().all(|reason| reason.get() == 0));
    }
}

#[track_caller]
fn assert_ended(bench: &mut Bench) {
    let snapshot = bench.snapshot();
    assert!(snapshot.rings.is_empty());
    assert_eq!(snapshot.connection_count, 0);
    let metrics = Arc::clone(&bench.device.config.metrics);
    let rules = Arc::clone(&bench.device.config.rules);
    let rule = rules.outbound(0).unwrap().metrics();
    assert_eq!((rule.opened.get(), rule.active.get()), (1, 0));
    let closed: Vec<u64> = rule.closed.iter().map(|reason| reason.get()).collect();
    assert_eq!(closed[CloseReason::SessionLost as usize], 1);
    assert_eq!(closed.iter().sum::<u64>(), 1);
    assert_eq!(metrics.buffered_bytes[0].get(), 0);
}

/// Another VMM comes, and its guest is served.
#[track_caller]
fn assert_serves_again(bench: &mut Bench) {
    bench.next_vmm();
    let mut service = bench.connected();
    bench.map(GOOD);
    bench.put(iova(GOOD), b"again");
    bench.send(Op::Rw, &[(iova(GOOD), 5)]);
    assert_eq!(read(bench, &mut service, 5), b"again");
}

/// The rings run, a connection is established, and the pages of the tests are mapped.
fn connected() -> (Bench, UnixStream) {
    connected_on(Bench::new(Addresses::Iova))
}

fn connected_on(mut bench: Bench) -> (Bench, UnixStream) {
    let service = bench.connected();
    for page in [GOOD, LOST] {
        bench.map(page);
    }
    assert!(gpa(GOOD) < LEFT * PAGE && gpa(LOST) >= LEFT * PAGE);
    (bench, service)
}

/// sendmsg() answers EFAULT, without a signal, or sends less. What comes behind the hole is not sent in its place, nor the
/// SHUTDOWN that would make the rest look like all.
#[test]
fn payload_that_is_gone_ends_the_stream_before_it() {
    let (mut bench, service) = connected();
    bench.put(iova(GOOD), &pattern(1, 4096));
    bench.send(Op::Rw, &[(iova(GOOD), 4096)]);
    bench.truncate(LEFT);
    bench.queue(BUFFERS + 100, Op::Rw, &[(iova(GOOD), 4096)]);
    bench.queue(BUFFERS + 100, Op::Rw, &[(iova(LOST), 4096)]);
    bench.queue(BUFFERS + 100, Op::Rw, &[(iova(GOOD), 4096)]);
    bench.queue(BUFFERS + 100, Op::Shutdown, &[]);
    bench.kick(TX);
    assert_lost(&mut bench, TRUNCATED);
    let got = rest(service);
    // How much of what it was to send together is for the kernel to say.
    let sent = [pattern(1, 4096), pattern(1, 4096)].concat();
    assert!(got.len() >= 4096 && sent.starts_with(&got), "{} bytes", got.len());
    assert_serves_again(&mut bench);
}

/// What a socket does not take is copied by the device itself, which is a signal.
#[test]
fn bytes_that_a_full_socket_left_over_are_not_replaced_by_zeros() {
    let (mut bench, service) = connected();
    let before = crate::sys::sigbus::contained();
    bench.put(iova(GOOD), &[7; 4096]);
    while bench.device.config.metrics.buffered_bytes[0].get() == 0 {
        bench.send(Op::Rw, &[(iova(GOOD), 4096); 3]);
        bench.sent();
    }
    bench.truncate(LEFT);
    bench.send(Op::Rw, &[(iova(GOOD), 4096), (iova(LOST), 4096)]);
    assert!(crate::sys::sigbus::contained() > before);
    assert_lost(&mut bench, TRUNCATED);
    let got = rest(service);
    assert!(!got.is_empty() && got.iter().all(|byte| *byte == 7), "zeros");
    assert_serves_again(&mut bench);
}

/// A message is whole or it is nothing, also where its bytes were taken one by one.
#[test]
fn a_message_whose_end_is_gone_is_not_sent_shortened() {
    const EOM: u32 = 1;
    // The last page of the second one, or all of it: kept for later, or written straight away.
    for second in [&[GOOD, LOST][..], &[LOST]] {
        let framing = Some(Framing { max_message: 1 << 16 });
        let mut bench = Bench::with_framing(Addresses::Iova, framing);
        bench.ask(|done| Command::SetTypes {
            stream: true,
            seqpacket: true,
            done,
        });
        let (mut bench, service) = connected_on(bench);
        bench.put(iova(GOOD), &[7; 4096]);
        bench.truncate(LEFT);
        bench.queue_flagged(BUFFERS + 100, Op::Rw, EOM, &[(iova(GOOD), 3)]);
        for (at, page) in second.iter().enumerate() {
            let flags = if at + 1 == second.len() { EOM } else { 0 };
            bench.queue_flagged(BUFFERS + 100, Op::Rw, flags, &[(iova(*page), 4096)]);
        }
        bench.queue(BUFFERS + 100, Op::Shutdown, &[]);
        bench.kick(TX);
        assert_lost(&mut bench, TRUNCATED);
        assert_eq!(rest(service), [0, 0, 0, 3, 7, 7, 7]);
    }
}

#[test]
fn a_header_that_is_gone_is_no_misbehavior_of_the_guest() {
    let (mut bench, service) = connected();
    bench.queue(LOST, Op::Rw, &[(iova(GOOD), 64)]);
    bench.truncate(LEFT);
    bench.kick(TX);
    assert_lost(&mut bench, TRUNCATED);
    assert!(rest(service).is_empty());
    assert_serves_again(&mut bench);
}

/// recvmsg() answers EFAULT; the socket is not to blame.
#[test]
fn a_receive_buffer_that_is_gone_ends_the_session_and_not_the_socket() {
    let (mut bench, mut service) = connected();
    // The posted buffers lie in pages 16 to 23: 20 is the first of them that goes.
    let left = gpa(20) / PAGE;
    assert!((0..8).all(|page| gpa(page) / PAGE < left || page == 7));
    bench.truncate(left);
    write(&mut service, &pattern(0, 6 * 4096));
    let expected = MemoryLoss::Truncated {
        start: 0,
        end: PAGES * PAGE,
        len: left * PAGE,
    };
    bench.until(|bench| bench.device.ram.is_none());
    assert_lost(&mut bench, expected);
    assert_serves_again(&mut bench);
}

/// A guest that does nothing, and then kicks: both rings are gone, all of the memory with them.
#[test]
fn rings_that_are_gone_are_found_at_the_next_kick() {
    for index in [RX, TX] {
        let (mut bench, service) = connected();
        bench.truncate(0);
        bench.crank();
        bench.kick(index);
        let all = MemoryLoss::Truncated {
            start: 0,
            end: PAGES * PAGE,
            len: 0,
        };
        assert_lost(&mut bench, all);
        assert!(rest(service).is_empty());
        assert_serves_again(&mut bench);
    }
}

/// The gauges look at the rings whenever the thread wakes, whatever for.
#[test]
fn a_look_at_the_rings_for_a_reader_is_contained() {
    let (mut bench, service) = connected();
    bench.truncate(0);
    let snapshot = bench.ask(Command::Snapshot);
    assert!(snapshot.rings.len() <= 2);
    bench.crank();
    assert!(bench.device.ram.is_none());
    assert_eq!(rest(service), b"");
    assert_serves_again(&mut bench);
}

/// Memory that went while no ring ran is found by the start of one.
#[test]
fn rings_in_memory_that_is_gone_do_not_start_a_session() {
    let mut bench = Bench::new(Addresses::GuestPhysical);
    bench.truncate(0);
    // Zeros make a ring that nobody has used.
    let _ = bench.start_at(RX, RingPosition::default());
    bench.crank();
    assert!(matches!(
        bench.events_told()[..],
        [DeviceEvent::MemoryLost(MemoryLoss::Truncated { len: 0, .. })]
    ));
    assert!(bench.snapshot().rings.is_empty());
}

/// The last that a turn does is to look at the rings for the gauges. What is lost then is asked for in the next turn, which may begin
/// with another table of the same regions: the zeros are still there, and the table has seen no fault.
#[test]
fn a_loss_is_not_forgotten_over_another_memory_table() {
    let (mut bench, service) = connected();
    bench.truncate(0);
    bench.device.show();
    // Its length is what it was: nothing is to be seen of it any more.
    bench.truncate(PAGES);
    bench.share_again();
    assert_lost(&mut bench, MemoryLoss::Unbacked);
    assert!(rest(service).is_empty());
    assert_serves_again(&mut bench);
}

/// What the device reports and does when it has let go: once.
#[test]
fn the_loss_is_told_once() {
    let (mut bench, _service) = connected();
    bench.truncate(0);
    bench.kick(TX);
    for _ in 0..3 {
        bench.kick(TX);
        bench.kick(RX);
    }
    assert_eq!(bench.events_told().len(), 1);
}

/// Two guests of a process: one's loss is nothing to the other, whose memory is looked at from then on.
#[test]
fn another_guest_of_the_process_goes_on() {
    let (mut bench, _service) = connected();
    let (mut other, mut others_service) = connected();
    bench.truncate(0);
    bench.kick(TX);
    assert_eq!(bench.events_told().len(), 1);
    other.put(iova(GOOD), b"fine");
    other.send(Op::Rw, &[(iova(GOOD), 4)]);
    assert_eq!(read(&mut other, &mut others_service, 4), b"fine");
    assert_eq!(other.events_told(), []);
}

/// The muxer, the rings and the session are gone; the handle is the same.
#[test]
fn a_device_that_panicked_has_ended_its_connections_and_serves_again() {
    let (mut bench, service) = connected();
    let told = std::mem::replace(&mut bench.told, mpsc::channel().1);
    bench.panic();
    assert_eq!(
        told.try_recv(),
        Err(mpsc::TryRecvError::Disconnected),
        "the session is told by the end of its line"
    );
    assert_eq!(bench.device.gauges.open_connections(), 0);
    assert_ended(&mut bench);
    assert!(rest(service).is_empty());
    // Nothing is left of the kick descriptors in the poll, which the VMM keeps open.
    bench.kick(TX);
    assert_serves_again(&mut bench);
}

#[test]
fn bytes_that_were_held_when_the_device_panicked_are_not_counted_any_more() {
    let (mut bench, service) = connected();
    bench.put(iova(GOOD), &[7; 4096]);
    while bench.device.config.metrics.buffered_bytes[0].get() == 0 {
        bench.send(Op::Rw, &[(iova(GOOD), 4096); 3]);
        bench.sent();
    }
    bench.panic();
    assert_ended(&mut bench);
    assert!(rest(service).iter().all(|byte| *byte == 7));
}

/// The dial of a guest that is gone must not become the connection of the next one, which begins to count anew.
#[test]
fn an_answer_to_a_dial_from_before_the_panic_finds_nobody() {
    let (mut bench, service) = connected();
    let flows = bench.snapshot();
    assert_eq!(flows.connection_count, 1);
    bench.panic();
    drop(service);
    bench.next_vmm();
    let mut service = bench.connected();
    // The first connection of the device had token 0, and so would the first of the next.
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let stale = Command::Dialed {
        token: 0,
        result: Ok(HostStream::new(ours.into()).unwrap()),
        took: Duration::ZERO,
    };
    bench.handle.send(stale).unwrap();
    bench.crank();
    assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "closed");
    bench.map(GOOD);
    bench.put(iova(GOOD), b"mine");
    bench.send(Op::Rw, &[(iova(GOOD), 4)]);
    assert_eq!(read(&mut bench, &mut service, 4), b"mine");
}

#[test]
fn a_drain_goes_on_after_a_panic() {
    let mut bench = Bench::new(Addresses::Iova);
    bench.handle.send(Command::Drain).unwrap();
    bench.crank();
    bench.panic();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let client = Incoming {
        port: 22,
        stream: HostStream::new(ours.into()).unwrap(),
        socket_type: crate::config::SocketType::Stream,
        framing: None,
        preface: Vec::new(),
        wants_ok: false,
        wait_for_guest: false,
        peer: "client".into(),
    };
    let metrics = bench
        .device
        .config
        .metrics
        .rules(Direction::HostToGuest, &["ssh".to_owned()]);
    let rule = Rule::new(Direction::HostToGuest, Arc::clone(&metrics[0]));
    bench
        .handle
        .send(Command::Incoming {
            rule,
            incoming: client,
        })
        .unwrap();
    bench.crank();
    assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "refused");
}

/// On its thread: the listener is called there, and has panicked over what it was told.
#[test]
fn a_panic_on_the_device_thread_costs_the_command_and_not_the_thread() {
    let control = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let metrics = GuestMetrics::detached(&labels());
    let running = device_counting(&control, Arc::clone(&metrics));
    let handle = running.handle.clone();
    for round in 1..=5 {
        let heard = Arc::new(());
        let held = Arc::clone(&heard);
        let listener: handle::Listener = Box::new(move |event| {
            let _held = &held;
            panic!("the listener cannot stand {event:?}");
        });
        handle
            .call(|done| Command::SetListener {
                listener: Some(listener),
                done,
            })
            .unwrap();
        let memory =
            Arc::new(crate::guest::Memory::from_ranges(&[(vm_memory::GuestAddress(0), 1 << 16)]).unwrap());
        let ram = Some(GuestRam::new(memory));
        handle.call(|done| Command::SetMemory { ram, done }).unwrap();
        // Its areas are missing, which is told.
        let started = handle.call(|done| Command::StartQueue {
            index: RX,
            parts: RingParts {
                size: 16,
                desc: 0x1_0000_0000,
                avail: 0x1_0000_1000,
                used: 0x1_0000_2000,
                position: RingPosition::default(),
                event_idx: false,
                translated: true,
                kick: rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap(),
                call: None,
            },
            done,
        });
        assert_eq!(started, Err(DeviceGone));
        // The thread lives, and has let go of the session.
        let snapshot = handle.call(Command::Snapshot).unwrap();
        assert!(snapshot.rings.is_empty());
        assert_eq!(Arc::strong_count(&heard), 1);
        assert_eq!(metrics.device_panics.get(), round);
    }
    running.join().unwrap();
}

/// A reload that comes while the device is being put together anew is what it is put together from, and one that came before the
/// panic is not forgotten by it.
#[test]
fn rules_and_limits_outlive_a_panic() {
    let mut bench = Bench::new(Addresses::Iova);
    let metrics = Arc::clone(&bench.device.config.metrics);
    let before = Arc::clone(&bench.device.config.rules);
    let reconfigure = |connections: usize| {
        let limits = Limits {
            connections,
            ..Limits::default()
        };
        let rules = Arc::new(Rules::new(&[], &[], &[], &metrics, Some(&before)));
        let (done, _) = tokio::sync::oneshot::channel();
        let settings = Settings { limits, rules };
        Command::Reconfigure { settings, done }
    };
    bench.handle.send(reconfigure(7)).unwrap();
    bench.crank();
    bench.panic();
    let device = &bench.device;
    assert_eq!(device.config.limits.connections, 7);
    assert_eq!(device.switchboard.muxer.config().max_connections, 7);
    assert!(device.config.rules.outbound(0).is_none());
    // In the queue while it happens.
    bench.handle.send(reconfigure(8)).unwrap();
    bench.panic();
    bench.crank();
    assert_eq!(bench.device.switchboard.muxer.config().max_connections, 8);
}
