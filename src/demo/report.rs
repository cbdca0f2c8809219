//! What was negotiated and what flowed, as `/state` and `/metrics` tell it: the demo reads them as an operator would.

use serde_json::Value;

use super::stage::Stage;
use super::terminal::{Style, Terminal, grouped, size};
use super::{Error, Options};

/// The features at both layers, the rings and the memory.
pub(super) fn negotiation(stage: &Stage, t: &mut Terminal) -> Result<(), Error> {
    let page = stage.admin_page("/state")?;
    let state: Value = serde_json::from_str(&page.body)
        .map_err(|error| Error::Unexpected(format!("/state is no JSON: {error}")))?;
    let session = state.pointer("/guests/0/session").unwrap_or(&Value::Null);
    t.heading("What was negotiated", "(from /state)")?;
    let virtio = features(session, "featuresOffered", "featuresAcked");
    let protocol = features(session, "protocolFeaturesOffered", "protocolFeaturesAcked");
    let head = |name: &str| format!("{name:<22} {:>7} {:>5}", "offered", "taken");
    let titles = format!("  {}     {}", head("virtio feature"), head("vhost-user feature"));
    let titles = t.paint(Style::Dim, titles.trim_end());
    t.line(&titles)?;
    for row in 0..virtio.len().max(protocol.len()) {
        let cell = |column: &[Feature]| match column.get(row) {
            Some(feature) => feature.row(t),
            None => " ".repeat(36),
        };
        let line = format!("  {}     {}", cell(&virtio), cell(&protocol));
        t.line(line.trim_end())?;
    }
    let rings: Vec<String> = list(session, "rings")
        .iter()
        .filter(|ring| ring.get("started") == Some(&Value::Bool(true)))
        .map(|ring| {
            format!(
                "{} {}",
                text(ring, "queue"),
                ring.get("size").unwrap_or(&Value::Null)
            )
        })
        .collect();
    let memory: u64 = list(session, "memory")
        .iter()
        .filter_map(|region| region.get("size").map(number))
        .sum();
    t.line("")?;
    t.field(
        "rings",
        &rings.join(", "),
        "entries; the VMM keeps the event queue",
    )?;
    t.field(
        "memory",
        &size(memory),
        "shared by the VMM, mapped by the sidecar",
    )?;
    t.field("state", &text(session, "state"), "")
}

/// A feature's row.
struct Feature {
    name: String,
    taken: bool,
}

impl Feature {
    fn row(&self, t: &Terminal) -> String {
        let taken = match self.taken {
            true => t.paint(Style::Green, "  yes"),
            false => t.paint(Style::Dim, "    -"),
        };
        format!("{:<22} {:>7} {taken}", self.name, "yes")
    }
}

/// What is offered, and which of it was taken.
fn features(session: &Value, offered: &str, taken: &str) -> Vec<Feature> {
    let names = |key: &str| {
        let names = session.get(key).map(|set| list(set, "names")).unwrap_or_default();
        names
            .iter()
            .filter_map(|name| name.as_str().map(str::to_owned))
            .collect::<Vec<_>>()
    };
    let taken = names(taken);
    names(offered)
        .into_iter()
        .map(|name| Feature {
            taken: taken.contains(&name),
            name,
        })
        .collect()
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value
        .get(key)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

fn text(value: &Value, key: &str) -> String {
    value
        .get(key)
        .and_then(Value::as_str)
        .unwrap_or("unknown")
        .to_owned()
}

/// A number, or one in a string as JSON writers do with large ones.
fn number(value: &Value) -> u64 {
    match value {
        Value::String(text) => match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).unwrap_or(0),
            None => text.parse().unwrap_or(0),
        },
        value => value.as_u64().unwrap_or(0),
    }
}

/// Packets, bytes and notifications.
pub(super) fn flows(stage: &Stage, t: &mut Terminal) -> Result<(), Error> {
    let page = stage.admin_page("/metrics")?;
    let metric = |family: &str, labels: &[(&str, &str)]| sum(&page.body, family, labels);
    t.heading("What flowed", "(from /metrics)")?;
    let both = |family: &str| {
        ["guest_to_host", "host_to_guest"].map(|direction| metric(family, &[("direction", direction)]))
    };
    let titles = format!("  {:<22} {:>16} {:>16}", "", "guest -> host", "host -> guest");
    let titles = t.paint(Style::Dim, &titles);
    t.line(&titles)?;
    let [out, back] = both("vsock_packets_total");
    t.line(&format!(
        "  {:<22} {:>16} {:>16}",
        "packets",
        grouped(out),
        grouped(back)
    ))?;
    let [out, back] = both("vsock_payload_bytes_total");
    t.line(&format!(
        "  {:<22} {:>16} {:>16}",
        "payload",
        size(out),
        size(back)
    ))?;
    let [out, back] = ["tx", "rx"].map(|queue| metric("vsock_kicks_total", &[("queue", queue)]));
    t.line(&format!(
        "  {:<22} {:>16} {:>16}",
        "kicks",
        grouped(out),
        grouped(back)
    ))?;
    let [out, back] = ["tx", "rx"].map(|queue| metric("vsock_interrupts_total", &[("queue", queue)]));
    t.line(&format!(
        "  {:<22} {:>16} {:>16}",
        "interrupts",
        grouped(out),
        grouped(back)
    ))?;
    let opened = metric("vsock_connections_opened_total", &[]);
    let no_rule = metric("vsock_connections_refused_total", &[("reason", "no_rule")]);
    t.line("")?;
    t.field("opened", &format!("{} connections", grouped(opened)), "")?;
    t.field("refused", &format!("{} for want of a rule", grouped(no_rule)), "")?;
    let verdict = stage.guest.verdict();
    let style = if verdict.good { Style::Green } else { Style::Yellow };
    let text = t.paint(style, &verdict.text);
    t.field(verdict.about, &text, verdict.judge)
}

/// The sum of a family's samples that have all these labels.
fn sum(page: &str, family: &str, labels: &[(&str, &str)]) -> u64 {
    page.lines()
        .filter_map(|line| {
            let rest = line.strip_prefix(family)?;
            let (series, value) = rest.rsplit_once(' ')?;
            let named = series.is_empty() || series.starts_with('{');
            let fits = labels
                .iter()
                .all(|(name, value)| series.contains(&format!("{name}=\"{value}\"")));
            (named && fits).then(|| value.parse::<f64>().ok()).flatten()
        })
        .sum::<f64>() as u64
}

/// How to look at the same with curl.
pub(super) fn where_to_look(stage: &Stage, t: &mut Terminal, options: Options) -> Result<(), Error> {
    if !options.keep {
        t.heading("Look around", "")?;
        let vm = if options.vm { "--vm " } else { "" };
        t.line(&format!(
            "  cargo run --release -- demo {vm}--keep     leaves all of this running, for curl"
        ))?;
        return t.line("");
    }
    t.heading("Look around", "(running until Ctrl-C)")?;
    let commands = [
        (format!("curl -s http://{}/metrics", stage.admin), "Prometheus"),
        (
            format!("curl -s http://{}/state", stage.admin),
            "the negotiation as JSON",
        ),
        (
            format!(
                "curl -s --unix-socket {} http://localhost/readyz",
                stage.admin_socket.display()
            ),
            "the same server",
        ),
        (
            format!("curl -s http://{}/", stage.web),
            "the server in the guest",
        ),
    ];
    let width = commands.iter().map(|(c, _)| c.len()).max().unwrap_or(0);
    for (command, what) in commands {
        let what = t.paint(Style::Dim, what);
        t.line(&format!("  {command:<width$}   {what}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_told_apart_and_summed_over_labels() {
        let page = "# HELP a_total Things.\na_total{d=\"x\",o=\"1\"} 2\na_total{d=\"x\",o=\"2\"} 3\n\
                    a_total{d=\"y\"} 5\na_total_more{d=\"x\"} 7\nb 4\n";
        assert_eq!(sum(page, "a_total", &[("d", "x")]), 5);
        assert_eq!(sum(page, "a_total", &[]), 10);
        assert_eq!(sum(page, "b", &[]), 4);
        assert_eq!(sum(page, "missing", &[]), 0);
    }

    #[test]
    fn a_state_of_another_shape_gives_empty_tables() {
        assert!(features(&Value::Null, "a", "b").is_empty());
        assert_eq!(text(&Value::Null, "state"), "unknown");
        assert_eq!(number(&Value::from("0x10")), 16);
        assert_eq!(number(&Value::from(7)), 7);
    }
}
