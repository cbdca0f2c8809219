//! The flight recorder: the last messages between VMM and device, oldest first, as a log: what a table would cut off is what
//! somebody reads it for.

use serde_json::Value;

use super::document::{any, clock, date, float, number, text};
use super::layout::{Page, Span, dim, plain};
use crate::terminal::{Style, grouped};

pub(super) fn show(page: &mut Page, messages: &[Value]) {
    if messages.is_empty() {
        page.heading("Messages", "none recorded");
        return;
    }
    page.heading(
        "Messages",
        &format!(
            "the last {}, times in UTC; → from the VMM, ← to it, ⇒ and ⇐ the same on the backend channel",
            messages.len()
        ),
    );
    let mut chapter = None;
    for message in messages {
        let session = any(message, "/session");
        let day = float(message, "/at").and_then(date);
        if chapter.as_ref() != Some(&(session.clone(), day.clone())) {
            let title = [
                session.as_ref().map(|number| format!("session {number}")),
                day.as_ref().map(|day| format!("on {day}")),
            ];
            let title: Vec<Span> = title.into_iter().flatten().map(dim).collect();
            page.wrapped(2, 4, &title);
            chapter = Some((session, day));
        }
        let time = time_of_day(message, "/at");
        let way = match text(message, "/direction").as_deref() {
            Some("vmm_to_device") => "→",
            Some("device_to_vmm") => "←",
            Some("backend_channel_out") => "⇐",
            Some("backend_channel_in") => "⇒",
            _ => "?",
        };
        page.entry(&format!("{time} {way}"), &entry(message));
    }
}

/// What was asked, and how it went.
fn entry(message: &Value) -> Vec<Span> {
    let mut spans = vec![(Style::Bold, text(message, "/request").unwrap_or_default())];
    spans.extend(text(message, "/detail").map(plain));
    if let Some(count @ 2..) = number(message, "/count") {
        let until = time_of_day(message, "/last");
        spans.push((Style::Cyan, format!("×{} until {until}", grouped(count))));
    }
    let word = text(message, "/outcome").unwrap_or_default();
    let (style, shown) = match word.as_str() {
        "ended_session" => (Style::Red, "ended the session"),
        "nack" => (Style::Red, "NACK"),
        "refused" => (Style::Red, "refused"),
        "pending" => (Style::Yellow, "pending"),
        other => (Style::Plain, other),
    };
    let outcome = match (word.as_str(), text(message, "/answer")) {
        // Most requests have no answer, and most answers say that all is well: neither is worth a word.
        ("taken", None) => return spans,
        ("ok", _) => "ok".to_owned(),
        ("answered", Some(answer)) => answer,
        (_, Some(answer)) => format!("{shown}: {answer}"),
        (_, None) => shown.to_owned(),
    };
    spans.push(dim("·"));
    spans.push((style, outcome));
    spans
}

fn time_of_day(message: &Value, key: &str) -> String {
    float(message, key)
        .and_then(|unix| clock(unix, 3))
        .unwrap_or_else(|| "(no time)   ".to_owned())
}
