//! `/capture`: who may have it, what may be asked for, and how a refusal is told.
//!
//! Payload can be secret, so it is only for those who are on this machine already: in the pod's network namespace, which is
//! where `kubectl port-forward` and `kubectl exec` come from, or with access to the unix socket's file ([`is_local`]).

use std::task::{Context, Poll};
use std::time::Duration;

use hyper::header::{CONTENT_DISPOSITION, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};

use super::local::{Peer, is_local};
use super::routes::{Reply, no_answer, response, text};
use super::{Admin, Answer};

/// The path.
pub(super) const PATH: &str = "/capture";
/// How it is asked for; every refusal of a query ends with this.
const USAGE: &str =
    "/capture?guest=NAME&seconds=1..300&snaplen=0..65536 (10 seconds and 256 bytes of payload by default)";
/// No registry has a name for pcapng; this is the one that desktops open Wireshark for.
const PCAPNG: &str = "application/x-pcapng";

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

pub(super) async fn respond<B>(admin: &Admin, request: &Request<B>, peer: Peer, patience: Duration) -> Reply {
    let what = "captures show payload and are";
    if let Err(reason) = is_local(peer, request, what) {
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
