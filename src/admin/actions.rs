//! What may be asked of the sidecar: to read its configuration again, and to end.
//!
//! For those who are on this machine already, as captures are. And not for their browsers: a page of elsewhere may have a browser
//! send a POST to localhost, which needs nobody's leave as long as the page does not read the answer. Browsers name such a page in
//! `Origin`, and that of our own status page asks for nothing of this, so no request that has one is heard.

use std::fmt::Write as _;
use std::time::Duration;

use hyper::header::{ACCEPT, ALLOW, HeaderValue, ORIGIN};
use hyper::{Method, Request, Response, StatusCode};

use super::local::{Peer, is_local};
use super::routes::{response, text};
use super::{Admin, ReloadAnswer};

/// Every path that does something, with what it does. POST only.
pub const ACTIONS: [(&str, &str); 2] = [
    (
        RELOAD,
        "POST: read the configuration again, from this machine only",
    ),
    (DRAIN, "POST: drain and end, from this machine only"),
];

const RELOAD: &str = "/-/reload";
const DRAIN: &str = "/-/drain";

/// How long a reload may take: names of directories are looked up, sockets bound, each device thread asked.
const RELOAD_PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn is_action(path: &str) -> bool {
    ACTIONS.iter().any(|(action, _)| *action == path)
}

pub(super) async fn respond<B>(admin: &Admin, request: &Request<B>, peer: Peer) -> Response<String> {
    let path = request.uri().path();
    if request.method() != Method::POST {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, format!("{path} takes POST\n"));
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("POST"));
        return response;
    }
    if let Err(reason) = may_act(peer, request) {
        return text(StatusCode::FORBIDDEN, format!("{reason}\n"));
    }
    if path == DRAIN {
        admin.source.begin_drain();
        return text(StatusCode::ACCEPTED, "draining\n".to_owned());
    }
    let answer = match tokio::time::timeout(RELOAD_PATIENCE, admin.source.reload()).await {
        Ok(answer) => answer,
        // It may still come to something; the log will say.
        Err(_) => {
            return text(
                StatusCode::GATEWAY_TIMEOUT,
                format!("no outcome within {} s: see the log\n", RELOAD_PATIENCE.as_secs()),
            );
        }
    };
    let wants_json = request.headers().get_all(ACCEPT).iter().any(|accept| {
        accept
            .to_str()
            .is_ok_and(|accept| accept.contains("application/json"))
    });
    reloaded(&answer, wants_json)
}

fn may_act<B>(peer: Peer, request: &Request<B>) -> Result<(), String> {
    is_local(peer, request, "reload and drain are")?;
    match request.headers().contains_key(ORIGIN) {
        true => Err("reload and drain are not for pages in browsers".to_owned()),
        false => Ok(()),
    }
}

fn reloaded(answer: &ReloadAnswer, wants_json: bool) -> Response<String> {
    let (status, result, changes, error): (_, _, &[String], _) = match answer {
        ReloadAnswer::Applied { changes } => (StatusCode::OK, "applied", changes, None),
        ReloadAnswer::Unchanged => (StatusCode::OK, "unchanged", &[], None),
        ReloadAnswer::Refused(error) => (StatusCode::UNPROCESSABLE_ENTITY, "refused", &[], Some(error)),
        ReloadAnswer::Unavailable(why) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable", &[], Some(why)),
    };
    if wants_json {
        let document = serde_json::json!({ "result": result, "changes": changes, "error": error });
        return response(status, "application/json", format!("{document:#}\n"));
    }
    let mut body = format!("{result}\n");
    for line in changes.iter().chain(error) {
        let _ = writeln!(body, "{line}");
    }
    text(status, body)
}
