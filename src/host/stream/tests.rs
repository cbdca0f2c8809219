use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;

use super::*;

fn tcp_pair() -> (HostStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    (HostStream::new(ours.into()).unwrap(), theirs)
}

fn unix_pair() -> (HostStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (HostStream::new(ours.into()).unwrap(), theirs)
}

#[test]
fn a_tcp_stream_is_non_blocking_without_delay_and_kept_alive() {
    let (stream, theirs) = tcp_pair();
    assert!(stream.is_tcp());
    assert_eq!(stream.peer(), theirs.local_addr().unwrap().to_string());
    assert!(stream.socket.nonblocking().unwrap());
    assert!(stream.socket.tcp_nodelay().unwrap());
    assert!(stream.socket.keepalive().unwrap());
    assert_eq!(stream.socket.tcp_keepalive_time().unwrap(), KEEPALIVE_IDLE);
    assert_eq!(
        stream.socket.tcp_keepalive_interval().unwrap(),
        KEEPALIVE_INTERVAL
    );
    assert_eq!(stream.socket.tcp_keepalive_retries().unwrap(), KEEPALIVE_PROBES);
    assert_eq!(
        stream.read(&mut [0; 8]).unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
}

#[test]
fn a_unix_stream_is_non_blocking_and_has_no_tcp_options() {
    let (stream, _theirs) = unix_pair();
    assert!(!stream.is_tcp());
    assert_eq!(stream.peer(), "unix socket without a name");
    assert_eq!(
        stream.read(&mut [0; 8]).unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
}

#[test]
fn bytes_go_both_ways_and_each_half_ends_alone() {
    for (stream, mut theirs) in [boxed(tcp_pair()), boxed(unix_pair())] {
        assert_eq!(
            stream
                .write(&[IoSlice::new(b"to "), IoSlice::new(b"peer")])
                .unwrap(),
            7
        );
        stream.shutdown_write().unwrap();
        let mut got = String::new();
        theirs.read_to_string(&mut got).unwrap();
        assert_eq!(got, "to peer");
        // Our half is over, theirs is not.
        theirs.write_all(b"back").unwrap();
        drop(theirs);
        let mut got = Vec::new();
        let mut buffer = [0; 3];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => got.extend_from_slice(&buffer[..n]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(got, b"back");
    }
}

#[test]
fn abort_resets_a_tcp_peer() {
    let (stream, mut theirs) = tcp_pair();
    stream.abort();
    let error = theirs.read(&mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn dropping_ends_a_tcp_stream_in_order() {
    let (stream, mut theirs) = tcp_pair();
    stream.write(&[IoSlice::new(b"bye")]).unwrap();
    drop(stream);
    let mut got = Vec::new();
    theirs.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"bye");
}

#[test]
fn abort_ends_a_unix_stream() {
    let (stream, mut theirs) = unix_pair();
    stream.abort();
    assert_eq!(theirs.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_peer_that_is_gone_is_an_error_and_shutting_it_down_is_not() {
    let (stream, theirs) = tcp_pair();
    HostStream::new(theirs.into()).unwrap().abort();
    let mut pollfd = [rustix::event::PollFd::new(&stream, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut pollfd, None).unwrap();
    let pending = stream.take_error().unwrap().map(|error| error.kind());
    assert_eq!(pending, Some(io::ErrorKind::ConnectionReset));
    assert_eq!(
        stream.write(&[IoSlice::new(b"x")]).unwrap_err().kind(),
        io::ErrorKind::BrokenPipe
    );
    stream.shutdown_write().unwrap();
    stream.shutdown_read().unwrap();
}

trait Peer: Read + Write {}
impl<T: Read + Write> Peer for T {}

fn boxed<T: Peer + 'static>((stream, peer): (HostStream, T)) -> (HostStream, Box<dyn Peer>) {
    (stream, Box::new(peer))
}

fn packet_pair() -> (HostStream, Socket) {
    let (ours, theirs) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    (HostStream::new(ours).unwrap(), theirs)
}

/// Every message that is there, and how it ended; one that was too long as its length.
fn receive_all(stream: &HostStream, most: usize) -> (Vec<Vec<u8>>, io::Result<()>) {
    let mut messages = Vec::new();
    let mut message = Vec::new();
    loop {
        match stream.receive_packet(&mut message, most) {
            Ok(Packet::Message) => messages.push(message.clone()),
            Ok(Packet::TooLong { len }) => messages.push(format!("too long: {len}").into_bytes()),
            Ok(Packet::End) => return (messages, Ok(())),
            Err(error) => return (messages, Err(error)),
        }
    }
}

#[test]
fn messages_keep_their_boundaries_the_empty_ones_too() {
    let (stream, theirs) = packet_pair();
    assert!(stream.is_packet() && !stream.is_tcp());
    assert_eq!(stream.transport(), Transport::Unix);
    for message in [&b""[..], b"x", b"", b"two words", b""] {
        assert_eq!(theirs.send(message).unwrap(), message.len());
    }
    let (messages, end) = receive_all(&stream, 16);
    assert_eq!(messages, [&b""[..], b"x", b"", b"two words", b""]);
    assert_eq!(end.unwrap_err().kind(), io::ErrorKind::WouldBlock);

    theirs.send(b"").unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    let (messages, end) = receive_all(&stream, 16);
    assert_eq!(
        messages,
        [b""],
        "an empty message and then the end are two things"
    );
    end.unwrap();
    assert_eq!(
        stream.receive_packet(&mut Vec::new(), 16).unwrap(),
        Packet::End,
        "the end stays"
    );

    // The other half lives on, and a message may be gathered from pieces.
    stream.send_packet(&[]).unwrap();
    stream
        .send_packet(&[IoSlice::new(b"to "), IoSlice::new(b""), IoSlice::new(b"peer")])
        .unwrap();
    stream.shutdown_write().unwrap();
    let theirs = HostStream::new(theirs).unwrap();
    let (messages, end) = receive_all(&theirs, 16);
    assert_eq!(messages, [&b""[..], b"to peer"]);
    end.unwrap();
}

#[test]
fn a_message_longer_than_asked_for_is_dropped_whole() {
    let (stream, theirs) = packet_pair();
    for message in [&b"12345"[..], b"123456", b"", b"next"] {
        theirs.send(message).unwrap();
    }
    let (messages, _) = receive_all(&stream, 5);
    assert_eq!(messages, [&b"12345"[..], b"too long: 6", b"", b"next"]);
}

/// They would cost us descriptors, and their control message must not be taken for the mark of a message.
#[test]
fn descriptors_that_a_peer_sends_are_closed() {
    let (stream, theirs) = packet_pair();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    for message in [&b"with a descriptor"[..], b""] {
        let fds = [writer.as_fd()];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
        rustix::net::sendmsg(
            &theirs,
            &[IoSlice::new(message)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .unwrap();
    }
    drop(writer);
    drop(theirs);
    let (messages, end) = receive_all(&stream, 64);
    assert_eq!(messages, [&b"with a descriptor"[..], b""]);
    end.unwrap();
    // The end of the pipe: nobody has its writing end any more.
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]).unwrap(), 0);
}

#[test]
fn the_longest_usual_message_fits_and_a_full_socket_takes_nothing_of_one() {
    let (stream, theirs) = packet_pair();
    let long: Vec<u8> = (0..USUAL_PACKET).map(|i| (i % 251) as u8).collect();
    let (front, back) = long.split_at(1000);
    let pieces = [IoSlice::new(front), IoSlice::new(back)];
    let mut sent = 0;
    while stream.send_packet(&pieces).is_ok() {
        sent += 1;
    }
    assert!(sent > 0);
    assert_eq!(
        stream.send_packet(&pieces).unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
    drop(stream);
    let theirs = HostStream::new(theirs).unwrap();
    let (messages, end) = receive_all(&theirs, USUAL_PACKET);
    assert_eq!(messages.len(), sent);
    assert!(messages.iter().all(|message| *message == long));
    end.unwrap();
}

#[test]
fn a_message_beyond_the_usual_gets_room_as_far_as_the_system_lets_it() {
    let wmem_max: usize = std::fs::read_to_string("/proc/sys/net/core/wmem_max")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let (stream, theirs) = packet_pair();
    // 32 bytes are the kernel's; the send buffer is twice what is allowed.
    let most = 2 * wmem_max.max(USUAL_PACKET / 2) - 32;
    let too_long = vec![1; 2 * most];
    let error = stream.send_packet(&[IoSlice::new(&too_long)]).unwrap_err();
    assert_eq!(Errno::from_io_error(&error), Some(Errno::MSGSIZE));
    let longer = vec![2; most.min(2 * USUAL_PACKET)];
    stream.send_packet(&[IoSlice::new(&longer)]).unwrap();
    drop(stream);
    let theirs = HostStream::new(theirs).unwrap();
    assert_eq!(receive_all(&theirs, longer.len()).0, [longer]);
}

/// A service answers and goes without having read all: the kernel tells of the reset before the answer.
#[test]
fn messages_sent_before_a_reset_are_received_and_then_the_reset() {
    let (stream, theirs) = packet_pair();
    stream.send_packet(&[IoSlice::new(b"never read")]).unwrap();
    theirs.send(b"an answer").unwrap();
    theirs.send(b"").unwrap();
    drop(theirs);
    let (messages, end) = receive_all(&stream, 16);
    assert_eq!(messages, [&b"an answer"[..], b""]);
    assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(
        stream.send_packet(&[]).unwrap_err().kind(),
        io::ErrorKind::BrokenPipe
    );
}
