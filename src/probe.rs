//! `vsock-sidecar probe`: the admin server's probes for the kubelet's exec probes, in an image without a shell.
//!
//! Why not `httpGet`: under KubeVirt's masquerade whatever is sent to the pod's address goes to the guest, and a unix socket is out
//! of the kubelet's reach. An exec probe is a process of its own every few seconds, so this one starts nothing that it does not
//! need: no log, no configuration, no thread.

use std::time::Duration;

use crate::state::{self, Address, Bounds, ask};
use crate::terminal::escaped;

/// Which question of the kubelet's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Has everything been bound? The VMM's container starts after this.
    Startup,
    /// May clients come?
    Ready,
    /// Does every thread answer? If not, the container is restarted.
    Live,
}

impl Kind {
    /// The admin server's path.
    fn route(self) -> &'static str {
        match self {
            Kind::Startup => "/startupz",
            Kind::Ready => "/readyz",
            Kind::Live => "/livez",
        }
    }

    /// What is said of a sidecar that fails it.
    fn adjective(self) -> &'static str {
        match self {
            Kind::Startup => "started",
            Kind::Ready => "ready",
            Kind::Live => "alive",
        }
    }
}

/// Why a probe fails. One line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There was no answer.
    #[error("not {}: {source}", .kind.adjective())]
    NoAnswer {
        /// Which probe.
        kind: Kind,
        /// Why.
        source: state::Error,
    },
    /// The sidecar says no.
    #[error("not {}: {failed}", .kind.adjective())]
    Failed {
        /// Which probe.
        kind: Kind,
        /// The checks that failed, with what they miss.
        failed: String,
    },
}

/// Most bytes of an answer: a line for each of 256 guests, and room.
const MAX_ANSWER: usize = 256 * 1024;
/// How many failed checks are named.
const MAX_NAMED: usize = 8;

/// Asks the sidecar at `admin`, for `patience` at most. Blocks.
///
/// # Errors
/// If the answer is no, or there is none.
pub fn run(kind: Kind, admin: &Address, patience: Duration) -> Result<(), Error> {
    let bounds = Bounds {
        connect: patience,
        answer: patience,
        bytes: MAX_ANSWER,
    };
    let answer = ask(admin, kind.route(), bounds).map_err(|source| Error::NoAnswer { kind, source })?;
    if (200..300).contains(&answer.status) {
        return Ok(());
    }
    match failed_checks(&answer.text) {
        Some(failed) => Err(Error::Failed { kind, failed }),
        None => Err(Error::NoAnswer {
            kind,
            source: answer.refused(admin, kind.route()),
        }),
    }
}

/// The failed checks of a probe's answer, which has a line for each: `[-]guest web failed: …`.
fn failed_checks(body: &str) -> Option<String> {
    let mut failed = body
        .lines()
        .filter_map(|line| line.strip_prefix("[-]"))
        .map(|line| escaped(&line.replacen(" failed: ", ": ", 1)));
    let mut named: Vec<String> = failed.by_ref().take(MAX_NAMED).collect();
    if named.is_empty() {
        return None;
    }
    match failed.count() {
        0 => {}
        more => named.push(format!("and {more} more")),
    }
    Some(named.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_checks_are_named_and_passed_ones_are_not() {
        let body =
            "[+]admin ok\n[-]guest web failed: no VMM\n[-]drain failed: shutting down\nreadyz check failed\n";
        assert_eq!(
            failed_checks(body).unwrap(),
            "guest web: no VMM; drain: shutting down"
        );
        assert_eq!(failed_checks("nothing here\n"), None);
    }

    #[test]
    fn a_hundred_guests_make_one_line_that_can_be_read() {
        let body: String = (0..100)
            .map(|n| format!("[-]guest g{n} failed: \u{1b}[2J\n"))
            .collect();
        let failed = failed_checks(&body).unwrap();
        assert!(
            failed.ends_with("; and 92 more") && !failed.contains('\u{1b}'),
            "{failed}"
        );
        assert!(failed.len() < 300, "{failed}");
    }
}
