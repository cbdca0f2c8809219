//! The difference of two configurations, in the words of the file, and when each part of it takes effect.
//!
//! Both are compared in the form in which the file says them with every default written out, so that no key can be forgotten:
//! what the comparison has not heard of takes effect at once, and its key is named.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde_json::Value;

use super::{Config, schema};

/// When a difference takes effect.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Effect {
    /// With the reload.
    Now,
    /// When the guest's next session begins: its VMM and its driver have been told otherwise.
    NextSession,
    /// When the process is started anew.
    Restart,
}

/// Something that two configurations have otherwise.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Difference {
    /// What, and how.
    pub what: String,
    /// When it takes effect.
    pub effect: Effect,
}

/// All that two configurations have otherwise.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Change {
    /// In the order of the file.
    pub differences: Vec<Difference>,
}

/// Keys that are read at start and never again.
const AT_START: &[&str] = &["admin", "log.format", "confinement"];
/// Keys of a guest that are read when it is added.
const OF_ENDPOINT: &[&str] = &["vhostUser.socket", "vhostUser.mode"];
/// Keys of a guest that a session keeps to its end.
const OF_SESSION: &[&str] = &["cid", "vhostUser.accessPlatform"];

impl Change {
    /// What is otherwise in `after`.
    pub fn between(before: &Config, after: &Config) -> Change {
        let mut change = Change::default();
        let (before, after) = (document(before), document(after));
        for (key, pair) in both(&before, &after) {
            if key != "guests" {
                change.keys("", key, pair);
            }
        }
        let of_name = |side: &Value| -> BTreeMap<String, Value> { by_name(side.get("guests")) };
        let (guests_before, guests_after) = (of_name(&before), of_name(&after));
        for name in guests_before.keys() {
            if !guests_after.contains_key(name) {
                change.add(format!("guest {name} removed"), Effect::Now);
            }
        }
        for (name, guest) in &guests_after {
            match guests_before.get(name) {
                None => change.add(format!("guest {name} added"), Effect::Now),
                Some(before) => change.guest(name, before, guest),
            }
        }
        change
    }

    /// Whether the two say the same.
    pub fn is_empty(&self) -> bool {
        self.differences.is_empty()
    }

    /// What takes effect then.
    pub fn of(&self, effect: Effect) -> impl Iterator<Item = &Difference> {
        self.differences
            .iter()
            .filter(move |difference| difference.effect == effect)
    }

    fn guest(&mut self, name: &str, before: &Value, after: &Value) {
        let whose = format!("guest {name}: ");
        for (key, pair) in both(before, after) {
            match key {
                "outbound" | "inbound" => self.rules(&whose, key, pair),
                _ => self.keys(&whose, key, pair),
            }
        }
    }

    fn rules(&mut self, whose: &str, side: &str, (before, after): (Option<&Value>, Option<&Value>)) {
        let (old, new) = (by_name(before), by_name(after));
        for name in old.keys().filter(|name| !new.contains_key(*name)) {
            self.add(format!("{whose}{side} rule {name} removed"), Effect::Now);
        }
        for (name, rule) in &new {
            match old.get(name) {
                None => self.add(format!("{whose}{side} rule {name} added"), Effect::Now),
                Some(before) if before != rule => {
                    for (key, pair) in both(before, rule) {
                        self.keys(&format!("{whose}{side} rule {name}: "), key, pair);
                    }
                }
                Some(_) => {}
            }
        }
        // The first match decides, so the order says something, of outbound rules.
        let order = |side: Option<&Value>, other: &BTreeMap<String, Value>| -> Vec<String> {
            let names = names(side);
            names
                .into_iter()
                .filter(|name| other.contains_key(name))
                .collect()
        };
        if side == "outbound" && order(before, &new) != order(after, &old) {
            self.add(format!("{whose}outbound rules in another order"), Effect::Now);
        }
    }

    /// The differences of what stands under a key, to the last key.
    fn keys(&mut self, whose: &str, path: &str, (before, after): (Option<&Value>, Option<&Value>)) {
        if before == after {
            return;
        }
        if let (Some(before @ Value::Object(_)), Some(after @ Value::Object(_))) = (before, after) {
            for (key, pair) in both(before, after) {
                self.keys(whose, &format!("{path}.{key}"), pair);
            }
            return;
        }
        let is = |keys: &[&str]| {
            keys.iter()
                .any(|key| path == *key || path.strip_prefix(key).is_some_and(|rest| rest.starts_with('.')))
        };
        let effect = if whose.is_empty() && is(AT_START) || !whose.is_empty() && is(OF_ENDPOINT) {
            Effect::Restart
        } else if !whose.is_empty() && is(OF_SESSION) {
            Effect::NextSession
        } else {
            Effect::Now
        };
        self.add(
            format!("{whose}{path}: {} -> {}", shown(before), shown(after)),
            effect,
        );
    }

    fn add(&mut self, what: String, effect: Effect) {
        self.differences.push(Difference { what, effect });
    }
}

impl Config {
    /// This configuration as a process can have it that was started with `running`: what is read at start only is that one's.
    pub fn as_far_as_running(&self, running: &Config) -> Config {
        let mut config = self.clone();
        config.admin.clone_from(&running.admin);
        config.confinement.clone_from(&running.confinement);
        config.log.format = running.log.format;
        for guest in &mut config.guests {
            if let Some(before) = running.guests.iter().find(|before| before.name == guest.name) {
                guest.vhost_user.socket.clone_from(&before.vhost_user.socket);
                guest.vhost_user.mode = before.vhost_user.mode;
            }
        }
        config
    }
}

/// The file with every key written out.
fn document(config: &Config) -> Value {
    // Keys are text and numbers are finite, so there is nothing that JSON could not say.
    serde_json::to_value(schema::File::from(config)).unwrap_or_default()
}

/// The keys of two mappings, with what stands under them.
fn both<'a>(
    before: &'a Value,
    after: &'a Value,
) -> impl Iterator<Item = (&'a str, (Option<&'a Value>, Option<&'a Value>))> {
    let keys = |side: &'a Value| side.as_object().into_iter().flat_map(|map| map.keys());
    let new = keys(after).filter(|key| before.get(key.as_str()).is_none());
    keys(before)
        .chain(new)
        .map(|key| (key.as_str(), (before.get(key.as_str()), after.get(key.as_str()))))
}

fn items(list: Option<&Value>) -> impl Iterator<Item = &Value> {
    list.and_then(Value::as_array).into_iter().flatten()
}

fn name(item: &Value) -> Option<String> {
    Some(item.get("name")?.as_str()?.to_owned())
}

fn names(list: Option<&Value>) -> Vec<String> {
    items(list).filter_map(name).collect()
}

fn by_name(list: Option<&Value>) -> BTreeMap<String, Value> {
    items(list)
        .filter_map(|item| Some((name(item)?, item.clone())))
        .collect()
}

fn shown(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "nothing".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.effect {
            Effect::Now => f.write_str(&self.what),
            Effect::NextSession => write!(f, "{} (from the guest's next session on)", self.what),
            Effect::Restart => write!(f, "{} (needs a restart of the sidecar)", self.what),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;

    const BASE: &str = "admin: {listen: [\"tcp://127.0.0.1:9464\"]}\n\
        guests:\n- name: web\n  cid: 3\n  vhostUser: {socket: /run/web.sock}\n  outbound:\n  \
        - {name: db, port: 5432, to: \"tcp://db:5432\"}\n  - {name: any, ports: 1-9999, to: \"tcp://h:1\"}\n  \
        inbound: [{name: ssh, listen: \"tcp://0.0.0.0:2222\", port: 22}]\n";

    fn config(text: &str) -> Config {
        parse(text, "test").unwrap().0
    }

    #[track_caller]
    fn between(edits: &[(&str, &str)]) -> Vec<String> {
        let mut text = BASE.to_owned();
        for (old, new) in edits {
            assert!(text.contains(old), "{old}");
            text = text.replacen(old, new, 1);
        }
        let change = Change::between(&config(BASE), &config(&text));
        change.differences.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_difference_is_named_with_when_it_takes_effect() {
        assert_eq!(between(&[("cid: 3\n", "cid: 3\n# a remark\n")]), [""; 0]);
        assert_eq!(
            between(&[
                ("cid: 3", "cid: 4"),
                ("to: \"tcp://db:5432\"", "to: \"tcp://db:5433\"")
            ]),
            [
                "guest web: cid: 3 -> 4 (from the guest's next session on)",
                "guest web: outbound rule db: to: tcp://db:5432 -> tcp://db:5433",
            ]
        );
        assert_eq!(
            between(&[("/run/web.sock", "/run/b.sock"), ("9464", "9465")]),
            [
                "admin.listen: [\"tcp://127.0.0.1:9464\"] -> [\"tcp://127.0.0.1:9465\"] (needs a restart of the sidecar)",
                "guest web: vhostUser.socket: /run/web.sock -> /run/b.sock (needs a restart of the sidecar)",
            ]
        );
        assert_eq!(
            between(&[
                ("name: ssh,", "name: sh, allow: [10.0.0.0/8],"),
                ("admin:", "log: {level: debug}\nadmin:")
            ]),
            [
                "log.level: info -> debug",
                "guest web: inbound rule ssh removed",
                "guest web: inbound rule sh added",
            ]
        );
    }

    #[test]
    fn guests_and_limits_come_and_go() {
        let other = "guests:\n- {name: db, cid: 9, vhostUser: {socket: /run/db.sock}}\n";
        assert_eq!(
            between(&[("guests:\n", &format!("limits: {{connections: 9}}\n{other}"))]),
            ["limits.connections: nothing -> 9", "guest db added"]
        );
        assert_eq!(
            between(&[
                ("name: web", "name: wob"),
                ("cid: 3", "cid: 3\n  limits: {buffer: 64KiB}")
            ]),
            ["guest web removed", "guest wob added"]
        );
        assert_eq!(
            between(&[("cid: 3", "cid: 3\n  limits: {connections: 7}")]),
            ["guest web: limits.connections: 4096 -> 7"]
        );
    }

    /// Of two rules that match, the first decides.
    #[test]
    fn the_order_of_outbound_rules_is_a_difference() {
        let (first, second) = (
            "- {name: a, ports: 1-20, to: \"tcp://h:1\"}",
            "- {name: b, ports: 10-30, to: \"tcp://h:1\"}",
        );
        let of = |first: &str, second: &str| {
            config(&format!(
                "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: /run/web.sock}}\n  outbound:\n  {first}\n  {second}\n"
            ))
        };
        let change = Change::between(&of(first, second), &of(second, first));
        let told: Vec<String> = change.differences.iter().map(ToString::to_string).collect();
        assert_eq!(told, ["guest web: outbound rules in another order"]);
    }

    #[test]
    fn what_needs_a_restart_stays_what_it_was_until_then() {
        let running = config(BASE);
        let text = BASE
            .replace("9464", "9465")
            .replace("web.sock", "b.sock")
            .replace("5432,", "5431,");
        let wanted = config(&text);
        let applied = wanted.as_far_as_running(&running);
        let left = Change::between(&applied, &wanted);
        assert!(left.differences.len() == 2 && left.of(Effect::Restart).count() == 2);
        let done = Change::between(&running, &applied);
        assert_eq!(done.differences.len(), 1, "{done:?}");
    }
}
