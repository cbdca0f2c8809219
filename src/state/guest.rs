//! What is said of the sidecar and of each guest, in the order in which somebody with a problem reads: who is there, what is
//! wrong, what was agreed on, what flows.

use serde_json::Value;

use super::document::{any, date_and_time, flag, float, list, number, part, span, text};
use super::layout::{Column, Page, Span, dim, plain};
use super::{iotlb, messages};
use crate::terminal::{Style, grouped, size};

/// How many connections are listed.
const CONNECTIONS: usize = 20;

/// One line about the process.
pub(super) fn sidecar(page: &mut Page, document: &Value, source: &str) {
    let mut spans = vec![(Style::Bold, "vsock-sidecar".to_owned())];
    spans.extend(text(document, "/version").map(plain));
    spans.extend(text(document, "/revision").map(|revision| dim(format!("({revision})"))));
    spans.push(plain(format!("at {source}")));
    let up = float(document, "/now").zip(float(document, "/startedAt"));
    spans.extend(up.map(|(now, started)| dim(format!("· up {}", span(now - started)))));
    let guests = list(document, "/guests").len();
    spans.push(dim(format!(
        "· {guests} {}",
        if guests == 1 { "guest" } else { "guests" }
    )));
    if flag(document, "/draining") == Some(true) {
        spans.push((
            Style::Yellow,
            "· draining: it ends when its connections have".to_owned(),
        ));
    }
    page.wrapped(0, 2, &spans);
}

/// Everything about one guest.
pub(super) fn show(page: &mut Page, guest: &Value, now: Option<f64>, with_messages: bool) {
    let session = part(guest, "/session");
    title(page, guest, session);
    vmm(page, session, now);
    let access_platform = part(session, "/accessPlatform");
    platform(page, access_platform);
    last_end(page, session);
    findings(page, list(session, "/findings"), session);
    features(page, session);
    protocol_features(page, session);
    rings(page, session, part(guest, "/device"));
    memory(page, session);
    iotlb::show(page, access_platform, part(guest, "/device/iotlb"));
    rules(page, guest);
    connections(page, part(guest, "/device"));
    if with_messages {
        messages::show(page, list(session, "/messages"));
    }
}

fn title(page: &mut Page, guest: &Value, session: &Value) {
    let state = text(session, "/state").unwrap_or_else(|| "unknown".to_owned());
    let style = match state.as_str() {
        "running" => Style::Green,
        "waiting" => Style::Dim,
        _ => Style::Yellow,
    };
    let name = text(guest, "/name").unwrap_or_else(|| "(a guest without a name)".to_owned());
    let mut spans = vec![(Style::Bold, name)];
    spans.extend(any(guest, "/cid").map(|cid| plain(format!("· CID {cid} ·"))));
    spans.push((style, state));
    page.wrapped(0, 2, &spans);
    if guest.get("device").is_some_and(Value::is_null) {
        let hung = "its device thread did not answer in time: rings, IOTLB and connections are missing here";
        page.field("device", &[(Style::Red, hung.to_owned())]);
    }
}

/// Who is at the other end of which socket, and since when.
fn vmm(page: &mut Page, session: &Value, now: Option<f64>) {
    let peer = part(session, "/peer");
    let spans = match flag(session, "/connected") {
        Some(false) => vec![plain("none connected")],
        _ if peer.is_null() => vec![plain("unknown")],
        _ => {
            let known = text(peer, "/vmmHint");
            let name = known.as_deref().map_or("unknown VMM", vmm_name).to_owned();
            let ids: Vec<String> = ["program", "pid", "uid", "gid"]
                .iter()
                .filter_map(|key| any(peer, &format!("/{key}")).map(|value| format!("{key} {value}")))
                .collect();
            vec![plain(name), dim(format!("({})", ids.join(", ")))]
        }
    };
    page.field("VMM", &spans);
    let mut spans = Vec::new();
    spans.extend(text(session, "/socket").map(plain));
    spans.push(match text(session, "/mode").as_deref() {
        Some("client") => dim("(client: the VMM listens)"),
        _ => dim("(server: the VMM connects)"),
    });
    page.field("socket", &spans);
    let mut spans = vec![plain(match number(session, "/session") {
        Some(0) => "none yet".to_owned(),
        Some(number) => number.to_string(),
        None => "unknown".to_owned(),
    })];
    if let Some(since) = float(session, "/since") {
        spans.extend(date_and_time(since).map(|at| plain(format!("since {at}"))));
        spans.extend(now.map(|now| dim(format!("({})", span(now - since)))));
    }
    if flag(session, "/assumed") == Some(true) {
        let taken_over = "taken over from an earlier sidecar process: what it had agreed on is assumed";
        spans.push((Style::Yellow, taken_over.to_owned()));
    }
    let failed: Vec<String> = list(session, "/sessionErrors")
        .iter()
        .filter(|error| number(error, "/count").unwrap_or(0) > 0)
        .filter_map(|error| Some(format!("{} {}", any(error, "/count")?, text(error, "/reason")?)))
        .collect();
    if !failed.is_empty() {
        spans.push((
            Style::Yellow,
            format!("· ended by errors so far: {}", failed.join(", ")),
        ));
    }
    page.field("session", &spans);
}

fn vmm_name(hint: &str) -> &str {
    match hint {
        "qemu" => "QEMU",
        "cloud-hypervisor" => "Cloud Hypervisor",
        "firecracker" => "Firecracker",
        other => other,
    }
}

/// What bit 33 means in this session, and why.
fn platform(page: &mut Page, access_platform: &Value) {
    let (Some(policy), Some(mode)) = (text(access_platform, "/policy"), text(access_platform, "/mode"))
    else {
        return;
    };
    let style = match mode.as_str() {
        "identity" if policy != "identity" => Style::Yellow,
        "undecided" => Style::Yellow,
        "translate" => Style::Green,
        _ => Style::Plain,
    };
    let mut spans = vec![plain(policy), plain("→"), (style, mode)];
    spans.extend(text(access_platform, "/why").map(|why| plain(format!("· {why}"))));
    page.field("access platform", &spans);
}

fn last_end(page: &mut Page, session: &Value) {
    let end = part(session, "/lastEnd");
    let Some(reason) = text(end, "/reason") else {
        return;
    };
    let style = match reason.as_str() {
        "vmm_closed" | "shutdown" => Style::Plain,
        _ => Style::Yellow,
    };
    let mut spans = Vec::new();
    spans.extend(any(end, "/session").map(|number| plain(format!("session {number}:"))));
    spans.push((style, reason));
    spans.extend(text(end, "/detail").map(|detail| plain(format!("· {detail}"))));
    page.field("last end", &spans);
}

fn findings(page: &mut Page, findings: &[Value], session: &Value) {
    if findings.is_empty() {
        // An older sidecar looks for none: nothing is said then.
        if session.get("findings").is_some() {
            page.field("findings", &[(Style::Green, "none".to_owned())]);
        }
        return;
    }
    let active = |finding: &Value| flag(finding, "/active") != Some(false);
    let now = findings.iter().filter(|finding| active(finding)).count();
    let past = findings.len() - now;
    let remark = match (now, past) {
        (now, 0) => format!("{now}"),
        (0, past) => format!("none now, {past} that passed"),
        (now, past) => format!("{now} now, {past} that passed"),
    };
    page.heading("Findings", &remark);
    // Stable: what is equal stays in the sidecar's order.
    let mut sorted: Vec<&Value> = findings.iter().collect();
    sorted.sort_by_key(|finding| (!active(finding), severity(finding)));
    for (number, finding) in sorted.into_iter().enumerate() {
        if number > 0 {
            page.blank();
        }
        let (mark, style) = match (active(finding), severity(finding)) {
            (false, _) => ("-", Style::Dim),
            (true, Severity::Error) => ("✗", Style::Red),
            (true, Severity::Warning) => ("!", Style::Yellow),
            (true, Severity::Info) => ("i", Style::Cyan),
        };
        let severity = text(finding, "/severity").unwrap_or_else(|| "warning".to_owned());
        let code = text(finding, "/code").unwrap_or_else(|| "unknown".to_owned());
        let mut spans = vec![(style, format!("{mark} {severity}")), (Style::Bold, code)];
        let mut when = Vec::new();
        when.extend(any(finding, "/session").map(|number| format!("session {number}")));
        when.extend(
            float(finding, "/since")
                .and_then(date_and_time)
                .map(|at| format!("since {at}")),
        );
        if !active(finding) {
            when.push("has passed".to_owned());
        }
        spans.push(dim(when.join(", ")));
        page.wrapped(2, 4, &spans);
        for (name, key) in [("seen", "/seen"), ("means", "/meaning"), ("change", "/remedy")] {
            if let Some(sentence) = text(finding, key) {
                page.named(4, 6, name, &[plain(sentence)]);
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Severity {
    Error,
    Warning,
    Info,
}

/// A word we do not know is taken seriously.
fn severity(finding: &Value) -> Severity {
    match text(finding, "/severity").as_deref() {
        Some("error") => Severity::Error,
        Some("info") => Severity::Info,
        _ => Severity::Warning,
    }
}

/// Yes, no, or not known.
fn mark(yes: Option<bool>) -> Span {
    match yes {
        Some(true) => (Style::Green, "✓".to_owned()),
        Some(false) => dim("·"),
        None => dim("–"),
    }
}

const LEGEND: &str = "✓ yes, · no, – not known yet";

fn features(page: &mut Page, session: &Value) {
    let matrix = list(session, "/features");
    let rows: Vec<Vec<Span>> = matrix
        .iter()
        .map(|feature| {
            vec![
                plain(any(feature, "/bit").unwrap_or_default()),
                plain(text(feature, "/name").unwrap_or_default()),
                mark(flag(feature, "/offered")),
                mark(flag(feature, "/vmm")),
                mark(flag(feature, "/driver")),
                mark(flag(feature, "/effective")),
            ]
        })
        .collect();
    if !rows.is_empty() {
        page.heading("Virtio features", LEGEND);
        let columns = [
            Column::right("bit"),
            Column::left("name"),
            Column::left("offered"),
            Column::left("VMM"),
            Column::left("driver"),
            Column::left("effective"),
        ];
        page.table(&columns, &rows);
        return;
    }
    named_sets(
        page,
        "Virtio features",
        &[
            ("offered", part(session, "/featuresOffered")),
            ("VMM", part(session, "/featuresAcked")),
        ],
    );
}

fn protocol_features(page: &mut Page, session: &Value) {
    let layers = [part(session, "/layers/protocol"), part(session, "/protocol")];
    let layers = layers.into_iter().find(|value| value.is_object());
    let sets = match layers {
        Some(layers) => vec![
            ("offered", part(layers, "/offered")),
            ("VMM", part(layers, "/acknowledged")),
            ("effective", part(layers, "/effective")),
        ],
        None => vec![
            ("offered", part(session, "/protocolFeaturesOffered")),
            ("VMM", part(session, "/protocolFeaturesAcked")),
        ],
    };
    named_sets(page, "vhost-user protocol features", &sets);
}

/// A matrix of sets of names: whatever is in one of them has a row, whatever a set is a column.
fn named_sets(page: &mut Page, heading: &str, sets: &[(&'static str, &Value)]) {
    let names = |set: &Value| -> Vec<String> {
        let mut names: Vec<String> = list(set, "/names")
            .iter()
            .filter_map(|name| any(name, ""))
            .collect();
        names.extend(
            text(set, "/unknown")
                .filter(|bits| bits != "0x0")
                .map(|bits| format!("unnamed bits {bits}")),
        );
        names
    };
    let sets: Vec<(&'static str, Option<Vec<String>>)> = sets
        .iter()
        .map(|(title, set)| (*title, set.is_object().then(|| names(set))))
        .collect();
    let mut all: Vec<&String> = Vec::new();
    for name in sets.iter().flat_map(|(_, names)| names.iter().flatten()) {
        if !all.contains(&name) {
            all.push(name);
        }
    }
    let rows: Vec<Vec<Span>> = all
        .iter()
        .map(|name| {
            let cells = sets
                .iter()
                .map(|(_, names)| mark(names.as_ref().map(|names| names.contains(name))));
            std::iter::once(plain(name.as_str())).chain(cells).collect()
        })
        .collect();
    if rows.is_empty() {
        return;
    }
    page.heading(heading, LEGEND);
    let columns: Vec<Column> = std::iter::once(Column::left("name"))
        .chain(sets.iter().map(|(title, _)| Column::left(title)))
        .collect();
    page.table(&columns, &rows);
}

/// The rings: what the VMM has set up (session) and where the device stands (device).
fn rings(page: &mut Page, session: &Value, device: &Value) {
    let rows: Vec<Vec<Span>> = list(session, "/rings")
        .iter()
        .filter(|ring| number(ring, "/size").unwrap_or(0) > 0 || flag(ring, "/started") == Some(true))
        .map(|ring| {
            let queue = text(ring, "/queue");
            let running = list(device, "/rings")
                .iter()
                .find(|running| text(running, "/queue") == queue);
            let running = running.unwrap_or(&Value::Null);
            let (state, style) = match (flag(ring, "/started"), flag(ring, "/enabled")) {
                (Some(true), Some(false)) => ("paused", Style::Yellow),
                (Some(true), _) => ("running", Style::Green),
                _ => ("stopped", Style::Dim),
            };
            let (state, style) = match text(running, "/heldBy").as_deref() {
                Some("translation") => ("waits for translation".to_owned(), Style::Yellow),
                Some(held) => (held.to_owned(), Style::Red),
                None => (state.to_owned(), style),
            };
            let count = |value: Option<u64>| plain(value.map_or_else(|| "–".to_owned(), grouped));
            let translated = flag(running, "/translated").or(flag(ring, "/translated"));
            let address = |key| plain(any(ring, key).unwrap_or_else(|| "–".to_owned()));
            let base = number(ring, "/base");
            vec![
                plain(queue.unwrap_or_default()),
                (style, state),
                count(number(ring, "/size")),
                plain(text(ring, "/layout").unwrap_or_else(|| "split".to_owned())),
                count(number(running, "/nextAvail").or(base)),
                count(number(running, "/nextUsed").or(base)),
                count(number(running, "/available")),
                plain(match translated {
                    Some(true) => "IOVA",
                    _ => "VMM",
                }),
                address("/desc"),
                address("/avail"),
                address("/used"),
            ]
        })
        .collect();
    if rows.is_empty() {
        return;
    }
    page.heading(
        "Rings",
        "available: what the guest has put in and the sidecar has not taken out",
    );
    let columns = [
        Column::left("queue"),
        Column::left("state"),
        Column::right("size"),
        Column::left("layout").rank(4),
        Column::right("next avail").rank(2),
        Column::right("next used").rank(3),
        Column::right("available"),
        Column::left("addresses").rank(1),
        Column::left("descriptors").rank(5),
        Column::left("avail").rank(5),
        Column::left("used").rank(5),
    ];
    page.table(&columns, &rows);
}

fn memory(page: &mut Page, session: &Value) {
    let regions = list(session, "/memory");
    let hex = |region: &Value, key: &str| {
        plain(number(region, key).map_or_else(|| "–".to_owned(), |value| format!("{value:#x}")))
    };
    let rows: Vec<Vec<Span>> = regions
        .iter()
        .map(|region| {
            vec![
                hex(region, "/guestAddress"),
                plain(number(region, "/size").map_or_else(|| "–".to_owned(), size)),
                hex(region, "/userAddress"),
                hex(region, "/mmapOffset"),
            ]
        })
        .collect();
    if rows.is_empty() {
        return;
    }
    let total = regions
        .iter()
        .filter_map(|region| number(region, "/size"))
        .fold(0u64, u64::saturating_add);
    page.heading(
        "Guest memory",
        &format!("{} in all, shared by the VMM", size(total)),
    );
    let columns = [
        Column::left("guest address"),
        Column::right("size"),
        Column::left("VMM address"),
        Column::left("file offset").rank(1),
    ];
    page.table(&columns, &rows);
}

fn rules(page: &mut Page, guest: &Value) {
    let mut shared = false;
    let mut rows = Vec::new();
    for (list_name, arrow) in [("/outbound", "guest →"), ("/inbound", "→ guest")] {
        for rule in list(guest, list_name) {
            let traffic = part(rule, "/traffic");
            let is_shared = flag(traffic, "/shared").or(flag(rule, "/shared")) == Some(true);
            shared |= is_shared;
            let amount = |key, show: fn(u64) -> String| {
                plain(match number(traffic, key) {
                    Some(amount) if is_shared => format!("{}*", show(amount)),
                    Some(amount) => show(amount),
                    None => "–".to_owned(),
                })
            };
            let (from, to) = ends(rule);
            let refused = amount("/refused", grouped);
            let refused = match number(traffic, "/refused") {
                Some(1..) => (Style::Yellow, refused.1),
                _ => refused,
            };
            rows.push(vec![
                dim(arrow),
                plain(text(rule, "/name").unwrap_or_default()),
                plain(from),
                plain(to),
                amount("/active", grouped),
                amount("/opened", grouped),
                refused,
                amount("/bytesGuestToHost", size),
                amount("/bytesHostToGuest", size),
            ]);
        }
    }
    if rows.is_empty() {
        return;
    }
    page.heading("Rules", "since the sidecar started");
    let columns = [
        Column::left("way"),
        Column::left("name").cut(),
        Column::left("from").cut(),
        Column::left("to").cut(),
        Column::right("active"),
        Column::right("opened").rank(3),
        Column::right("refused").rank(2),
        Column::right("to host").rank(1),
        Column::right("to guest").rank(1),
    ];
    page.table(&columns, &rows);
    if shared {
        page.wrapped(
            2,
            2,
            &[dim(
                "* counted together with the guest's other rules beyond the first 64",
            )],
        );
    }
}

/// Where a rule's connections come from and go to.
fn ends(rule: &Value) -> (String, String) {
    let word = |value: Option<String>| value.unwrap_or_else(|| "–".to_owned());
    if rule.get("listen").is_some() {
        let to = match (text(rule, "/protocol").as_deref(), any(rule, "/port")) {
            (Some("connect"), _) => "CONNECT <port>".to_owned(),
            (_, port) => format!("port {}", word(port)),
        };
        return (word(text(rule, "/listen")), to);
    }
    let (first, last) = (any(rule, "/ports/0"), any(rule, "/ports/1"));
    let from = match (first, last) {
        (Some(first), Some(last)) if first != last => format!("ports {first}-{last}"),
        (first, _) => format!("port {}", word(first)),
    };
    (from, word(text(rule, "/to")))
}

fn connections(page: &mut Page, device: &Value) {
    let known = list(device, "/connections");
    let count = number(device, "/connectionCount").unwrap_or(known.len() as u64);
    if count == 0 {
        // Nobody asked: a device that did not answer has said so above.
        if device.is_object() {
            page.heading("Connections", "none");
        }
        return;
    }
    page.heading("Connections", &grouped(count));
    let amount =
        |connection: &Value, key: &str| plain(number(connection, key).map_or_else(|| "–".to_owned(), size));
    let rows: Vec<Vec<Span>> = known
        .iter()
        .take(CONNECTIONS)
        .map(|connection| {
            let word = |key| plain(any(connection, key).unwrap_or_else(|| "–".to_owned()));
            let credit = match number(connection, "/credit") {
                Some(0) => (Style::Yellow, "0 B".to_owned()),
                _ => amount(connection, "/credit"),
            };
            vec![
                dim(match text(connection, "/openedBy").as_deref() {
                    Some("guest_to_host") => "guest →",
                    Some("host_to_guest") => "→ guest",
                    _ => "–",
                }),
                word("/rule"),
                word("/guestPort"),
                word("/hostPort"),
                word("/peer"),
                word("/state"),
                amount(connection, "/bytesFromGuest"),
                amount(connection, "/bytesToGuest"),
                amount(connection, "/buffered"),
                credit,
                plain(float(connection, "/ageSeconds").map_or_else(|| "–".to_owned(), span)),
            ]
        })
        .collect();
    let columns = [
        Column::left("way").rank(5),
        Column::left("rule").cut(),
        Column::right("guest port"),
        Column::right("host port").rank(6),
        Column::left("peer").cut().rank(1),
        Column::left("state"),
        Column::right("from guest").rank(2),
        Column::right("to guest").rank(2),
        Column::right("buffered").rank(4),
        Column::right("credit").rank(4),
        Column::right("age").rank(3),
    ];
    page.table(&columns, &rows);
    let more = count.saturating_sub(rows.len() as u64);
    if more > 0 {
        page.wrapped(2, 2, &[dim(format!("… {} more", grouped(more)))]);
    }
}
