//! The findings of one guest: raised once a session and code, told in the log once.

use std::collections::HashSet;

use tracing::{debug, info, warn};

use super::unix_seconds;
use crate::vhost_user::{AccessPlatform, Finding, FindingCode, Severity};

/// Different findings (code and particulars) that the log is told in the life of the process; later ones are logged at
/// debug. Particulars hold addresses and bits that a VMM chooses.
const MAX_TOLD: usize = 64;
/// Longest text of particulars, in bytes.
const MAX_SEEN: usize = 400;

/// The findings of one guest, at most one a code.
#[derive(Default, Debug)]
pub(super) struct Board {
    findings: Vec<(FindingCode, Finding)>,
    told: HashSet<(FindingCode, String)>,
    /// Raised and not yet logged.
    untold: Vec<(Finding, bool)>,
}

impl Board {
    /// Something was found.
    pub(super) fn raise(
        &mut self,
        code: FindingCode,
        mut seen: String,
        session: u64,
        policy: AccessPlatform,
    ) {
        if let Some(end) = (0..=MAX_SEEN).rev().find(|end| seen.is_char_boundary(*end)) {
            seen.truncate(end);
        }
        let known = self.findings.iter_mut().find(|(known, _)| *known == code);
        if let Some((_, finding)) = &known
            && finding.active
            && finding.session == session
            && finding.seen == seen
        {
            return;
        }
        let since = match &known {
            Some((_, finding)) if finding.session == session => finding.since,
            _ => unix_seconds().unwrap_or(0),
        };
        let finding = Finding {
            code: code.code(),
            severity: code.severity(policy),
            seen,
            meaning: code.meaning(),
            remedy: code.remedy(),
            since,
            session,
            active: true,
        };
        let key = (code, finding.seen.clone());
        if !self.told.contains(&key) {
            let is_room = self.told.len() < MAX_TOLD;
            if is_room {
                self.told.insert(key);
            }
            self.untold.push((finding.clone(), is_room));
        }
        match known {
            Some((_, known)) => *known = finding,
            None => self.findings.push((code, finding)),
        }
    }

    /// It does not hold any more.
    pub(super) fn pass(&mut self, code: FindingCode) {
        if let Some((_, finding)) = self.findings.iter_mut().find(|(known, _)| *known == code) {
            finding.active = false;
        }
    }

    /// Whether it holds now.
    pub(super) fn is_active(&self, code: FindingCode) -> bool {
        self.findings
            .iter()
            .any(|(known, finding)| *known == code && finding.active)
    }

    /// A session begins: what has passed goes, what ended the last session stays until this one has got further.
    pub(super) fn session_started(&mut self) {
        self.findings.retain(|(_, finding)| finding.active);
    }

    /// A ring runs: what ended earlier sessions is overcome.
    pub(super) fn overcome(&mut self, session: u64) {
        self.findings.retain(|(_, finding)| finding.session == session);
    }

    /// A session is over. `failed`: by an error.
    pub(super) fn session_ended(&mut self, session: u64, failed: bool) {
        for (_, finding) in &mut self.findings {
            // An error of an earlier session that this one did not live to overcome stays, however this one ended.
            finding.active &= finding.severity == Severity::Error && (failed || finding.session != session);
        }
    }

    /// The findings, active ones first, then by weight and code.
    pub(super) fn list(&self) -> Vec<Finding> {
        let mut findings: Vec<_> = self.findings.iter().collect();
        findings.sort_by_key(|(code, finding)| (!finding.active, finding.severity as u8, *code));
        findings.into_iter().map(|(_, finding)| finding.clone()).collect()
    }

    /// What the log has yet to be told; to be logged when no lock is held.
    pub(super) fn take_untold(&mut self) -> Vec<(Finding, bool)> {
        std::mem::take(&mut self.untold)
    }
}

/// Logs findings that were raised; `true` beside those that are new.
pub(super) fn tell(guest: &str, findings: Vec<(Finding, bool)>) {
    for (finding, is_new) in findings {
        let Finding {
            code, seen, remedy, ..
        } = finding;
        match finding.severity {
            _ if !is_new => debug!(guest, code, seen, "finding"),
            Severity::Info => info!(guest, code, seen, remedy, "finding"),
            Severity::Error | Severity::Warning => warn!(guest, code, seen, remedy, "finding"),
        }
    }
}
