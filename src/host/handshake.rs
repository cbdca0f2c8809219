//! The line by which a client of a `protocol: connect` listener names its guest port: `CONNECT <port>\n`.
//!
//! Firecracker's convention (its docs/vsock.md, "Host-Initiated Connections"), spoken by Kata, systemd-ssh-proxy and
//! Cloud Hypervisor's users. As there, the word's case does not matter and white space separates; unlike there, a line
//! may come in any pieces, and what a client sends right behind it is not lost.

use std::io;
use std::os::fd::AsFd;

use rustix::io::retry_on_intr;
use rustix::net::RecvFlags;

/// Longest line in bytes, without its newline. The longest that has a meaning is `CONNECT 4294967294` and a `\r`.
pub const MAX_LINE: usize = 32;

/// Bytes taken from the socket with one call, hence nearly the longest preface. The rest stays in the socket, where the
/// device reads it without a copy.
const CHUNK: usize = 1024;

/// Why a client of an inbound listener was closed before the guest heard of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Rejection {
    /// Its address is in none of the ranges that the rule allows.
    #[error("the address is not one that the rule allows")]
    NotAllowed,
    /// The descriptors that connections may have are used up.
    #[error("no file descriptors are left for clients")]
    NoDescriptors,
    /// No newline within [`MAX_LINE`] bytes: it speaks something else.
    #[error("the first line is longer than {MAX_LINE} bytes, expected \"CONNECT <port>\"")]
    TooLong,
    /// A line, but not this one.
    #[error("the first line is not \"CONNECT <port>\"")]
    NotConnect,
    /// Not a decimal number from 1 to 4294967294.
    #[error("the port is not a number from 1 to 4294967294")]
    BadPort,
    /// The line did not end in time.
    #[error("no complete line in time")]
    TimedOut,
    /// The client closed its connection, or its writing half, before the end of the line.
    #[error("closed before the end of the line")]
    Closed,
    /// The socket failed; the kind of its error.
    #[error("the socket failed: {0}")]
    Failed(io::ErrorKind),
    /// Too many clients were at this stage, and this was the oldest of them.
    #[error("too many clients have not sent their line yet")]
    Crowded,
}

/// Whom a client wants, and what it sent for them already.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// The guest's port, 1 to 4294967294.
    pub port: u32,
    /// The bytes behind the line's newline that came with it.
    pub preface: Vec<u8>,
}

/// The part of the line that has come so far.
#[derive(Default, Debug)]
pub struct ConnectLine {
    bytes: [u8; MAX_LINE],
    len: usize,
}

impl ConnectLine {
    /// Reads from a non-blocking socket until the line is whole.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when more has to come: call again. Any other is the socket's failure.
    pub fn read_from(&mut self, socket: impl AsFd) -> io::Result<Result<Wanted, Rejection>> {
        let mut chunk = [0; CHUNK];
        loop {
            let (taken, _) =
                retry_on_intr(|| rustix::net::recv(&socket, &mut chunk[..], RecvFlags::empty()))?;
            // `taken` counts bytes in `chunk`; the fallback is never taken.
            let bytes = chunk.get(..taken).unwrap_or_default();
            if bytes.is_empty() {
                return Ok(Err(Rejection::Closed));
            }
            if let Some(end) = self.push(bytes) {
                return Ok(end);
            }
        }
    }

    /// Takes the next bytes; `None` while the line is not whole. Not to be called after an answer.
    pub fn push(&mut self, bytes: &[u8]) -> Option<Result<Wanted, Rejection>> {
        let newline = bytes.iter().position(|&byte| byte == b'\n');
        let (part, rest) = bytes.split_at(newline.unwrap_or(bytes.len()));
        let Some(room) = self.bytes.get_mut(self.len..self.len + part.len()) else {
            return Some(Err(Rejection::TooLong));
        };
        room.copy_from_slice(part);
        self.len += part.len();
        // What is left begins with the newline, if there is one.
        let (_, preface) = rest.split_first()?;
        let line = self.bytes.get(..self.len).unwrap_or_default();
        Some(parse(line).map(|port| Wanted {
            port,
            preface: preface.to_vec(),
        }))
    }
}

/// The port that a line without its newline names.
fn parse(line: &[u8]) -> Result<u32, Rejection> {
    // A `\r` before the newline is white space like any other.
    let mut words = line
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty());
    let (Some(word), Some(port), None) = (words.next(), words.next(), words.next()) else {
        return Err(Rejection::NotConnect);
    };
    if !word.eq_ignore_ascii_case(b"CONNECT") {
        return Err(Rejection::NotConnect);
    }
    // Digits alone: `u32::from_str` would take a plus sign.
    let digits = port.iter().all(u8::is_ascii_digit);
    let port = std::str::from_utf8(port)
        .ok()
        .filter(|_| digits)
        .and_then(|port| port.parse().ok());
    // 0 is no port and 0xffffffff is VMADDR_PORT_ANY.
    port.filter(|port| (1..u32::MAX).contains(port))
        .ok_or(Rejection::BadPort)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::*;

    fn all_at_once(bytes: &[u8]) -> Option<Result<Wanted, Rejection>> {
        ConnectLine::default().push(bytes)
    }

    #[test]
    fn lines_and_what_they_mean() {
        for (line, port) in [
            ("CONNECT 22\n", Ok(22)),
            ("connect 22\n", Ok(22)),
            ("Connect 1\n", Ok(1)),
            ("CONNECT 22\r\n", Ok(22)),
            (" CONNECT \t 22 \r\n", Ok(22)),
            ("CONNECT 0022\n", Ok(22)),
            ("CONNECT 4294967294\r\n", Ok(4_294_967_294)),
            ("CONNECT 4294967295\n", Err(Rejection::BadPort)),
            ("CONNECT 4294967296\n", Err(Rejection::BadPort)),
            ("CONNECT 18446744073709551617\n", Err(Rejection::BadPort)),
            ("CONNECT 0\n", Err(Rejection::BadPort)),
            ("CONNECT -1\n", Err(Rejection::BadPort)),
            ("CONNECT +1\n", Err(Rejection::BadPort)),
            ("CONNECT 0x16\n", Err(Rejection::BadPort)),
            ("CONNECT \u{0662}\n", Err(Rejection::BadPort)),
            ("CONNECT ssh\n", Err(Rejection::BadPort)),
            ("CONNECT 22 33\n", Err(Rejection::NotConnect)),
            ("CONNECT\n", Err(Rejection::NotConnect)),
            ("CONNECT22\n", Err(Rejection::NotConnect)),
            ("\n", Err(Rejection::NotConnect)),
            ("\r\n", Err(Rejection::NotConnect)),
            ("HELO there\n", Err(Rejection::NotConnect)),
            ("GET / HTTP/1.1\r\n", Err(Rejection::NotConnect)),
            (
                "SSH-2.0-OpenSSH_9.6p1 Ubuntu-3ubuntu13\r\n",
                Err(Rejection::TooLong),
            ),
        ] {
            assert_eq!(
                all_at_once(line.as_bytes()).unwrap().map(|wanted| wanted.port),
                port,
                "{line:?}"
            );
        }
        assert_eq!(all_at_once(b"\xff\xfe \xff\n"), Some(Err(Rejection::NotConnect)));
        assert_eq!(all_at_once(b"CONNECT \xff\n"), Some(Err(Rejection::BadPort)));
        assert_eq!(all_at_once(b"CONNECT 22"), None);
    }

    #[test]
    fn a_line_ends_within_its_limit_or_not_at_all() {
        let longest = format!("CONNECT{}22", " ".repeat(MAX_LINE - 9));
        assert_eq!(longest.len(), MAX_LINE);
        assert_eq!(all_at_once(longest.as_bytes()), None);
        assert!(all_at_once(format!("{longest}\n").as_bytes()).unwrap().is_ok());
        assert_eq!(
            all_at_once(format!("{longest} \n").as_bytes()),
            Some(Err(Rejection::TooLong))
        );
        // Without a newline it is over as soon as the limit is passed; nothing more is waited for.
        assert_eq!(
            all_at_once(format!("{longest}2").as_bytes()),
            Some(Err(Rejection::TooLong))
        );
        assert_eq!(all_at_once(&[b'x'; 5000]), Some(Err(Rejection::TooLong)));
    }

    #[test]
    fn it_is_read_from_a_socket_as_it_comes() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut line = ConnectLine::default();
        for piece in ["CON", "NECT", " ", "2"] {
            theirs.write_all(piece.as_bytes()).unwrap();
            assert_eq!(
                line.read_from(&ours).unwrap_err().kind(),
                io::ErrorKind::WouldBlock
            );
        }
        theirs.write_all(b"2\nhello").unwrap();
        let wanted = line.read_from(&ours).unwrap().unwrap();
        assert_eq!(
            wanted,
            Wanted {
                port: 22,
                preface: b"hello".to_vec()
            }
        );

        theirs.write_all(b"CONNECT 2").unwrap();
        drop(theirs);
        assert_eq!(
            ConnectLine::default().read_from(&ours).unwrap(),
            Err(Rejection::Closed)
        );
    }

    proptest! {
        /// However the bytes are cut, the same port comes out and no byte behind the line is lost. Pieces that end before
        /// the newline leave it unfinished, the piece with the newline ends it.
        #[test]
        fn any_pieces_make_the_same_line(
            port in 1..u32::MAX,
            end in prop_oneof![Just("\n"), Just("\r\n")],
            payload in prop::collection::vec(any::<u8>(), 0..100),
            mut cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..10),
        ) {
            let mut bytes = format!("CONNECT {port}{end}").into_bytes();
            let line = bytes.len();
            bytes.extend(&payload);
            let mut at: Vec<usize> = cuts.drain(..).map(|cut| cut.index(bytes.len() + 1)).collect();
            at.extend([0, bytes.len()]);
            at.sort_unstable();
            let mut parser = ConnectLine::default();
            let mut outcome = None;
            for pair in at.windows(2) {
                let piece = &bytes[pair[0]..pair[1]];
                match &mut outcome {
                    None => {
                        outcome = parser.push(piece);
                        prop_assert_eq!(outcome.is_some(), pair[1] >= line);
                    }
                    // What comes later is the guest's, from the socket.
                    Some(Ok(Wanted { preface, .. })) => preface.extend(piece),
                    Some(Err(rejection)) => panic!("{rejection}"),
                }
            }
            prop_assert_eq!(outcome, Some(Ok(Wanted { port, preface: payload })));
        }

        #[test]
        fn no_bytes_are_too_strange(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..6)) {
            let mut parser = ConnectLine::default();
            for piece in pieces {
                if parser.push(&piece).is_some() {
                    break;
                }
                prop_assert!(parser.len <= MAX_LINE);
            }
        }
    }
}
