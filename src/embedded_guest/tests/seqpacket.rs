//! The guest's SEQPACKET sockets against a small host.

use std::io::ErrorKind;
use std::net::Shutdown;
use std::time::Duration;

use rustix::io::Errno;

use super::device::from_host;
use super::host;
use super::sockets::{SOON, Setup, setup_with, wait_until};
use crate::embedded_guest::profile::feature;
use crate::embedded_guest::{DriverOptions, GuestMessage, MessageCredit, Profile, SocketOptions};
use crate::vsock::header::{Header, Op};

fn setup(options: SocketOptions) -> Setup {
    setup_with(
        feature::EVENT_IDX | feature::INDIRECT_DESC | feature::SEQPACKET,
        Profile::qemu(),
        DriverOptions::default(),
        options,
    )
}

fn message(number: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(31) + number) as u8).collect()
}

/// Lengths around packets, receive buffers and the host's buffer of 100,000 bytes; nothing at all among them.
const LENGTHS: [usize; 12] = [1, 0, 3, 4096, 0, 0, 65_536, 99_999, 65_537, 100_000, 2, 50_000];

#[test]
fn messages_of_every_length_come_back_whole_and_marked() {
    for (credit, max_packet) in [
        (MessageCredit::AsItComes, 65_536),
        (MessageCredit::Whole, 65_536),
        (MessageCredit::AsItComes, 1000),
    ] {
        let setup = setup(SocketOptions {
            message_credit: credit,
            max_packet,
            // Less than two of the larger messages.
            buf_alloc: 120_000,
            ..Default::default()
        });
        let socket = setup.sockets.connect_seqpacket(host::ECHO).unwrap();
        socket.set_read_timeout(Some(SOON));
        socket.set_write_timeout(Some(SOON));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for (number, len) in LENGTHS.into_iter().enumerate() {
                    let bytes = message(number, len);
                    match number % 3 {
                        0 => socket.send_end_of_record(&bytes).unwrap(),
                        _ => socket.send(&bytes).unwrap(),
                    }
                }
                socket.shutdown(Shutdown::Write).unwrap();
            });
            for (number, len) in LENGTHS.into_iter().enumerate() {
                let expected = GuestMessage {
                    bytes: message(number, len),
                    end_of_record: number % 3 == 0,
                };
                assert!(
                    socket.recv().unwrap() == Some(expected),
                    "message {number} of {len} bytes"
                );
            }
            assert_eq!(socket.recv().unwrap(), None);
        });
        let messages = setup.seen.lock().unwrap().messages.clone();
        for ((len, packets, _), expected) in messages.into_iter().zip(LENGTHS) {
            assert_eq!(len, expected);
            let least = len.div_ceil(max_packet as usize).max(1);
            assert!(packets >= least, "{len} bytes in {packets} packets");
            if credit == MessageCredit::Whole {
                assert_eq!(packets, least, "{len} bytes: credit for all of it was there");
            }
        }
        assert_eq!(socket.send(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
        drop(socket);
        setup.assert_clean();
    }
}

#[test]
fn a_message_that_the_host_could_never_hold_is_refused() {
    let setup = setup(SocketOptions::default());
    let socket = setup.sockets.connect_seqpacket(host::SINK).unwrap();
    let error = socket.send(&vec![0; 100_001]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::MSGSIZE.raw_os_error()));
    socket.send(&vec![0; 100_000]).unwrap();
    drop(socket);
    setup.assert_clean();
    assert_eq!(setup.seen.lock().unwrap().received[&host::SINK], 100_000);
}

#[test]
fn a_stalled_host_gets_the_part_of_a_message_that_fits_or_none_of_it() {
    for (credit, arrives) in [
        (MessageCredit::AsItComes, 100_000),
        (MessageCredit::Whole, 60_000),
    ] {
        let setup = setup(SocketOptions {
            message_credit: credit,
            ..Default::default()
        });
        let socket = setup.sockets.connect_seqpacket(host::STALLED).unwrap();
        socket.send(&vec![1; 60_000]).unwrap();
        socket.set_write_timeout(Some(Duration::from_millis(30)));
        let error = socket.send(&vec![2; 60_000]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        wait_until("what left arrives", || {
            setup.seen.lock().unwrap().received[&host::STALLED] == arrives
        });
        assert_eq!(setup.seen.lock().unwrap().messages, [(60_000, 1, 1)]);
        drop(socket);
        setup.assert_clean();
    }
}

/// Fragments of two threads' messages never mix, though both wait for credit in the middle of theirs.
#[test]
fn threads_that_share_a_socket_send_one_message_at_a_time() {
    let setup = setup(SocketOptions {
        max_packet: 7000,
        ..Default::default()
    });
    let socket = setup.sockets.connect_seqpacket(host::ECHO).unwrap();
    socket.set_read_timeout(Some(SOON));
    std::thread::scope(|scope| {
        for number in 0..4u8 {
            let socket = &socket;
            scope.spawn(move || {
                for _ in 0..10 {
                    socket.send(&vec![number; 90_000]).unwrap();
                }
            });
        }
        for _ in 0..40 {
            let message = socket.recv().unwrap().unwrap();
            assert_eq!(message.bytes.len(), 90_000);
            assert!(message.bytes.iter().all(|byte| *byte == message.bytes[0]));
        }
    });
    drop(socket);
    setup.assert_clean();
}

#[test]
fn the_host_connects_to_a_guest_server_of_its_own_type_only() {
    let setup = setup(SocketOptions::default());
    let listener = setup.sockets.listen_seqpacket(22).unwrap();
    let request = from_host(Op::Request, host::ECHO, 22);
    setup.device.inject(request, &[]);
    wait_until("a stream is reset", || setup.seen.lock().unwrap().resets == 1);
    let request = Header {
        socket_type: 2,
        ..request
    };
    setup.device.inject(request, &[]);
    let socket = listener.accept_timeout(SOON).unwrap();
    assert_eq!(socket.peer_address(), (2, host::ECHO));
    socket.set_read_timeout(Some(SOON));
    socket.send(b"from the guest").unwrap();
    assert_eq!(socket.recv().unwrap().unwrap().bytes, b"from the guest");
    drop((socket, listener));
    setup.assert_clean();
}

#[test]
fn reset_and_a_killed_vmm_end_messages_too() {
    let setup = setup(SocketOptions::default());
    let socket = setup.sockets.connect_seqpacket(host::RESETTER).unwrap();
    socket.send(b"x").unwrap();
    assert_eq!(socket.recv().unwrap(), None);
    assert!(socket.was_reset());
    assert_eq!(socket.send(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    drop(socket);
    setup.assert_clean();

    let socket = setup.sockets.connect_seqpacket(host::STALLED).unwrap();
    let waiting = socket.clone();
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let mut sent = 0;
            while waiting.send(&vec![0; 90_000]).is_ok() {
                sent += 1;
            }
            sent
        });
        let reader = scope.spawn(|| socket.recv());
        wait_until("the host's buffer is full", || {
            setup.seen.lock().unwrap().received.get(&host::STALLED) == Some(&100_000)
        });
        setup.sockets.kill();
        assert_eq!(
            reader.join().unwrap().unwrap(),
            None,
            "a sleeping reader wakes up"
        );
        assert_eq!(sender.join().unwrap(), 1, "so does one who waits for credit");
    });
    assert!(setup.sockets.connect_seqpacket(host::ECHO).is_err());
}

#[test]
fn without_the_feature_there_is_no_such_socket() {
    let offered = feature::EVENT_IDX | feature::SEQPACKET;
    let setup = setup_with(
        offered,
        Profile::cloud_hypervisor(),
        DriverOptions::default(),
        SocketOptions::default(),
    );
    let error = setup.sockets.connect_seqpacket(host::ECHO).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::SOCKTNOSUPPORT.raw_os_error()));
    drop(setup.sockets.connect(host::ECHO).unwrap());
    setup.assert_clean();
}
