//! Where a running sidecar is asked: an address of its `admin.listen`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::terminal::escaped;

/// The port of an `http://` address that names none (RFC 9110, 4.2.1).
const HTTP_PORT: u16 = 80;

/// The path of the document.
pub(super) const STATE: &str = "/state";

/// An address of an admin server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// HTTP over TCP.
    Tcp {
        /// Name or IP address, without brackets.
        host: String,
        /// TCP port.
        port: u16,
        /// Path of the document; more than `/state` behind a proxy such as the Kubernetes API server's.
        path: String,
    },
    /// HTTP over a unix socket.
    Unix(PathBuf),
}

impl Address {
    /// Where a sidecar listens that was configured as the documentation's examples are.
    pub const DEFAULT: &'static str = "http://127.0.0.1:9464";

    /// The path to ask for to reach one of the admin server's own.
    pub(super) fn path_of(&self, route: &str) -> String {
        match self {
            Address::Tcp { path, .. } => format!("{}{route}", path.strip_suffix(STATE).unwrap_or(path)),
            Address::Unix(_) => route.to_owned(),
        }
    }

    /// The value of the Host field. A unix socket has no host; any name does.
    pub(super) fn host(&self) -> String {
        match self {
            Address::Tcp { host, port, .. } => format!("{}:{port}", bracketed(host)),
            Address::Unix(_) => "localhost".to_owned(),
        }
    }
}

/// Text that is no address of an admin server: what is wrong, and what would be right.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadAddress(String);

impl FromStr for Address {
    type Err = BadAddress;

    /// Takes `http://host:port` with or without a path, and what `admin.listen` has: `tcp://host:port` and
    /// `unix:///path`. `host:port` alone is taken for HTTP.
    fn from_str(text: &str) -> Result<Address, BadAddress> {
        let bad = |what: &str| {
            Err(BadAddress(format!(
                "{what}; give http://HOST:PORT or unix:///PATH, as in the sidecar's admin.listen"
            )))
        };
        if text.chars().any(|c| c.is_control() || c == ' ') {
            return bad(&format!(
                "blanks and control characters belong to no address: {}",
                escaped(text)
            ));
        }
        if let Some(path) = text.strip_prefix("unix://") {
            return match path.starts_with('/') && path.len() > 1 {
                true => Ok(Address::Unix(PathBuf::from(path))),
                false => bad("the path of a unix socket is absolute"),
            };
        }
        if text.starts_with('/') {
            return bad(&format!("did you mean unix://{text}?"));
        }
        let (rest, is_url) = match text.split_once("://") {
            Some(("http", rest)) => (rest, true),
            Some(("tcp", rest)) => (rest, false),
            Some(("https", _)) => return bad("the admin server speaks no TLS"),
            Some((scheme, _)) => return bad(&format!("unknown scheme `{scheme}`")),
            None => (text, true),
        };
        let (authority, path) = match rest
            .find(['/', '?', '#'])
            .and_then(|at| rest.split_at_checked(at))
        {
            Some((authority, path)) => (authority, path),
            None => (rest, ""),
        };
        if path.contains(['?', '#']) || !(path.is_empty() || is_url) || !path.is_ascii() {
            return bad(&format!("nothing may follow the address: `{path}`"));
        }
        let (host, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((ip, port)) => (ip, port.strip_prefix(':').or(port.is_empty().then_some(""))),
            None => match authority.rsplit_once(':') {
                Some((host, _)) if host.contains(':') => return bad("an IPv6 address stands in brackets"),
                Some((host, port)) => (host, Some(port)),
                None => (authority, Some("")),
            },
        };
        let port = match port {
            // Only a URL has a port that goes without saying.
            Some("") if text.starts_with("http://") => HTTP_PORT,
            Some("") => return bad("the port is missing"),
            Some(port) => match port.parse::<u16>() {
                Ok(port) if port > 0 => port,
                _ => return bad(&format!("`{port}` is no TCP port")),
            },
            None => return bad(&format!("`{authority}` is no host and port")),
        };
        if host.is_empty() || host.contains(['[', ']', '@', '%', '\\']) || !host.is_ascii() {
            return bad(&format!("`{host}` is no host"));
        }
        let path = path.trim_end_matches('/');
        let path = path.strip_suffix(STATE).unwrap_or(path);
        Ok(Address::Tcp {
            host: host.to_owned(),
            port,
            path: format!("{path}{STATE}"),
        })
    }
}

fn bracketed(host: &str) -> String {
    match host.contains(':') {
        true => format!("[{host}]"),
        false => host.to_owned(),
    }
}

impl fmt::Display for Address {
    /// The form to give to `--admin`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { path, .. } => {
                let base = path.strip_suffix(STATE).unwrap_or(path);
                write!(f, "http://{}{base}", self.host())
            }
            Address::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn taken(text: &str) -> (String, String) {
        let address: Address = text.parse().unwrap();
        (address.to_string(), address.path_of(STATE))
    }

    #[test]
    fn every_form_of_an_address() {
        for (text, shown, path) in [
            (Address::DEFAULT, "http://127.0.0.1:9464", "/state"),
            ("127.0.0.1:9464", "http://127.0.0.1:9464", "/state"),
            ("tcp://0.0.0.0:9464", "http://0.0.0.0:9464", "/state"),
            ("http://web.shop.svc", "http://web.shop.svc:80", "/state"),
            ("http://[::1]:9464/", "http://[::1]:9464", "/state"),
            ("[::1]:9464", "http://[::1]:9464", "/state"),
            ("http://[::1]", "http://[::1]:80", "/state"),
            ("http://h:1/state", "http://h:1", "/state"),
            (
                "http://h:1/pods/a:9464/proxy/",
                "http://h:1/pods/a:9464/proxy",
                "/pods/a:9464/proxy/state",
            ),
            ("unix:///run/a.sock", "unix:///run/a.sock", "/state"),
        ] {
            assert_eq!(taken(text), (shown.to_owned(), path.to_owned()), "{text}");
            assert_eq!(
                taken(shown),
                (shown.to_owned(), path.to_owned()),
                "{shown} is taken back"
            );
        }
    }

    #[test]
    fn what_is_no_address_is_told_what_would_be() {
        for (text, word) in [
            ("", "port is missing"),
            ("localhost", "port is missing"),
            ("tcp://localhost", "port is missing"),
            ("127.0.0.1:", "port is missing"),
            (":9464", "no host"),
            ("http://a:0", "no TCP port"),
            ("http://a:70000", "no TCP port"),
            ("a:b", "no TCP port"),
            ("::1:9464", "brackets"),
            ("[::1]x", "no host and port"),
            ("https://a:1", "no TLS"),
            ("ftp://a:1", "unknown scheme `ftp`"),
            ("unix://run/a.sock", "absolute"),
            ("unix:///", "absolute"),
            ("/run/a.sock", "did you mean unix:///run/a.sock?"),
            ("tcp://a:1/state", "nothing may follow"),
            ("http://a:1/?x", "nothing may follow"),
            ("http://u@a:1", "no host"),
            ("http://a\r\nX: y:1", "control characters"),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(word), "{text:?}: {error}");
            assert!(error.contains("give http://HOST:PORT or unix:///PATH"), "{error}");
            assert!(!error.contains(['\r', '\n']), "{error:?}");
        }
    }
}
