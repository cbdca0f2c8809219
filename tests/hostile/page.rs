//! `docs/hostile-guests.md` holds the table between two marks.

use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::path::Path;

use crate::KINDS;
use crate::table::{Answer, Row};

const BEGIN: &str = "<!-- begin: made of the rows by tests/hostile/page.rs -->\n";
const END: &str = "<!-- end -->";

/// Fails when the page and the rows differ. `UPDATE_DOCS=1 cargo test --test hostile page` writes it.
#[test]
fn the_page_is_that_of_the_rows() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/hostile-guests.md");
    let document = std::fs::read_to_string(&path).expect("docs/hostile-guests.md");
    let (head, rest) = document.split_once(BEGIN).expect("the first mark");
    let (_, tail) = rest.split_once(END).expect("the second mark");
    let expected = format!("{head}{BEGIN}{}{END}{tail}", tables());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, expected).expect("docs/hostile-guests.md can be written");
        return;
    }
    assert!(
        document == expected,
        "docs/hostile-guests.md is stale: run UPDATE_DOCS=1 cargo test --test hostile page"
    );
}

/// A row without a name could not be told from another when it fails.
#[test]
fn every_trick_has_a_name_of_its_own() {
    for (title, rows) in KINDS {
        assert!(!rows.is_empty(), "{title}");
        for (at, row) in rows.iter().enumerate() {
            assert!(!row.trick.is_empty() && !row.source.is_empty());
            assert!(
                rows[..at].iter().all(|other| other.trick != row.trick),
                "{}",
                row.trick
            );
        }
    }
}

fn tables() -> String {
    let mut text = String::new();
    for (title, rows) in KINDS {
        write!(
            text,
            "\n## {title}\n\n| trick | after | the guest hears | counted | lives on |\n|---|---|---|---|---|\n"
        )
        .unwrap();
        for row in *rows {
            writeln!(
                text,
                "| {} | {} | {} | {} | {} |",
                row.trick,
                row.source,
                answer(&row.answer),
                counted(row),
                row.survives.text(),
            )
            .unwrap();
        }
    }
    text.push('\n');
    text
}

fn answer(answer: &Answer) -> String {
    match answer {
        Answer::Silence => "nothing".into(),
        Answer::Rst => "RST".into(),
        Answer::Rsts(count) => format!("RST{}", times(count)),
        Answer::Response => "RESPONSE".into(),
        Answer::Seen(words) => (*words).into(),
    }
}

fn counted(row: &Row) -> String {
    let words = |keys: &[(&str, RangeInclusive<u32>)], whose: &str| -> Vec<String> {
        keys.iter()
            .map(|(key, count)| format!("{whose}`{key}`{}", times(count)))
            .collect()
    };
    let mut all = words(row.counted, "");
    all.extend(words(row.neighbour, "by the other guest "));
    match all.is_empty() {
        true => "nothing".into(),
        false => all.join(", "),
    }
}

fn times(count: &RangeInclusive<u32>) -> String {
    match (count.start(), count.end()) {
        (1, 1) => String::new(),
        (first, last) if first == last => format!(", {first} times"),
        (0 | 1, last) => format!(", up to {last} times"),
        (first, last) => format!(", {first} to {last} times"),
    }
}
