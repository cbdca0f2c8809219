//! From a request to a response. No sockets here.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::body::{Body, Bytes};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::{Method, Request, Response, StatusCode};
use tracing::{debug, info, warn};

use super::body::{Budget, NoBody};
use super::review::{Subject, Verdict, review};
use super::{Limits, Settings};
use crate::metrics::WebhookRegistry;

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
/// The version tells Prometheus which parser to use.
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Between two lines of the log about what anybody can cause.
const RARELY: Duration = Duration::from_secs(60);

/// What all requests share.
pub(super) struct Desk {
    pub(super) settings: Settings,
    pub(super) metrics: WebhookRegistry,
    pub(super) limits: Limits,
    pub(super) bodies: Budget,
    /// Shutting down: still served, and no longer healthy.
    pub(super) draining: AtomicBool,
    pub(super) told_of_malformed: Rarely,
    pub(super) told_of_handshakes: Rarely,
}

/// Lets something be said once a minute.
#[derive(Default)]
pub(super) struct Rarely(Mutex<Option<Instant>>);

impl Rarely {
    /// Whether it may be said now.
    pub(super) fn now(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| last.elapsed() >= RARELY);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}

/// Which listener a request came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    /// That of the API server: TLS.
    Admission,
    /// That of Prometheus: plain.
    Metrics,
}

/// Answers one request.
pub(super) async fn respond<B>(desk: &Desk, side: Side, request: Request<B>) -> Response<String>
where
    B: Body<Data = Bytes> + Unpin,
{
    let (path, method) = (request.uri().path(), request.method());
    let reads = [Method::GET, Method::HEAD].contains(method);
    match (side, path) {
        (Side::Admission, "/mutate") if method == Method::POST => mutate(desk, request).await,
        (Side::Admission, "/mutate") => not_allowed("/mutate", "POST"),
        (_, "/healthz") if reads => match desk.draining.load(Ordering::Relaxed) {
            false => text(StatusCode::OK, "ok\n".to_owned()),
            true => text(StatusCode::SERVICE_UNAVAILABLE, "shutting down\n".to_owned()),
        },
        (Side::Metrics, "/metrics") if reads => match desk.metrics.encode() {
            Ok(families) => response(StatusCode::OK, METRICS, families),
            Err(error) => text(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("no metrics: {error}\n"),
            ),
        },
        (_, "/healthz") => not_allowed("/healthz", "GET, HEAD"),
        (Side::Metrics, "/metrics") => not_allowed("/metrics", "GET, HEAD"),
        (Side::Admission, _) => nothing_here("/mutate and /healthz"),
        (Side::Metrics, _) => nothing_here("/metrics and /healthz"),
    }
}

async fn mutate<B>(desk: &Desk, request: Request<B>) -> Response<String>
where
    B: Body<Data = Bytes> + Unpin,
{
    let content_type = request
        .headers()
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let essence = content_type
        .and_then(|value| value.split(';').next())
        .unwrap_or_default();
    if !essence.trim().eq_ignore_ascii_case(JSON) {
        return malformed(
            desk,
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("/mutate takes {JSON}"),
        );
    }
    let reviewed = desk
        .bodies
        .read(request.into_body(), &desk.limits, |body| {
            review(body, &desk.settings)
        })
        .await;
    let bound = desk.limits.body_bytes;
    match reviewed {
        Ok(Ok(reviewed)) => {
            tell(desk, &reviewed.verdict, &reviewed.subject);
            response(StatusCode::OK, JSON, reviewed.answer.to_string())
        }
        Ok(Err(bad)) => malformed(desk, StatusCode::BAD_REQUEST, bad.to_string()),
        Err(NoBody::TooLong) => malformed(
            desk,
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body has more than {bound} bytes, which is more than any review has"),
        ),
        Err(NoBody::Late(patience)) => malformed(
            desk,
            StatusCode::REQUEST_TIMEOUT,
            format!("the body was not there within {} s", patience.as_secs_f64()),
        ),
        Err(NoBody::Broken) => malformed(
            desk,
            StatusCode::BAD_REQUEST,
            "the body breaks off or is no HTTP".to_owned(),
        ),
        Err(NoBody::Overload) => {
            desk.metrics.reviewed("overload");
            text(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many bodies at once; try again\n".to_owned(),
            )
        }
    }
}

fn tell(desk: &Desk, verdict: &Verdict, subject: &Subject) {
    let Subject { namespace, name, uid } = subject;
    match verdict {
        Verdict::Injected => {
            desk.metrics.reviewed("injected");
            info!(namespace, pod = name, uid, "the sidecar was put into a pod");
        }
        Verdict::Refused(reason) => {
            desk.metrics.reviewed("refused");
            info!(namespace, pod = name, uid, reason, "a pod was refused");
        }
        Verdict::Unchanged => {
            desk.metrics.reviewed("unchanged");
            debug!(namespace, pod = name, uid, "a pod has the sidecar already");
        }
        Verdict::NotSelected => {
            desk.metrics.reviewed("not_selected");
            debug!(namespace, pod = name, uid, "a pod does not ask for the sidecar");
        }
    }
}

/// Anybody in the cluster can send such, so the log has it once a minute.
fn malformed(desk: &Desk, status: StatusCode, reason: String) -> Response<String> {
    desk.metrics.reviewed("malformed");
    if desk.told_of_malformed.now() {
        warn!(
            status = status.as_u16(),
            reason, "a request was no review that could be answered"
        );
    }
    text(status, format!("{reason}\n"))
}

fn nothing_here(what: &str) -> Response<String> {
    text(
        StatusCode::NOT_FOUND,
        format!("nothing here; this is vsock-sidecar webhook, with {what}\n"),
    )
}

fn not_allowed(path: &str, methods: &'static str) -> Response<String> {
    let mut response = text(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("{path} takes {methods}\n"),
    );
    response
        .headers_mut()
        .insert(ALLOW, HeaderValue::from_static(methods));
    response
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
