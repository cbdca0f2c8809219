//! `/capture`: who may have it, what may be asked for, and how a refusal is told.
//!
//! Payload can be secret, so it is only for those who are on this machine already: in the pod's network namespace, which is
//! where `kubectl port-forward` and `kubectl exec` come from, or with access to the unix socket's file.

use std::net::{IpAddr, SocketAddr};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::header::{CONTENT_DISPOSITION, HOST, HeaderMap, HeaderValue, ORIGIN};
use hyper::{Method, Request, Response, StatusCode};

use super::routes::{Reply, no_answer, response, text};
use super::{Admin, Answer};

/// The path.
pub(super) const PATH: &str = "/capture";
/// How it is asked for; every refusal of a query ends with this.
const USAGE: &str =
    "/capture?guest=NAME&seconds=1..300&snaplen=0..65536 (10 seconds and 256 bytes of payload by default)";
/// No registry has a name for pcapng; this is the one that desktops open Wireshark for.
const PCAPNG: &str = "application/x-pcapng";

/// Where a browser says that the page which has it ask comes from (W3C, Fetch Metadata Request Headers).
const SEC_FETCH_SITE: &str = "sec-fetch-site";

/// Longest capture.
const MAX_SECONDS: u32 = 300;
const DEFAULT_SECONDS: u32 = 10;
/// Largest payload of a packet that Linux sends.
const MAX_SNAPLEN: u32 = 65536;
/// Most protocols show what they are about in so many bytes.
const DEFAULT_SNAPLEN: u32 = 256;

/// A body that is made while it is sent.
pub trait Chunks: Send + 'static {
    /// The next piece, not empty; `None` at the end. A reader that is slow asks less often.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Vec<u8>>>;
}

/// What somebody wants to see of a guest's packets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CaptureRequest {
    /// The guest's name; nothing is known of it yet.
    pub guest: String,
    /// For how long, 1 to 300 seconds.
    pub duration: Duration,
    /// Most bytes of a packet's payload, up to 65536.
    pub snaplen: u32,
}

/// Why a capture cannot begin.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CaptureRefused {
    /// There is no guest of that name.
    NoSuchGuest {
        /// The names of those that there are.
        names: Vec<String>,
    },
    /// There are enough of them.
    Busy {
        /// How many there are, and of what.
        limit: String,
    },
    /// The guest's device thread does not answer.
    NoAnswer,
}

/// Where a request comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Peer {
    /// Over the unix socket.
    Unix,
    /// Over TCP; `None` if it was gone before it could be asked.
    Tcp(Option<SocketAddr>),
}

pub(super) async fn respond<B>(admin: &Admin, request: &Request<B>, peer: Peer, patience: Duration) -> Reply {
    let what = "captures show payload and are";
    if let Err(reason) = is_local(peer, request.headers(), what) {
        return Reply::Whole(text(StatusCode::FORBIDDEN, format!("{reason}\n")));
    }
    let wanted = match CaptureRequest::parse(request.uri().query().unwrap_or_default()) {
        Ok(wanted) => wanted,
        Err(reason) => {
            return Reply::Whole(text(
                StatusCode::BAD_REQUEST,
                format!("{reason}; ask for {USAGE}\n"),
            ));
        }
    };
    let lasts = wanted.duration;
    let disposition = HeaderValue::try_from(format!("attachment; filename=\"{}.pcapng\"", wanted.guest));
    let begun = if request.method() == Method::HEAD {
        // The head of what would come; nothing begins.
        Ok(Box::new(Nothing) as Box<dyn Chunks>)
    } else {
        let begun = tokio::time::timeout(patience, admin.source.capture(wanted)).await;
        begun.unwrap_or(Err(CaptureRefused::NoAnswer))
    };
    match begun {
        Ok(chunks) => {
            let mut response = response(StatusCode::OK, PCAPNG, chunks);
            // Names of guests are DNS labels, and others have been refused.
            if let Ok(disposition) = disposition {
                response.headers_mut().insert(CONTENT_DISPOSITION, disposition);
            }
            Reply::Streamed(response, lasts)
        }
        Err(refused) => Reply::Whole(refusal(refused, patience)),
    }
}

fn refusal(refused: CaptureRefused, patience: Duration) -> Response<String> {
    match refused {
        CaptureRefused::NoSuchGuest { names } => text(
            StatusCode::NOT_FOUND,
            format!("no guest of that name; there are: {}\n", names.join(", ")),
        ),
        CaptureRefused::Busy { limit } => text(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("{limit}: wait for one to end, or end one\n"),
        ),
        CaptureRefused::NoAnswer => text(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("the guest's device thread: {}\n", no_answer(patience)),
        ),
    }
}

/// Whether a request comes from this machine. A browser on it may have been sent here by a page of elsewhere whose name now
/// means 127.0.0.1, and that page could read the answer: so over TCP the request must name an address, or `localhost`. Nor must a
/// page of elsewhere have it ask under the right name, though it could read nothing then.
pub(super) fn is_local(peer: Peer, headers: &HeaderMap, what: &str) -> Result<(), String> {
    const HOW: &str =
        "ask from inside of the pod (kubectl exec, kubectl port-forward) or over the unix socket";
    let Peer::Tcp(address) = peer else { return Ok(()) };
    // Behind [::] an IPv4 client has an address of its own form.
    let Some(ip) = address.map(|address| address.ip().to_canonical()) else {
        return Err(format!(
            "{what} for clients on loopback or the unix socket: {HOW}"
        ));
    };
    if !ip.is_loopback() {
        return Err(format!(
            "{what} for clients on loopback or the unix socket, and you are {ip}: {HOW}"
        ));
    }
    if is_for_another_site(headers) {
        return Err("captures are for no page of another site".to_owned());
    }
    let Some(host) = headers.get(HOST) else {
        return Ok(());
    };
    match host.to_str().is_ok_and(names_no_domain) {
        true => Ok(()),
        false => Err(format!(
            "{what} for requests to localhost or an IP address, not to a host name"
        )),
    }
}

/// Whether a browser asks because of a page that is not ours. What is no browser sends neither field.
fn is_for_another_site(headers: &HeaderMap) -> bool {
    let site = headers.get(SEC_FETCH_SITE);
    // `none` is somebody who has typed the address.
    let elsewhere = site.is_some_and(|site| site != "same-origin" && site != "none");
    let ours = headers
        .get(HOST)
        .map(|host| [b"http://", host.as_bytes()].concat());
    let origin = headers.get(ORIGIN).map(HeaderValue::as_bytes);
    elsewhere || origin.is_some_and(|origin| ours.is_none_or(|ours| origin != ours))
}

/// Whether a `Host` field (RFC 9110, 7.2) has an address or `localhost`, with or without a port.
fn names_no_domain(host: &str) -> bool {
    let is_address = |text: &str| text.parse::<IpAddr>().is_ok() || text.eq_ignore_ascii_case("localhost");
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    // Clients of unix sockets that were forwarded send an empty one.
    name.is_empty() || is_address(name.trim_start_matches('[').trim_end_matches(']'))
}

impl CaptureRequest {
    /// Reads the query of an address. An error says what is wrong with it.
    fn parse(query: &str) -> Result<CaptureRequest, String> {
        let (mut guest, mut seconds, mut snaplen) = (None, None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let slot = match key {
                "guest" => &mut guest,
                "seconds" => &mut seconds,
                "snaplen" => &mut snaplen,
                _ => return Err(format!("there is no parameter {key:?}")),
            };
            if slot.replace(value).is_some() {
                return Err(format!("{key} is given twice"));
            }
        }
        let guest = guest.filter(|guest| !guest.is_empty());
        let guest = guest.ok_or("guest is missing: name the guest")?.to_owned();
        let seconds = number("seconds", seconds, 1, MAX_SECONDS, DEFAULT_SECONDS)?;
        let snaplen = number("snaplen", snaplen, 0, MAX_SNAPLEN, DEFAULT_SNAPLEN)?;
        Ok(CaptureRequest {
            guest,
            duration: Duration::from_secs(u64::from(seconds)),
            snaplen,
        })
    }
}

fn number(name: &str, given: Option<&str>, least: u32, most: u32, default: u32) -> Result<u32, String> {
    let Some(given) = given else { return Ok(default) };
    let number = given
        .parse()
        .ok()
        .filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| format!("{name} is {given:?} and must be a whole number from {least} to {most}"))
}

/// The body of an answer to HEAD.
struct Nothing;

impl Chunks for Nothing {
    fn poll_next(&mut self, _: &mut Context<'_>) -> Poll<Option<Vec<u8>>> {
        Poll::Ready(None)
    }
}

/// The answer of a source that has no guests.
pub(super) fn no_guests<'a>() -> Answer<'a, Result<Box<dyn Chunks>, CaptureRefused>> {
    Box::pin(async { Err(CaptureRefused::NoSuchGuest { names: Vec::new() }) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> HeaderMap {
        HeaderMap::from_iter([(HOST, name.parse().unwrap())])
    }

    /// What the sidecar listens on is mostly 0.0.0.0, for Prometheus and probes: whoever reaches the pod could read what its
    /// guest says.
    #[test]
    fn a_capture_is_for_loopback_and_the_unix_socket_only() {
        let from = |address: &str| {
            is_local(
                Peer::Tcp(Some(address.parse().unwrap())),
                &host("10.0.0.7:9464"),
                "captures are",
            )
        };
        for local in ["127.0.0.1:5", "127.0.0.6:5", "[::1]:5", "[::ffff:127.0.0.1]:5"] {
            assert_eq!(from(local), Ok(()), "{local}");
        }
        for remote in [
            "10.0.0.9:5",
            "[::ffff:10.0.0.9]:5",
            "[fe80::1]:5",
            "0.0.0.0:5",
            "[::]:5",
        ] {
            let reason = from(remote).unwrap_err();
            assert!(reason.contains("loopback or the unix socket"), "{reason}");
        }
        assert!(from("10.0.0.9:5").unwrap_err().contains("you are 10.0.0.9"));
        assert!(is_local(Peer::Tcp(None), &HeaderMap::new(), "captures are").is_err());
        assert_eq!(
            is_local(Peer::Unix, &host("anything.example"), "captures are"),
            Ok(())
        );
    }

    /// A name of a stranger's that leads to 127.0.0.1 makes a browser here ask in that stranger's name, and hand out the answer.
    #[test]
    fn a_browser_that_was_led_here_by_a_name_is_refused() {
        let to = |name: &str| {
            is_local(
                Peer::Tcp(Some(([127, 0, 0, 1], 5).into())),
                &host(name),
                "captures are",
            )
            .is_ok()
        };
        for good in [
            "localhost",
            "LocalHost:9464",
            "127.0.0.1:9464",
            "[::1]:9464",
            "[::1]",
            "10.1.2.3",
            "",
        ] {
            assert!(to(good), "{good}");
        }
        for bad in [
            "evil.example",
            "evil.example:9464",
            "127.0.0.1.evil.example",
            "localhost.evil.example:80",
        ] {
            assert!(!to(bad), "{bad}");
        }
    }

    /// It could not read the answer, but it could have all places for captures taken, and payload put into a folder of downloads.
    #[test]
    fn a_page_of_elsewhere_cannot_make_a_browser_here_begin_one() {
        let to = |site: Option<&'static str>, origin: Option<&'static str>| {
            let mut headers = host("127.0.0.1:9464");
            site.map(|site| headers.insert("sec-fetch-site", HeaderValue::from_static(site)));
            origin.map(|origin| headers.insert("origin", HeaderValue::from_static(origin)));
            is_local(Peer::Tcp(Some(([127, 0, 0, 1], 5).into())), &headers, "captures").is_ok()
        };
        // Somebody types the address; a link or script of the status page; an older browser, or curl.
        assert!(to(Some("none"), None) && to(Some("same-origin"), None) && to(None, None));
        assert!(to(Some("same-origin"), Some("http://127.0.0.1:9464")));
        for site in ["cross-site", "same-site", "", "anything"] {
            assert!(!to(Some(site), None), "{site}");
        }
        for origin in [
            "null",
            "https://evil.example",
            "http://127.0.0.1:8080",
            "http://localhost:9464",
        ] {
            assert!(!to(None, Some(origin)), "{origin}");
        }
    }

    #[test]
    fn a_query_has_defaults_and_bounds() {
        let parse = |query| CaptureRequest::parse(query);
        let wanted = |seconds, snaplen| {
            Ok(CaptureRequest {
                guest: "web".to_owned(),
                duration: Duration::from_secs(seconds),
                snaplen,
            })
        };
        assert_eq!(parse("guest=web"), wanted(10, 256));
        assert_eq!(parse("snaplen=0&guest=web&seconds=300&"), wanted(300, 0));
        assert_eq!(parse("guest=web&seconds=1&snaplen=65536"), wanted(1, 65536));
        for (query, said) in [
            ("", "guest is missing"),
            ("guest=", "guest is missing"),
            ("guest=web&guest=db", "guest is given twice"),
            ("guest=web&second=3", "no parameter \"second\""),
            (
                "guest=web&seconds=0",
                "seconds is \"0\" and must be a whole number from 1 to 300",
            ),
            ("guest=web&seconds=301", "from 1 to 300"),
            ("guest=web&seconds=", "from 1 to 300"),
            ("guest=web&seconds=1.5", "from 1 to 300"),
            ("guest=web&snaplen=-1", "from 0 to 65536"),
            ("guest=web&snaplen=99999999999999999999", "from 0 to 65536"),
        ] {
            let error = parse(query).unwrap_err();
            assert!(error.contains(said), "{query}: {error}");
        }
    }
}
