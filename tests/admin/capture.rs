//! `/capture`: a body that is made while it is sent, and what bounds it. What is in it is not the server's affair.

use std::sync::mpsc as std_mpsc;
use std::task::{Context, Poll};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::*;

/// The captures of the program behind the server.
#[derive(Default)]
pub struct Captures {
    /// What was asked for, and the test's end of each.
    begun: Mutex<Vec<(CaptureRequest, Feeder)>>,
    refuse: Mutex<Option<CaptureRefused>>,
}

impl Captures {
    pub fn begin(&self, request: CaptureRequest) -> Result<Box<dyn Chunks>, CaptureRefused> {
        if let Some(refused) = self.refuse.lock().unwrap().clone() {
            return Err(refused);
        }
        let (feed, fed) = unbounded_channel();
        let (alive, dropped) = std_mpsc::channel();
        self.begun
            .lock()
            .unwrap()
            .push((request, Feeder { feed, dropped }));
        Ok(Box::new(Fed { fed, _alive: alive }))
    }

    /// The test's end of the latest capture.
    fn latest(&self) -> (CaptureRequest, Feeder) {
        self.begun.lock().unwrap().pop().expect("a capture has begun")
    }
}

/// Makes a body. Dropping it ends the body.
struct Feeder {
    feed: UnboundedSender<Vec<u8>>,
    /// Hangs up when the body is dropped.
    dropped: std_mpsc::Receiver<()>,
}

impl Feeder {
    fn is_dropped(&self) -> bool {
        self.dropped.try_recv() == Err(std_mpsc::TryRecvError::Disconnected)
    }
}

struct Fed {
    fed: UnboundedReceiver<Vec<u8>>,
    _alive: std_mpsc::Sender<()>,
}

impl Chunks for Fed {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Vec<u8>>> {
        self.fed.poll_recv(cx)
    }
}

const ASK: &str = "GET /capture?guest=web&seconds=300 HTTP/1.1\r\nhost: localhost\r\n\r\n";

/// Asks for a capture; the head of its response.
fn begin<S: Read + Write>(client: &mut Client<S>, request: &str) -> String {
    client.stream.write_all(request.as_bytes()).unwrap();
    loop {
        if let Some(end) = client.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            return String::from_utf8(client.buffer.drain(..end + 4).collect())
                .unwrap()
                .to_lowercase();
        }
        assert_ne!(client.read().unwrap(), 0, "closed in a head");
    }
}

/// The next chunk of a body (RFC 9112, 7.1); empty at its end.
fn chunk<S: Read + Write>(client: &mut Client<S>) -> Vec<u8> {
    loop {
        if let Some(line) = client.buffer.windows(2).position(|window| window == b"\r\n") {
            let digits = std::str::from_utf8(&client.buffer[..line]).unwrap();
            let len = usize::from_str_radix(digits, 16).unwrap();
            if client.buffer.len() >= line + 2 + len + 2 {
                let chunk: Vec<u8> = client.buffer.drain(..line + 2 + len + 2).collect();
                return chunk[line + 2..line + 2 + len].to_vec();
            }
        }
        assert_ne!(client.read().unwrap(), 0, "closed in a body");
    }
}

#[test]
fn a_capture_lasts_longer_than_a_response_may_and_its_connection_goes_on() {
    let response = Duration::from_millis(300);
    let server = Server::start(Limits {
        response,
        ..Limits::default()
    });
    let mut client = server.tcp();
    let head = begin(&mut client, ASK);
    assert!(head.starts_with("http/1.1 200 "), "{head}");
    for field in [
        "content-type: application/x-pcapng",
        "content-disposition: attachment; filename=\"web.pcapng\"",
        "transfer-encoding: chunked",
        "cache-control: no-store",
    ] {
        assert!(head.contains(&format!("\r\n{field}\r\n")), "{head}");
    }
    let (request, feeder) = server.program.captures.latest();
    assert_eq!(
        request,
        CaptureRequest {
            guest: "web".to_owned(),
            duration: Duration::from_secs(300),
            snaplen: 256
        }
    );
    let begun = Instant::now();
    while begun.elapsed() < 4 * response {
        feeder.feed.send(b"block".to_vec()).unwrap();
        assert_eq!(chunk(&mut client), b"block", "what is fed comes out at once");
        thread::sleep(response / 10);
    }
    drop(feeder);
    assert_eq!(chunk(&mut client), b"");
    let reply = client.ask("GET /livez HTTP/1.1\r\nhost: x\r\n\r\n");
    assert_eq!(reply.status, 200);
}

/// What is captured has an end, and a client that takes nothing must not keep its place for longer.
#[test]
fn a_client_that_does_not_take_its_capture_is_closed_after_its_time() {
    let server = Server::start(Limits {
        response: Duration::from_millis(200),
        ..Limits::default()
    });
    let mut client = server.tcp();
    let ask = "GET /capture?guest=web&seconds=1 HTTP/1.1\r\nhost: localhost\r\n\r\n";
    begin(&mut client, ask);
    let (_, feeder) = server.program.captures.latest();
    for _ in 0..1000 {
        feeder.feed.send(vec![0; 64 * 1024]).unwrap();
    }
    eventually("the capture is dropped", || feeder.is_dropped());
    client.closed();
}

#[test]
fn a_capture_whose_maker_is_silent_ends_after_its_time() {
    let server = Server::start(Limits {
        response: Duration::from_millis(200),
        ..Limits::default()
    });
    let mut client = server.unix();
    begin(&mut client, &ASK.replace("300", "1"));
    let (_, feeder) = server.program.captures.latest();
    client.closed();
    // The socket is closed a moment before the rest of its connection goes.
    eventually("the capture is dropped", || feeder.is_dropped());
}

#[test]
fn a_client_that_leaves_ends_its_capture() {
    let server = Server::start(Limits::default());
    let (mut tcp, mut unix) = (server.tcp(), server.unix());
    begin(&mut tcp, ASK);
    let (_, of_tcp) = server.program.captures.latest();
    begin(&mut unix, ASK);
    let (_, of_unix) = server.program.captures.latest();
    drop((tcp, unix));
    for feeder in [of_tcp, of_unix] {
        eventually("the capture is dropped", || {
            // A write is how it is noticed: a client that ends its side of the connection may well be reading.
            let _ = feeder.feed.send(b"block".to_vec());
            feeder.is_dropped()
        });
    }
}

#[test]
fn the_head_of_a_capture_begins_none() {
    let server = Server::start(Limits::default());
    let mut client = server.tcp();
    let head = begin(&mut client, &ASK.replace("GET", "HEAD"));
    assert!(
        head.starts_with("http/1.1 200 ") && head.contains("x-pcapng"),
        "{head}"
    );
    assert!(server.program.captures.begun.lock().unwrap().is_empty());
    assert_eq!(client.ask("GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").status, 200);
}

#[test]
fn what_cannot_be_captured_is_refused_with_what_can() {
    let server = Server::start(Limits::default());
    let get = |query: &str| {
        server.tcp().ask(&format!(
            "GET /capture{query} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
        ))
    };
    for (query, said) in [
        ("", "guest is missing"),
        ("?guest=web&seconds=1000", "from 1 to 300"),
        ("?guest=web&snaplen=big", "from 0 to 65536"),
        ("?guest=web&port=80", "no parameter \"port\""),
    ] {
        let reply = get(query);
        assert_eq!(reply.status, 400, "{query}");
        assert!(reply.body.contains(said), "{}", reply.body);
        assert!(
            reply.body.contains("guest=NAME&seconds=1..300&snaplen=0..65536"),
            "{}",
            reply.body
        );
    }
    let refusals = [
        (
            CaptureRefused::NoSuchGuest {
                names: vec!["db".into(), "web".into()],
            },
            404,
            "db, web",
        ),
        (
            CaptureRefused::Busy {
                limit: "two are running".into(),
            },
            503,
            "two are running",
        ),
        (CaptureRefused::NoAnswer, 503, "no answer within"),
    ];
    for (refused, status, said) in refusals {
        *server.program.captures.refuse.lock().unwrap() = Some(refused);
        let reply = get("?guest=web");
        assert_eq!(reply.status, status);
        assert!(reply.body.contains(said), "{}", reply.body);
    }
    let named = "GET /capture?guest=web HTTP/1.1\r\nhost: evil.example\r\n\r\n";
    assert_eq!(server.tcp().ask(named).status, 403);
    assert_eq!(
        server.unix().ask(named).status,
        503,
        "a socket file has its own permissions"
    );
}
