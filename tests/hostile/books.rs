//! What the sidecar counts of faults, and the difference that a trick makes.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use crate::support::{LONG, Sidecar};

/// The families of faults and of ends: what is counted when something goes wrong.
const FAMILIES: &[(&str, &str)] = &[
    ("vsock_misbehavior_total", "misbehavior"),
    ("vsock_vring_errors_total", "vring_errors"),
    ("vsock_connections_refused_total", "refused"),
    ("vsock_connections_closed_total", "closed"),
    ("vsock_session_errors_total", "session_errors"),
    ("vsock_vhost_user_request_errors_total", "request_errors"),
];

/// Counters of one guest by short name and label values: `refused dial_refused closed`.
pub type Books = BTreeMap<String, i64>;

/// The books of one guest, as the process publishes them now.
pub fn of(sidecar: &Sidecar, guest: &str) -> Books {
    let mut books = Books::new();
    for line in sidecar.get("/metrics").lines() {
        let Some((name, short)) = FAMILIES
            .iter()
            .find(|(name, _)| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')))
        else {
            continue;
        };
        let (labels, value) = line[name.len() + 1..].rsplit_once("} ").unwrap();
        let mut key = (*short).to_owned();
        let mut of_guest = false;
        for label in labels.split(',') {
            let (name, value) = label.split_once('=').unwrap();
            let value = value.trim_matches('"');
            match name {
                "guest" => of_guest = value == guest,
                "direction" => {}
                _ => {
                    key.push(' ');
                    key.push_str(if value.is_empty() { "-" } else { value });
                }
            }
        }
        let value = value.parse::<f64>().unwrap() as i64;
        if of_guest && value != 0 {
            *books.entry(key).or_default() += value;
        }
    }
    books
}

/// What was written since `before`.
pub fn since(before: &Books, now: &Books) -> Books {
    let mut written = Books::new();
    for (key, value) in now {
        let grown = value - before.get(key).copied().unwrap_or(0);
        if grown != 0 {
            written.insert(key.clone(), grown);
        }
    }
    written
}

/// Whether exactly what was expected was written.
pub fn agree(written: &Books, expected: &[(&str, RangeInclusive<u32>)]) -> bool {
    let in_range = |(key, times): &(&str, RangeInclusive<u32>)| {
        let value = written.get(*key).copied().unwrap_or(0);
        u32::try_from(value).is_ok_and(|value| times.contains(&value))
    };
    expected.iter().all(in_range)
        && written
            .keys()
            .all(|key| expected.iter().any(|(name, _)| name == key))
}

/// Waits until what was written since `before` is what is expected; answers what was written in the end. Connections that end
/// with a session are left aside if it is `over`.
pub fn settle(
    sidecar: &Sidecar,
    guest: &str,
    before: &Books,
    expected: &[(&str, RangeInclusive<u32>)],
    over: bool,
) -> Books {
    let deadline = std::time::Instant::now() + LONG / 3;
    loop {
        let mut written = since(before, &of(sidecar, guest));
        if over {
            written.retain(|key, _| !key.starts_with("closed session_lost "));
        }
        if agree(&written, expected) || std::time::Instant::now() > deadline {
            return written;
        }
        std::thread::sleep(std::time::Duration::from_millis(3));
    }
}
