//! The IOTLB of a guest: what is cached, what was asked and what went wrong.

use serde_json::Value;

use super::document::{flag, float, number, span, text};
use super::layout::{Page, Span, dim, plain};
use crate::terminal::{Style, grouped, size};

/// Nothing is said where there is no translation and there never was one in this process.
pub(super) fn show(page: &mut Page, access_platform: &Value, iotlb: &Value) {
    let translating = text(access_platform, "/mode").as_deref() == Some("translate");
    let device = |key: &str| number(iotlb, key).unwrap_or(0);
    let session = |key: &str| number(access_platform, key).unwrap_or(0);
    let seen = [
        device("/lookups"),
        device("/updates"),
        session("/updates"),
        session("/refusedMessages"),
    ];
    if !translating && seen.iter().all(|count| *count == 0) {
        return;
    }
    page.heading(
        "IOTLB",
        "entries are those of now, the rest is since the sidecar started",
    );
    if iotlb.is_object() {
        let mut spans = vec![plain(format!("{} entries", grouped(device("/entries"))))];
        spans.extend(number(iotlb, "/capacity").map(|most| dim(format!("of {}", grouped(most)))));
        spans.push(plain(format!("· {} mapped", size(device("/mappedBytes")))));
        page.field("holds", &spans);
        page.field(
            "lookups",
            &lookups(device("/lookups"), device("/hits"), device("/misses")),
        );
    }
    page.field("messages", &messages(access_platform, &device, &session));
    page.field("misses", &misses(access_platform, iotlb, &session));
    let (read, write) = (device("/faultsRead"), device("/faultsWrite"));
    let style = match read.saturating_add(write) {
        0 => Style::Plain,
        _ => Style::Yellow,
    };
    let faults = format!("{} reading, {} writing", grouped(read), grouped(write));
    page.field("faults", &[(style, faults), dim("(each cost a packet)")]);
}

fn lookups(lookups: u64, hits: u64, misses: u64) -> Vec<Span> {
    let mut spans = vec![plain(grouped(lookups))];
    if lookups > 0 {
        spans.push(plain(format!(
            "· {:.2} % hits",
            hits as f64 / lookups as f64 * 100.0
        )));
    }
    spans.push(plain(format!("· {} missed", grouped(misses))));
    spans
}

fn messages(
    access_platform: &Value,
    device: &impl Fn(&str) -> u64,
    session: &impl Fn(&str) -> u64,
) -> Vec<Span> {
    // The session counts what came, the device what it carried out; an older sidecar has only one of them.
    let either = |key: &str| match number(access_platform, key) {
        Some(count) => grouped(count),
        None => grouped(device(key)),
    };
    let mut spans = vec![
        plain(format!(
            "{} updates, {} invalidations",
            either("/updates"),
            either("/invalidations")
        )),
        dim(format!(
            "· {} flushes, {} evictions",
            grouped(device("/flushes")),
            grouped(device("/evictions"))
        )),
    ];
    let refused = session("/refusedMessages");
    if refused > 0 {
        spans.push((
            Style::Yellow,
            format!("· {} refused by the sidecar", grouped(refused)),
        ));
    }
    spans
}

fn misses(access_platform: &Value, iotlb: &Value, session: &impl Fn(&str) -> u64) -> Vec<Span> {
    let mut spans = vec![plain(format!("{} sent", grouped(session("/missesSent"))))];
    let refused = session("/missesRefused");
    if refused > 0 {
        spans.push((
            Style::Yellow,
            format!("· {} refused by the VMM", grouped(refused)),
        ));
    }
    let unanswered = number(iotlb, "/unanswered").unwrap_or(0);
    if unanswered > 0 {
        let age =
            float(iotlb, "/oldestUnansweredSeconds").map(|age| format!(", the oldest for {}", span(age)));
        let text = format!("· {} unanswered{}", grouped(unanswered), age.unwrap_or_default());
        spans.push((Style::Yellow, text));
    }
    match flag(access_platform, "/backendChannel") {
        Some(true) => spans.push(dim("· backend channel open")),
        Some(false) => spans.push((
            Style::Yellow,
            "· no backend channel: none can be asked for".to_owned(),
        )),
        None => {}
    }
    spans
}
