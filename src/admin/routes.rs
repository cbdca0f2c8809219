//! From a request to a response. No sockets here.

use std::fmt::Write as _;
use std::time::Duration;

use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::{Method, Response, StatusCode};

use super::{Admin, Answer, Check};

/// Every path that is served, with what it is.
pub const ROUTES: [(&str, &str); 6] = [
    ("/", "this list"),
    ("/metrics", "metrics in Prometheus text format"),
    ("/livez", "liveness: every device thread answers"),
    ("/readyz", "readiness: started, nothing missing, not draining"),
    ("/startupz", "startup: configuration valid and every socket bound"),
    ("/state", "sessions, negotiation and connections as JSON"),
];

const TEXT: &str = "text/plain; charset=utf-8";
/// The version tells Prometheus which parser to use.
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
const JSON: &str = "application/json";

/// Answers one request. `patience` bounds the questions to other threads.
pub(super) async fn respond(
    admin: &Admin,
    method: &Method,
    path: &str,
    patience: Duration,
) -> Response<String> {
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
        "/metrics" => match admin.source.metrics() {
            Ok(families) => response(StatusCode::OK, METRICS, families),
            Err(reason) => text(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("no metrics: {reason}\n"),
            ),
        },
        "/livez" => {
            let checks = within(patience, admin.source.live()).await;
            probe(
                "livez",
                &checks.unwrap_or_else(|| vec![Check::failed("device threads", no_answer(patience))]),
            )
        }
        "/readyz" => probe("readyz", &readiness(admin)),
        "/startupz" => probe("startupz", &admin.startup.checks()),
        "/state" => match within(patience, admin.source.state()).await {
            // The alternate form is indented: it is read by people at least as often as by programs.
            Some(state) => response(StatusCode::OK, JSON, format!("{state:#}\n")),
            None => {
                let error = serde_json::json!({ "error": no_answer(patience) });
                response(StatusCode::SERVICE_UNAVAILABLE, JSON, format!("{error}\n"))
            }
        },
        _ => text(StatusCode::OK, index()),
    }
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
    body
}

async fn within<T>(patience: Duration, answer: Answer<'_, T>) -> Option<T> {
    tokio::time::timeout(patience, answer).await.ok()
}

fn no_answer(patience: Duration) -> String {
    format!("no answer within {} ms", patience.as_millis())
}

fn text(status: StatusCode, body: String) -> Response<String> {
    response(status, TEXT, body)
}

fn response(status: StatusCode, content_type: &'static str, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
