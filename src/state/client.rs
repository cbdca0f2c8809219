//! One GET, bounded in time and size: of `/state`, or of a probe's path.

use std::io;
use std::pin::pin;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, HOST};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::Error;
use super::address::Address;
use crate::terminal::escaped;

/// How long a client waits, and how much it takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// Time to connect, name resolution included.
    pub connect: Duration,
    /// Time for the whole answer, from the beginning. The admin server answers within a second, 503 if it must.
    pub answer: Duration,
    /// Bytes of a document. 256 guests with a thousand connections each come close.
    pub bytes: usize,
}

/// What an admin server said, whatever its status.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The body. Text of a stranger; what is no UTF-8 is replaced.
    pub text: String,
}

impl Bounds {
    /// For people who wait at a terminal.
    pub const DEFAULT: Bounds = Bounds {
        connect: Duration::from_secs(3),
        answer: Duration::from_secs(10),
        bytes: 64 << 20,
    };
}

/// How much of an answer that is no document is repeated in an error.
const MAX_QUOTE: usize = 200;

/// The document's text. Blocks.
pub(super) fn fetch(address: &Address, bounds: Bounds) -> Result<String, Error> {
    let answer = ask(address, super::address::STATE, bounds)?;
    match answer.status {
        200..=299 => Ok(answer.text),
        _ => Err(answer.refused(address, super::address::STATE)),
    }
}

/// Asks for one of the admin server's paths. Blocks, and needs no other thread but for a name that has to be looked up.
///
/// # Errors
/// If there is no answer, or none that is HTTP. A status is no error.
pub fn ask(address: &Address, route: &'static str, bounds: Bounds) -> Result<Answer, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    let answer = runtime.block_on(async {
        let question = Question {
            address,
            route,
            bounds,
            begun: Instant::now(),
        };
        match address {
            Address::Tcp { host, port, .. } => {
                let stream = connect(address, bounds, TcpStream::connect((host.as_str(), *port))).await?;
                question.get(stream).await
            }
            Address::Unix(path) => {
                let stream = connect(address, bounds, UnixStream::connect(path)).await?;
                question.get(stream).await
            }
        }
    });
    // A name server that does not answer keeps a thread of the runtime; nobody waits for it.
    runtime.shutdown_background();
    answer
}

impl Answer {
    /// As an error, for who expected success.
    pub fn refused(&self, address: &Address, route: &'static str) -> Error {
        let line = self.text.trim().lines().next().unwrap_or_default();
        let line: String = line.chars().take(MAX_QUOTE).collect();
        Error::Refused {
            address: address.clone(),
            route,
            status: self.status,
            said: escaped(&line),
        }
    }
}

async fn connect<S>(
    address: &Address,
    bounds: Bounds,
    connecting: impl Future<Output = io::Result<S>>,
) -> Result<S, Error> {
    match timeout(bounds.connect, connecting).await {
        Ok(connected) => connected.map_err(|source| Error::Unreachable {
            address: address.clone(),
            source,
        }),
        Err(_) => Err(Error::Unreachable {
            address: address.clone(),
            source: io::ErrorKind::TimedOut.into(),
        }),
    }
}

struct Question<'a> {
    address: &'a Address,
    route: &'static str,
    bounds: Bounds,
    begun: Instant,
}

impl Question<'_> {
    async fn get(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> Result<Answer, Error> {
        let rest = self.bounds.answer.saturating_sub(self.begun.elapsed());
        match timeout(rest, self.exchange(stream)).await {
            Ok(answer) => answer,
            Err(_) => Err(Error::Silent {
                address: self.address.clone(),
                route: self.route,
                seconds: self.bounds.answer.as_secs_f64(),
            }),
        }
    }

    async fn exchange(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> Result<Answer, Error> {
        let not_http = |error: hyper::Error| Error::NotHttp {
            address: self.address.clone(),
            problem: escaped(&describe(&error)),
        };
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(not_http)?;
        let request = Request::get(self.address.path_of(self.route))
            .header(HOST, self.address.host())
            .header(ACCEPT, "application/json")
            .body(Empty::<Bytes>::new())
            .map_err(|error| Error::NotHttp {
                address: self.address.clone(),
                problem: error.to_string(),
            })?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(not_http)?;
            self.whole(response).await
        };
        let mut answer = pin!(answer);
        let mut connection = pin!(connection);
        // The connection moves the bytes; what is wrong with it is also told to the request.
        tokio::select! {
            biased;
            answered = &mut answer => answered,
            _ = &mut connection => answer.await,
        }
    }

    async fn whole(&self, response: Response<Incoming>) -> Result<Answer, Error> {
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), self.bounds.bytes)
            .collect()
            .await
            .map_err(|error| match error.downcast::<LengthLimitError>() {
                Ok(_) => Error::TooLong {
                    address: self.address.clone(),
                    bytes: self.bounds.bytes,
                },
                Err(error) => Error::NotHttp {
                    address: self.address.clone(),
                    problem: escaped(&describe(error.as_ref())),
                },
            })?
            .to_bytes();
        Ok(Answer {
            status,
            text: String::from_utf8_lossy(&body).into_owned(),
        })
    }
}

/// An error and its causes: hyper's own text is only the outermost.
fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    const SHORT: Bounds = Bounds {
        connect: Duration::from_secs(20),
        answer: Duration::from_millis(20),
        bytes: 10,
    };

    /// Someone who takes connections and does what `then` says; its address.
    fn somebody(then: impl FnOnce(UnixListener) + Send + 'static) -> (tempfile::TempDir, Address) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || then(listener));
        (dir, Address::Unix(path))
    }

    #[test]
    fn who_takes_the_connection_and_says_nothing_is_given_up() {
        let (_dir, address) = somebody(|listener| {
            let (mut stream, _) = listener.accept().unwrap();
            // Until the client has closed.
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let error = fetch(&address, SHORT).unwrap_err();
        assert!(matches!(error, Error::Silent { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains("within 0.02 s") && text.contains(&address.to_string()),
            "{text}"
        );
    }

    #[test]
    fn as_many_bytes_as_are_allowed_are_taken_and_not_one_more() {
        let long = Bounds {
            answer: Duration::from_secs(20),
            ..SHORT
        };
        for (body, taken) in [("0123456789", true), ("01234567890", false)] {
            let (_dir, address) = somebody(move |listener| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 1];
                // An answer that came before its request would be refused.
                stream.read_exact(&mut request).unwrap();
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).unwrap();
                // Until the client has closed.
                let _ = stream.read_to_end(&mut Vec::new());
            });
            match fetch(&address, long) {
                Ok(text) => assert!(taken && text == body, "{text}"),
                Err(error) => assert!(
                    !taken && matches!(error, Error::TooLong { bytes: 10, .. }),
                    "{error}"
                ),
            }
        }
    }
}
