//! `vsock-sidecar state`: what a running sidecar has negotiated and what flows, as tables for people.
//!
//! A client of `/state` and nothing else: it sees what anybody sees who can reach the admin server, and it runs as well
//! against another container's sidecar as against the one beside it.
//!
//! ```text
//!  --admin ──▶ address ──▶ client ──▶ document ──▶ guest, iotlb, messages ──▶ layout ──▶ text
//!              where        GET        values by    what is said of a guest    wrapped,
//!                           /state     path         in which order             aligned, coloured
//! ```
//!
//! 1. What the sidecar sends is data of strangers: a VMM's program name, a peer's path, a message's text. Every string is
//!    escaped ([`escaped`]) on its way out of the document, so no code behind it has to think of it.
//! 2. Client and sidecar may be of different versions. A key that is missing costs its line or its cell, never the command;
//!    only a document without `guests` is refused.
//! 3. Nothing is shown as known that is not: `–` stands for what the sidecar cannot tell yet, `·` for no.

mod address;
mod client;
mod document;
mod guest;
mod iotlb;
mod layout;
mod messages;

use std::io;

use serde_json::Value;

pub use self::address::{Address, BadAddress};
pub use self::client::{Answer, Bounds, ask};
use self::document::{list, text};
use self::layout::Page;
use crate::terminal::escaped;

/// What to ask for, and how to show it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// The sidecar's admin address.
    pub admin: Address,
    /// The document itself, for programs.
    pub json: bool,
    /// Only the guest of this name.
    pub guest: Option<String>,
    /// How tables look.
    pub look: Look,
}

/// How tables look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Look {
    /// Columns of the terminal. `None`: as many as it takes, for what is no terminal.
    pub width: Option<usize>,
    /// Whether there is colour.
    pub colour: bool,
    /// Whether the flight recorder is shown.
    pub messages: bool,
}

/// Why there is nothing to show. One line each, with the address and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection.
    #[error("cannot reach {address}: {source}; {}", hint(source))]
    Unreachable {
        /// Where.
        address: Address,
        /// The system's words.
        source: io::Error,
    },
    /// Connected, and no answer in time.
    #[error(
        "{address} took the connection and has not answered {route} within {seconds} s; is it the admin address of a \
         vsock-sidecar?"
    )]
    Silent {
        /// Who.
        address: Address,
        /// What was asked for.
        route: &'static str,
        /// Patience.
        seconds: f64,
    },
    /// An answer that is no HTTP, or breaks off.
    #[error(
        "{address} does not answer as an HTTP server: {problem}; is it the admin address of a vsock-sidecar?"
    )]
    NotHttp {
        /// Who.
        address: Address,
        /// What is wrong.
        problem: String,
    },
    /// An HTTP status other than success.
    #[error("{address} answered {route} with HTTP status {status} ({said}); {}", status_hint(*status))]
    Refused {
        /// Who.
        address: Address,
        /// What was asked for.
        route: &'static str,
        /// The status.
        status: u16,
        /// The first line of the body.
        said: String,
    },
    /// A document that is longer than any sidecar's.
    #[error("{address} answered with more than {bytes} bytes; is it the admin address of a vsock-sidecar?")]
    TooLong {
        /// Who.
        address: Address,
        /// The bound.
        bytes: usize,
    },
    /// A document that is no sidecar's state.
    #[error(
        "the answer of {address} is no sidecar's state: {problem}; is it the admin address of a vsock-sidecar?"
    )]
    NotState {
        /// Who.
        address: Address,
        /// What is wrong.
        problem: String,
    },
    /// The sidecar has no guest of that name.
    #[error("no guest `{}` in the sidecar at {address}; it has {known}", escaped(name))]
    NoGuest {
        /// Who.
        address: Address,
        /// The name.
        name: String,
        /// Those that there are.
        known: String,
    },
    /// The client itself could not start.
    #[error("cannot set up a client: {0}")]
    Runtime(#[source] io::Error),
}

impl Error {
    /// Whether the arguments were wrong, and not the world.
    pub fn is_usage(&self) -> bool {
        matches!(self, Error::NoGuest { .. })
    }
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => {
            "connecting to a unix socket takes write permission: use the sidecar's user or group"
        }
        io::ErrorKind::NotFound => {
            "is the sidecar running, and is this path in its admin.listen? Choose with --admin or VSOCK_SIDECAR_ADMIN"
        }
        _ => {
            "is the sidecar running, and is this address in its admin.listen? Choose with --admin or VSOCK_SIDECAR_ADMIN"
        }
    }
}

fn status_hint(status: u16) -> &'static str {
    match status {
        500..=599 => "its log may say more; try again",
        _ => "is it the admin address of a vsock-sidecar?",
    }
}

/// Asks the sidecar and answers what to print. Blocks, for some seconds at most.
pub fn show(options: &Options) -> Result<String, Error> {
    let body = client::fetch(&options.admin, Bounds::DEFAULT)?;
    let mut document = parse(&options.admin, &body)?;
    if let Some(name) = &options.guest {
        keep_guest(&options.admin, &mut document, name)?;
    }
    Ok(match (options.json, &options.guest) {
        (true, None) => json_for_terminals(&body),
        (true, Some(_)) => json_for_terminals(&format!("{document:#}")),
        (false, _) => render(&document, &options.admin.to_string(), options.look),
    })
}

/// A document of `/state` as tables; `source` is where it came from.
pub fn render(document: &Value, source: &str, look: Look) -> String {
    let mut page = Page::new(look.width, look.colour);
    guest::sidecar(&mut page, document, source);
    let now = document::float(document, "/now");
    for guest in list(document, "/guests") {
        page.blank();
        guest::show(&mut page, guest, now, look.messages);
    }
    page.finish()
}

fn parse(address: &Address, body: &str) -> Result<Value, Error> {
    let not_state = |problem: String| Error::NotState {
        address: address.clone(),
        problem,
    };
    let document: Value =
        serde_json::from_str(body).map_err(|error| not_state(format!("it is no JSON ({error})")))?;
    match document.get("guests") {
        Some(Value::Array(_)) => Ok(document),
        _ => Err(not_state("it has no list of guests".to_owned())),
    }
}

fn keep_guest(address: &Address, document: &mut Value, name: &str) -> Result<(), Error> {
    let Some(guests) = document.get_mut("guests").and_then(Value::as_array_mut) else {
        return Ok(());
    };
    let is_it = |guest: &Value| guest.get("name").and_then(Value::as_str) == Some(name);
    if !guests.iter().any(is_it) {
        let known: Vec<String> = guests.iter().filter_map(|guest| text(guest, "/name")).collect();
        return Err(Error::NoGuest {
            address: address.clone(),
            name: name.to_owned(),
            known: match known.is_empty() {
                true => "none".to_owned(),
                false => known.join(", "),
            },
        });
    }
    guests.retain(is_it);
    Ok(())
}

/// The document as it came. JSON lets C1 controls, DEL and marks that turn the reading direction stand in strings as they
/// are; those are written as `\u` escapes, which every JSON reader takes for the same. ASCII controls cannot stand in
/// valid JSON but between values, where only newlines, tabs and returns are legal.
fn json_for_terminals(json: &str) -> String {
    let mut clean = String::with_capacity(json.len() + 1);
    for c in json.trim_end().chars() {
        let shown = !c.is_ascii() && c.escape_debug().len() == 1 || c.is_ascii() && c != '\x7f';
        if shown {
            clean.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                clean.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    clean.push('\n');
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_stays_the_same_document_and_loses_its_teeth() {
        let json = "{\n  \"a\": \"\u{9b}31m \u{202e} \u{7f} é 東 \u{e0001} \\u001b\",\n  \"b\": 1.10\n}\n\n";
        let clean = json_for_terminals(json);
        assert_eq!(
            clean,
            "{\n  \"a\": \"\\u009b31m \\u202e \\u007f é 東 \\udb40\\udc01 \\u001b\",\n  \"b\": 1.10\n}\n"
        );
        let (before, after): (Value, Value) = (
            serde_json::from_str(json).unwrap(),
            serde_json::from_str(&clean).unwrap(),
        );
        assert_eq!(before, after);
    }

    #[test]
    fn a_document_is_known_by_its_guests() {
        let address: Address = Address::DEFAULT.parse().unwrap();
        assert!(parse(&address, "{\"guests\": []}").is_ok());
        for (body, word) in [
            ("", "no JSON"),
            ("<html>", "no JSON"),
            ("{}", "no list of guests"),
            ("[]", "no list of guests"),
            ("{\"guests\": {}}", "no list of guests"),
        ] {
            let error = parse(&address, body).unwrap_err().to_string();
            assert!(
                error.contains(word) && error.contains(Address::DEFAULT),
                "{error}"
            );
        }
    }
}
