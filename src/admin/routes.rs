//! From a request to a response. No sockets here.

use std::fmt::Write as _;
use std::time::Duration;

use hyper::header::{
    ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap, HeaderValue,
    REFERRER_POLICY, VARY, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Method, Request, Response, StatusCode};

use super::actions;
use super::capture;
use super::local::Peer;
use super::pace::Pace;
use super::page::page;
use super::{Admin, Answer, Check, Chunks};

/// Every path that is served, with what it is.
pub const ROUTES: [(&str, &str); 7] = [
    ("/", "the status page for browsers, this list for others"),
    ("/metrics", "metrics in Prometheus text format"),
    ("/livez", "liveness: every device thread answers"),
    ("/readyz", "readiness: started, nothing missing, not draining"),
    ("/startupz", "startup: configuration valid and every socket bound"),
    ("/state", "sessions, negotiation and connections as JSON"),
    (
        capture::PATH,
        "?guest=NAME&seconds=N: packets as pcapng, from this machine only",
    ),
];

const TEXT: &str = "text/plain; charset=utf-8";
/// The version tells Prometheus which parser to use.
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
const JSON: &str = "application/json";
const HTML: &str = "text/html; charset=utf-8";

/// A response, by how its body is made.
pub(super) enum Reply {
    /// All of it is there.
    Whole(Response<String>),
    /// It is made while it is sent, which lasts so long.
    Streamed(Response<Box<dyn Chunks>>, Duration),
}

/// Answers one request. `patience` bounds the questions to other threads, `pace` what strangers may have us do.
pub(super) async fn respond<B>(
    admin: &Admin,
    request: &Request<B>,
    peer: Peer,
    patience: Duration,
    pace: &Pace,
) -> Reply {
    let reads = [Method::GET, Method::HEAD].contains(request.method());
    if request.uri().path() == capture::PATH && reads {
        return capture::respond(admin, request, peer, patience).await;
    }
    if actions::is_action(request.uri().path()) {
        return Reply::Whole(actions::respond(admin, request, peer).await);
    }
    Reply::Whole(answer(admin, request, patience, pace).await)
}

async fn answer<B>(admin: &Admin, request: &Request<B>, patience: Duration, pace: &Pace) -> Response<String> {
    let (method, path) = (request.method(), request.uri().path());
    if !ROUTES.iter().any(|(route, _)| *route == path) {
        return text(
            StatusCode::NOT_FOUND,
            format!("nothing here, but at:\n{}", index()),
        );
    }
    if method != Method::GET && method != Method::HEAD {
        let mut response = text(
            StatusCode::METHOD_NOT_ALLOWED,
            format!("{path} takes GET and HEAD\n"),
        );
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match path {
        "/metrics" => {
            let _turn = pace.turn().await;
            match admin.source.metrics() {
                Ok(families) => response(StatusCode::OK, METRICS, families),
                Err(reason) => text(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    format!("no metrics: {reason}\n"),
                ),
            }
        }
        "/livez" => {
            let checks = within(patience, admin.source.live()).await;
            // Not before: a thread that hangs would have everybody's turn.
            let _turn = pace.turn().await;
            probe(
                "livez",
                &checks.unwrap_or_else(|| vec![Check::failed("device threads", no_answer(patience))]),
            )
        }
        "/readyz" => probe("readyz", &readiness(admin)),
        "/startupz" => probe("startupz", &admin.startup.checks()),
        "/state" => {
            let state = within(patience, admin.source.state()).await;
            let _turn = pace.turn().await;
            match state {
                // The alternate form is indented: it is read by people at least as often as by programs.
                Some(state) => response(StatusCode::OK, JSON, format!("{state:#}\n")),
                None => {
                    let error = serde_json::json!({ "error": no_answer(patience) });
                    response(StatusCode::SERVICE_UNAVAILABLE, JSON, format!("{error}\n"))
                }
            }
        }
        _ => {
            let mut response = match wants_html(request.headers()) {
                true => status_page(),
                false => text(StatusCode::OK, index()),
            };
            response
                .headers_mut()
                .insert(VARY, HeaderValue::from_static("accept"));
            response
        }
    }
}

/// Browsers ask for `text/html` by name when somebody opens an address; curl and probes take anything (`*/*`), and get what
/// a terminal can show.
fn wants_html(headers: &HeaderMap) -> bool {
    let ranges = headers
        .get_all(ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok());
    ranges.flat_map(|value| value.split(',')).any(|range| {
        let mut parts = range.split(';').map(str::trim);
        let html = parts
            .next()
            .is_some_and(|kind| kind.eq_ignore_ascii_case("text/html"));
        // A weight of zero says "not this one" (RFC 9110, section 12.4.2).
        let refused = |parameter: &str| {
            let weight = parameter
                .strip_prefix("q=")
                .or_else(|| parameter.strip_prefix("Q="));
            weight.is_some_and(|weight| weight.trim_start_matches(['0', '.']).is_empty())
        };
        html && !parts.any(refused)
    })
}

fn status_page() -> Response<String> {
    let page = page();
    let mut response = response(StatusCode::OK, HTML, page.html.clone());
    let headers = response.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, page.policy.clone());
    // Names of guests are in the address of the page, behind its #.
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

/// What was started has to be started, nothing may be missing, and a sidecar that shuts down wants no new clients.
fn readiness(admin: &Admin) -> Vec<Check> {
    let mut checks = admin.startup.checks();
    checks.extend(admin.ready.checks());
    checks.extend(admin.source.ready());
    if admin.drain.is_draining() {
        checks.push(Check::failed("drain", "shutting down"));
    }
    checks
}

/// The form of Kubernetes' own verbose health endpoints.
fn probe(name: &str, checks: &[Check]) -> Response<String> {
    let mut body = String::new();
    for check in checks {
        let _ = match &check.problem {
            None => writeln!(body, "[+]{} ok", check.name),
            Some(problem) => writeln!(body, "[-]{} failed: {problem}", check.name),
        };
    }
    if checks.iter().all(|check| check.problem.is_none()) {
        text(StatusCode::OK, format!("{body}{name} check passed\n"))
    } else {
        text(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("{body}{name} check failed\n"),
        )
    }
}

fn index() -> String {
    let mut body = String::from("vsock-sidecar\n");
    for (route, what) in ROUTES {
        let _ = writeln!(body, "{route:<10} {what}");
    }
    for (action, what) in actions::ACTIONS {
        let _ = writeln!(body, "{action:<10} {what}");
    }
    body
}

async fn within<T>(patience: Duration, answer: Answer<'_, T>) -> Option<T> {
    tokio::time::timeout(patience, answer).await.ok()
}

pub(super) fn no_answer(patience: Duration) -> String {
    format!("no answer within {} ms", patience.as_millis())
}

pub(super) fn text(status: StatusCode, body: String) -> Response<String> {
    response(status, TEXT, body)
}

pub(super) fn response<T>(status: StatusCode, content_type: &'static str, body: T) -> Response<T> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_names_html_gets_the_page() {
        let firefox = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8";
        for (accept, html) in [
            (&["*/*"][..], false),
            (&[], false),
            (&[firefox], true),
            (&["application/json", "Text/HTML ; q=0.3"], true),
            (&["text/html;q=0"], false),
            (&["text/html; Q=0.000, */*"], false),
            (&["text/htmlx, text/plain"], false),
            (&["application/json;x=text/html"], false),
        ] {
            let mut headers = HeaderMap::new();
            for value in accept {
                headers.append(ACCEPT, HeaderValue::from_static(value));
            }
            assert_eq!(wants_html(&headers), html, "{accept:?}");
        }
    }
}
