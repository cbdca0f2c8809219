//! Unix services of whole messages.

use super::*;
use crate::host::Packet;

/// A service of this type of unix socket, which listens if it can.
fn service_of_type(path: &Path, socket_type: socket2::Type) -> Socket {
    let socket = Socket::new(socket2::Domain::UNIX, socket_type, None).unwrap();
    socket.bind(&socket2::SockAddr::unix(path).unwrap()).unwrap();
    if socket_type != socket2::Type::DGRAM {
        socket.listen(8).unwrap();
    }
    socket
}

fn dial_unix(dials: &Dials, path: &Path, socket_type: SocketType, greeting: &[u8]) -> DialResult {
    let request = DialRequest {
        target: &unix(path),
        socket_type,
        first_port: 100,
        guest_port: 100,
        cid: 3,
        greeting,
        timeout: LONG,
    };
    let (_task, told) = start(&dials.dialer, request, None);
    told.recv_timeout(LONG).unwrap().0
}

#[test]
fn a_service_of_messages_gets_a_greeting_of_its_own_and_then_messages() {
    let dials = Dials::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("service.sock");
    let service = service_of_type(&path, socket2::Type::SEQPACKET);
    for greeting in [GREETING, b""] {
        let stream = dial_unix(&dials, &path, SocketType::Seqpacket, greeting).unwrap();
        assert!(stream.is_packet());
        assert_eq!(stream.peer(), path.display().to_string());
        stream.send_packet(&[]).unwrap();
        stream
            .send_packet(&[io::IoSlice::new(b"pay"), io::IoSlice::new(b"load")])
            .unwrap();
        drop(stream);
        let served = HostStream::new(service.accept().unwrap().0).unwrap();
        let mut messages = Vec::new();
        let mut message = Vec::new();
        while let Packet::Message = served.receive_packet(&mut message, 1024).unwrap() {
            messages.push(message.clone());
        }
        let mut expected = vec![b"".to_vec(), b"payload".to_vec()];
        if !greeting.is_empty() {
            expected.insert(0, greeting.to_vec());
        }
        assert_eq!(messages, expected);
    }
}

#[test]
fn a_service_of_another_type_is_refused_with_both_types() {
    let dials = Dials::new();
    let dir = tempfile::tempdir().unwrap();
    use socket2::Type;
    for (ours, theirs, wanted, found) in [
        (
            SocketType::Seqpacket,
            Type::STREAM,
            "SOCK_SEQPACKET",
            "SOCK_STREAM",
        ),
        (SocketType::Seqpacket, Type::DGRAM, "SOCK_SEQPACKET", "SOCK_DGRAM"),
        (
            SocketType::Stream,
            Type::SEQPACKET,
            "SOCK_STREAM",
            "SOCK_SEQPACKET",
        ),
        (SocketType::Stream, Type::DGRAM, "SOCK_STREAM", "SOCK_DGRAM"),
    ] {
        let path = dir.path().join(format!("{wanted}-{found}"));
        let _service = service_of_type(&path, theirs);
        let error = dial_unix(&dials, &path, ours, b"").unwrap_err();
        assert!(matches!(error, DialError::WrongType { .. }), "{error}");
        let error = error.to_string();
        let told = format!(
            "{} is a {found} socket and the guest's connection is {wanted}:",
            unix_label(&path)
        );
        assert!(error.starts_with(&told), "{error}");
    }
}

/// A full backlog is waited for with the type that was asked for.
#[test]
fn a_packet_service_with_a_full_backlog_is_reached_when_there_is_room() {
    let dials = Dials::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("service.sock");
    let service = service_of_type(&path, socket2::Type::SEQPACKET);
    let mut waiting = Vec::new();
    while let Ok(client) = connect::connect_unix(&path, SocketType::Seqpacket) {
        waiting.push(client);
    }
    let accepts = std::thread::spawn(move || {
        // Every place but the last is one of those that wait already.
        let all: Vec<_> = (0..=waiting.len()).map(|_| service.accept().unwrap()).collect();
        all.len()
    });
    let stream = dial_unix(&dials, &path, SocketType::Seqpacket, b"").unwrap();
    assert!(stream.is_packet());
    accepts.join().unwrap();
}
