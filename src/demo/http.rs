//! As much HTTP/1.1 as the demo needs: one GET a connection, and the answer to one.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long a peer of the demo may take. All are in this process.
const PATIENCE: Duration = Duration::from_secs(10);

/// What an answer may have at most.
const MAX_ANSWER: u64 = 16 << 20;

/// The longest request line that is read.
const MAX_LINE: u64 = 8 << 10;

/// An answer.
#[derive(Debug)]
pub(super) struct Answer {
    /// The status line.
    pub(super) status: String,
    /// What follows the head.
    pub(super) body: String,
}

impl Answer {
    /// The first line of the body.
    pub(super) fn first_line(&self) -> String {
        self.body.lines().next().unwrap_or_default().to_owned()
    }
}

/// GET over a TCP connection.
pub(super) fn get_tcp(address: SocketAddr, path: &str) -> io::Result<Answer> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    get(stream, &address.to_string(), path)
}

/// GET over a unix socket.
pub(super) fn get_unix(socket: &Path, path: &str) -> io::Result<Answer> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    get(stream, "localhost", path)
}

/// GET over any stream, which ends with the answer.
pub(super) fn get(mut stream: impl Read + Write, host: &str, path: &str) -> io::Result<Answer> {
    stream.write_all(request(host, path).as_bytes())?;
    let mut bytes = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut bytes)?;
    parse(&bytes)
}

/// A request after whose answer the connection ends.
pub(super) fn request(host: &str, path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
}

/// An answer from all of its bytes.
pub(super) fn parse(bytes: &[u8]) -> io::Result<Answer> {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text
        .split_once("\r\n\r\n")
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the answer has no end of head"))?;
    Ok(Answer {
        status: head.lines().next().unwrap_or_default().to_owned(),
        body: body.to_owned(),
    })
}

/// Reads one request and answers it with a page of plain text, whatever was asked.
pub(super) fn serve(mut stream: impl Read + Write, page: &str) -> io::Result<()> {
    let mut reader = BufReader::new(&mut stream);
    loop {
        let mut line = String::new();
        if reader.by_ref().take(MAX_LINE).read_line(&mut line)? == 0 || line.trim_end().is_empty() {
            break;
        }
    }
    stream.write_all(response(page).as_bytes())?;
    stream.flush()
}

/// A page of plain text with its head.
pub(super) fn response(page: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{page}",
        page.len()
    )
}
