//! Text for people: styles, sizes and rates, and strangers' text made harmless. What the demo and `state` share.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::time::Duration;

/// How a piece of text looks, where there is colour.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Style {
    /// As the terminal has it.
    Plain,
    /// Headings.
    Bold,
    /// What is beside the point.
    Dim,
    /// Good.
    Green,
    /// Worth knowing.
    Cyan,
    /// Worth a look.
    Yellow,
    /// Bad.
    Red,
}

impl Style {
    /// The text in this style. Pad before painting: the codes count as characters.
    pub fn paint(self, text: &str) -> String {
        let code = match self {
            Style::Plain => return text.to_owned(),
            _ if text.is_empty() => return String::new(),
            Style::Bold => 1,
            Style::Dim => 2,
            Style::Red => 31,
            Style::Green => 32,
            Style::Yellow => 33,
            Style::Cyan => 36,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// Whether a terminal of kind `term` (`TERM`) should be given colour, when nobody has said: not if the user has set
/// `NO_COLOR` to anything (no-color.org), and not if it is a dumb one.
pub fn takes_colour(term: Option<&OsStr>, no_color: Option<&OsStr>) -> bool {
    no_color.is_none_or(OsStr::is_empty) && term.is_none_or(|term| term != "dumb")
}

/// Text of a stranger (a guest's name is ours, a program's name or a message is not) with everything that would not print
/// as itself written out: control characters, with which one could paint somebody else's terminal or set its title,
/// marks that turn the reading direction round, and invisible ones. Backslashes are doubled, so that `\u{1b}` in the
/// result always means ESC.
pub fn escaped(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' | '\'' => clean.push(c),
            c => clean.extend(c.escape_debug()),
        }
    }
    clean
}

/// `1.00 GiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut units = UNITS.iter().peekable();
    loop {
        match units.next() {
            Some(_) if value >= 1024.0 && units.peek().is_some() => value /= 1024.0,
            unit => return format!("{value:.2} {}", unit.unwrap_or(&"")),
        }
    }
}

/// `3.14 GB/s`: decimal, as network rates are.
pub fn rate(bytes: u64, took: Duration) -> String {
    let per_second = bytes as f64 / took.as_secs_f64().max(1e-9);
    if per_second >= 1e9 {
        format!("{:.2} GB/s", per_second / 1e9)
    } else {
        format!("{:.1} MB/s", per_second / 1e6)
    }
}

/// `12,345,678`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        let _ = text.write_char(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_cannot_paint_the_terminal() {
        assert_eq!(escaped("web \"a\" 'b' é 東"), "web \"a\" 'b' é 東");
        assert_eq!(escaped("\x1b]0;owned\x07"), "\\u{1b}]0;owned\\u{7}");
        assert_eq!(escaped("a\nb\rc\td\0"), "a\\nb\\rc\\td\\0");
        assert_eq!(escaped("\u{9b}31m"), "\\u{9b}31m", "CSI in one character (C1)");
        assert_eq!(escaped("\u{202e}exe"), "\\u{202e}exe", "right-to-left override");
        assert_eq!(escaped("a\u{200b}b\u{feff}"), "a\\u{200b}b\\u{feff}", "invisible");
        assert_eq!(escaped("e\u{301}\u{301}"), "e\\u{301}\\u{301}", "piled-up marks");
        assert_eq!(
            escaped("\\u{1b}"),
            "\\\\u{1b}",
            "what was written is told from what was escaped"
        );
    }

    #[test]
    fn colour_is_for_terminals_that_want_it() {
        let xterm = Some(OsStr::new("xterm"));
        assert!(takes_colour(xterm, None));
        assert!(takes_colour(None, None));
        assert!(takes_colour(xterm, Some(OsStr::new(""))), "empty means unset");
        assert!(!takes_colour(xterm, Some(OsStr::new("0"))));
        assert!(!takes_colour(Some(OsStr::new("dumb")), None));
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1 << 10), "1.00 KiB");
        assert_eq!(size(3 << 29), "1.50 GiB");
        assert_eq!(size(u64::MAX), "16777216.00 TiB");
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(12_345_678), "12,345,678");
        assert_eq!(Style::Red.paint("x"), "\x1b[31mx\x1b[0m");
        assert_eq!(Style::Red.paint(""), "");
    }
}
