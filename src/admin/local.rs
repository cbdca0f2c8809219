//! Who is on this machine: the one on whose behalf captures, reloads and drains are.
//!
//! Over the unix socket: whoever may open its file. Over TCP: whoever is in the pod's network namespace, which is where `kubectl
//! port-forward` and `kubectl exec` come from; but not those who use somebody in there, a proxy or a browser.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use hyper::Request;
use hyper::header::{HOST, HeaderMap, HeaderValue, ORIGIN};

/// Where a browser says that the page which has it ask comes from (W3C, Fetch Metadata Request Headers).
const SEC_FETCH_SITE: &str = "sec-fetch-site";

/// Where a request comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Peer {
    /// Over the unix socket.
    Unix,
    /// Over TCP; `None` if it was gone before it could be asked.
    Tcp(Option<SocketAddr>),
}

/// Fields in which proxies say for whom they ask. Envoy's `x-forwarded-proto` is in all that Istio hands over as HTTP.
const HANDED_OVER: [&str; 5] = [
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-real-ip",
];

/// Whether a request comes from this machine, and from nobody else through it.
///
/// Of loopback only the two addresses count that `localhost` means: a mesh hands over what anybody sends to the pod and comes from
/// another one for it (Istio from 127.0.0.6, kubevirt/kubevirt a24ada60). Proxies that come from 127.0.0.1 name for whom they ask.
///
/// A browser on this machine may have been sent here by a page of elsewhere whose name now means 127.0.0.1, and that page could read
/// the answer: so over TCP the request must name an address, or `localhost`, in its target (which counts, RFC 9112, 3.2.2) as in its
/// `Host`. Nor must a page of elsewhere have it ask under the right name, though it could read nothing then.
pub(super) fn is_local<B>(peer: Peer, request: &Request<B>, what: &str) -> Result<(), String> {
    const HOW: &str =
        "ask from inside of the pod (kubectl exec, kubectl port-forward) or over the unix socket";
    let Peer::Tcp(address) = peer else { return Ok(()) };
    let headers = request.headers();
    // Behind [::] an IPv4 client has an address of its own form.
    let Some(ip) = address.map(|address| address.ip().to_canonical()) else {
        return Err(format!(
            "{what} for clients on loopback or the unix socket: {HOW}"
        ));
    };
    if ip != Ipv4Addr::LOCALHOST && ip != Ipv6Addr::LOCALHOST {
        return Err(format!(
            "{what} for clients on loopback (127.0.0.1, ::1) or the unix socket, and you are {ip}: {HOW}"
        ));
    }
    if let Some(field) = HANDED_OVER.iter().find(|field| headers.contains_key(**field)) {
        return Err(format!(
            "{what} for clients on this machine, and a proxy hands this request over ({field}): {HOW}"
        ));
    }
    if is_for_another_site(headers) {
        return Err(format!("{what} for no page of another site"));
    }
    let hosts = headers.get_all(HOST).iter().map(HeaderValue::to_str);
    let mut names = hosts.chain(request.uri().authority().map(|authority| Ok(authority.as_str())));
    match names.all(|name| name.is_ok_and(names_no_domain)) {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> Request<()> {
        let mut request = Request::new(());
        request.headers_mut().insert(HOST, name.parse().unwrap());
        request
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
        for local in ["127.0.0.1:5", "[::1]:5", "[::ffff:127.0.0.1]:5"] {
            assert_eq!(from(local), Ok(()), "{local}");
        }
        for remote in [
            "10.0.0.9:5",
            "[::ffff:10.0.0.9]:5",
            "[fe80::1]:5",
            "0.0.0.0:5",
            "[::]:5",
            // Istio's proxy, for anybody.
            "127.0.0.6:5",
            "[::ffff:127.0.0.6]:5",
        ] {
            let reason = from(remote).unwrap_err();
            assert!(
                reason.contains("loopback (127.0.0.1, ::1) or the unix socket"),
                "{reason}"
            );
        }
        assert!(from("10.0.0.9:5").unwrap_err().contains("you are 10.0.0.9"));
        assert!(is_local(Peer::Tcp(None), &Request::new(()), "captures are").is_err());
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
            let mut request = host("127.0.0.1:9464");
            let headers = request.headers_mut();
            site.map(|site| headers.insert("sec-fetch-site", HeaderValue::from_static(site)));
            origin.map(|origin| headers.insert("origin", HeaderValue::from_static(origin)));
            is_local(Peer::Tcp(Some(([127, 0, 0, 1], 5).into())), &request, "captures").is_ok()
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
}
