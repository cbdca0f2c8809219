//! The guest's sockets against a small host.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::device::{TestDevice, from_host, pause};
use super::host::{self, Seen, Services};
use crate::embedded_guest::profile::feature;
use crate::embedded_guest::{
    DriverOptions, EmbeddedGuest, Profile, RxLayout, Shape, SocketOptions, Sockets, Violation,
};
use crate::vsock::header::{Header, Op};

pub const SOON: Duration = Duration::from_secs(10);

pub struct Setup {
    pub sockets: Sockets,
    pub device: TestDevice,
    pub seen: Arc<Mutex<Seen>>,
}

fn setup(driver: DriverOptions, options: SocketOptions) -> Setup {
    let offered = feature::EVENT_IDX | feature::INDIRECT_DESC;
    setup_with(offered, Profile::qemu(), driver, options)
}

/// A guest under a VMM of this kind on a device that offers these features.
pub fn setup_with(offered: u64, profile: Profile, driver: DriverOptions, options: SocketOptions) -> Setup {
    let (services, seen) = Services::new(100_000);
    let device = TestDevice::start(offered, services);
    let guest = EmbeddedGuest::boot(&device.socket(), profile, driver).unwrap();
    device.wait_until("the device knows its rings", |s| s.kicks[0] > 0);
    Setup {
        sockets: Sockets::start(guest, options).unwrap(),
        device,
        seen,
    }
}

fn default_setup() -> Setup {
    setup(DriverOptions::default(), SocketOptions::default())
}

impl Setup {
    /// Both sides kept the rules, and nothing is left.
    pub fn assert_clean(&self) {
        wait_until("all connections have ended", || {
            self.sockets.open_connections() == 0
        });
        wait_until("the host knows", || self.seen.lock().unwrap().open == 0);
        assert_eq!(self.seen.lock().unwrap().faults, Vec::<String>::new());
        let stats = self.sockets.stats();
        assert!(stats.violations.is_empty(), "{:?}", stats.violations);
        assert_eq!(self.sockets.crossed_resets(), 0);
    }
}

pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "timed out waiting until {what}");
        pause();
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

#[test]
fn a_stream_echoes_a_megabyte_in_every_layout_and_half_closes() {
    for (rx, shape) in [
        (RxLayout::LINUX_6_12, Shape::linux_6_12()),
        (RxLayout::TwoDescriptors, Shape::header_then_payload()),
        (RxLayout::for_payload(65536), Shape::page_fragments(17)),
    ] {
        let setup = setup(
            DriverOptions {
                rx,
                ..Default::default()
            },
            SocketOptions {
                shape,
                ..Default::default()
            },
        );
        let stream = setup.sockets.connect(host::ECHO).unwrap();
        assert_eq!(stream.peer_address(), (2, host::ECHO));
        let sent = pattern(1_000_000);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                (&stream).write_all(&sent).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            });
            let mut received = Vec::new();
            (&stream).read_to_end(&mut received).unwrap();
            assert!(received == sent);
        });
        assert_eq!((&stream).write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
        drop(stream);
        setup.assert_clean();
        setup.sockets.shut_down().unwrap();
    }
}

#[test]
fn connect_is_refused_at_once_or_times_out() {
    let options = SocketOptions {
        connect_timeout: Duration::from_millis(50),
        ..Default::default()
    };
    let setup = setup(DriverOptions::default(), options);
    assert_eq!(
        setup.sockets.connect(host::REFUSED).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    assert_eq!(
        setup.sockets.connect(host::MUTE).unwrap_err().kind(),
        ErrorKind::TimedOut
    );
    setup.assert_clean();
}

#[test]
fn a_slow_reader_is_never_sent_more_than_its_buffer() {
    let options = SocketOptions {
        buf_alloc: 70_000,
        ..Default::default()
    };
    let setup = setup(DriverOptions::default(), options);
    let mut stream = setup.sockets.connect(host::SOURCE).unwrap();
    let mut total = 0;
    let mut bytes = [0; 10_007];
    loop {
        let len = stream.read(&mut bytes).unwrap();
        if len == 0 {
            break;
        }
        for (i, byte) in bytes[..len].iter().enumerate() {
            assert_eq!(*byte, ((total + i) % 251) as u8);
        }
        total += len;
    }
    assert_eq!(total, host::SOURCE_BYTES);
    drop(stream);
    setup.assert_clean();
    assert!(setup.sockets.stats().sent.count(Op::CreditUpdate) > 10);
}

#[test]
fn a_stalled_host_takes_its_buffer_and_no_more() {
    let setup = default_setup();
    let mut stream = setup.sockets.connect(host::STALLED).unwrap();
    stream.set_write_timeout(Some(Duration::from_millis(50)));
    let mut written = 0;
    let error = loop {
        match stream.write(&[1; 30_000]) {
            Ok(len) => written += len,
            Err(error) => break error,
        }
    };
    assert_eq!((error.kind(), written), (ErrorKind::WouldBlock, 100_000));
    // Meanwhile others go on.
    let mut other = setup.sockets.connect(host::ECHO).unwrap();
    other.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    other.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
    drop((stream, other));
    setup.assert_clean();
}

#[test]
fn many_connections_at_once() {
    let setup = default_setup();
    std::thread::scope(|scope| {
        for number in 0..64u8 {
            let sockets = &setup.sockets;
            scope.spawn(move || {
                let mut stream = sockets.connect(host::ECHO).unwrap();
                for _ in 0..5 {
                    stream.write_all(&[number; 20_000]).unwrap();
                    let mut answer = vec![0; 20_000];
                    stream.read_exact(&mut answer).unwrap();
                    assert!(answer.iter().all(|b| *b == number));
                }
            });
        }
    });
    setup.assert_clean();
    assert_eq!(setup.seen.lock().unwrap().received[&host::ECHO], 64 * 100_000);
}

#[test]
fn the_host_connects_to_a_guest_server() {
    let setup = default_setup();
    let request = |port: u32, host_port: u32| {
        setup.device.inject(from_host(Op::Request, host_port, port), &[]);
    };
    request(22, 5000);
    wait_until("nobody listens: RST", || setup.seen.lock().unwrap().resets == 1);
    let listener = setup.sockets.listen(22).unwrap();
    // The host's services act by the host's port: this end echoes.
    request(22, host::ECHO);
    let mut stream = listener.accept_timeout(SOON).unwrap();
    assert_eq!(
        (stream.local_port(), stream.peer_address()),
        (22, (2, host::ECHO))
    );
    stream.write_all(b"from the guest").unwrap();
    let mut answer = [0; 14];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"from the guest");
    assert_eq!(
        listener
            .accept_timeout(Duration::from_millis(5))
            .unwrap_err()
            .kind(),
        ErrorKind::WouldBlock
    );
    drop((stream, listener));
    setup.assert_clean();
}

#[test]
fn reset_reads_as_the_end_and_writes_as_a_broken_pipe() {
    let setup = default_setup();
    let mut stream = setup.sockets.connect(host::RESETTER).unwrap();
    stream.write_all(b"x").unwrap();
    assert_eq!(stream.read(&mut [0; 10]).unwrap(), 0);
    assert!(stream.was_reset());
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    drop(stream);

    let stream = setup.sockets.connect(host::ECHO).unwrap();
    stream.abort();
    wait_until("the host sees the RST", || setup.seen.lock().unwrap().resets == 1);
    drop(stream);
    setup.assert_clean();
}

#[test]
fn a_read_waits_as_long_as_it_was_told() {
    let setup = default_setup();
    let mut stream = setup.sockets.connect(host::ECHO).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(10)));
    assert_eq!(
        stream.read(&mut [0; 10]).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    stream.shutdown(Shutdown::Read).unwrap();
    assert_eq!(stream.read(&mut [0; 10]).unwrap(), 0);
    drop(stream);
    setup.assert_clean();
}

#[test]
fn a_guest_that_holds_its_receive_ring_delays_and_loses_nothing() {
    let setup = default_setup();
    let mut stream = setup.sockets.connect(host::ECHO).unwrap();
    setup.sockets.hold_rx(true);
    stream.write_all(b"held").unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(30)));
    assert_eq!(
        stream.read(&mut [0; 10]).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    setup.sockets.hold_rx(false);
    stream.set_read_timeout(Some(SOON));
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"held");
    drop(stream);
    setup.assert_clean();
}

#[test]
fn after_a_reboot_everything_is_new() {
    let setup = default_setup();
    let listener = setup.sockets.listen(22).unwrap();
    let mut stream = setup.sockets.connect(host::ECHO).unwrap();
    stream.write_all(b"x").unwrap();
    setup.sockets.reboot().unwrap();
    assert!(listener.accept().is_err());
    assert!(stream.was_reset());
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    drop((listener, stream));
    let mut stream = setup.sockets.connect(host::ECHO).unwrap();
    stream.write_all(b"again").unwrap();
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"again");
}

#[test]
fn a_killed_vmm_fails_every_socket_and_a_new_one_serves() {
    let setup = default_setup();
    let stream = setup.sockets.connect(host::ECHO).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| (&stream).read(&mut [0; 10]));
        setup.sockets.kill();
        assert_eq!(reader.join().unwrap().unwrap(), 0, "a sleeping reader wakes up");
    });
    assert!(stream.was_reset());
    assert!(setup.sockets.connect(host::ECHO).is_err());
    let guest =
        EmbeddedGuest::boot(&setup.device.socket(), Profile::qemu(), DriverOptions::default()).unwrap();
    let sockets = Sockets::start(guest, SocketOptions::default()).unwrap();
    // The services still hold the old connection with the same ports; another service has none.
    sockets.connect(host::SINK).unwrap().write_all(b"hello").unwrap();
    wait_until("it arrives", || {
        setup.seen.lock().unwrap().received.contains_key(&host::SINK)
    });
}

#[test]
fn violations_of_the_device_show_in_the_statistics() {
    let setup = default_setup();
    let stream = setup.sockets.connect(host::SINK).unwrap();
    let header = Header {
        buf_alloc: 100_000,
        ..from_host(Op::Rw, host::SINK, stream.local_port())
    };
    setup.device.inject(header, &vec![0; 256 * 1024 + 1]);
    wait_until("the overrun is noticed", || {
        setup.sockets.stats().violations.count(Violation::CreditExceeded) == 1
    });
    assert_eq!(setup.sockets.stats().violations.total(), 1);
}
