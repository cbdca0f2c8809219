//! What is wrong with a configuration, where, and what would be right.

use std::fmt;

use super::document::{Document, NodeId, Span};

/// How many diagnostics one attempt keeps; the rest is only counted, so that a file of garbage stays readable.
const MAX_DIAGNOSTICS: usize = 50;

/// Characters of a source line that an excerpt shows at most.
const EXCERPT_WIDTH: usize = 100;

/// Characters of a user's value that a message quotes at most.
const QUOTE_WIDTH: usize = 60;

/// One finding about one place of the file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Diagnostic {
    /// The file as the user named it, `<stdin>` for standard input.
    pub file: String,
    /// Line and column, counted from 1, the column in characters; `None` when the file itself is the matter.
    pub position: Option<(u32, u32)>,
    /// The YAML path, such as `guests[0].outbound[2].port`; empty for the document as a whole.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What would be right.
    pub help: Option<String>,
    /// The line, when there is one.
    pub excerpt: Option<Excerpt>,
}

/// A line of the file with the offending part marked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Excerpt {
    /// The line, cropped around the mark if it is long, control characters replaced.
    pub text: String,
    /// Where the mark starts, in characters of `text`.
    pub mark: usize,
    /// How many characters are marked, at least 1.
    pub marked: usize,
}

/// The program runs, but probably not as intended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Warning(pub Diagnostic);

/// A configuration that cannot be used: everything that was found wrong with it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub struct ConfigError {
    /// The findings in order of the file, at least one.
    pub diagnostics: Vec<Diagnostic>,
    /// How many more there were.
    pub omitted: usize,
}

impl ConfigError {
    /// An error about the file as a whole.
    pub(super) fn of_file(file: &str, message: String, help: &str) -> ConfigError {
        let diagnostic = Diagnostic {
            file: file.to_owned(),
            position: None,
            path: String::new(),
            message,
            help: Some(help.to_owned()),
            excerpt: None,
        };
        ConfigError {
            diagnostics: vec![diagnostic],
            omitted: 0,
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, diagnostic) in self.diagnostics.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "error: {diagnostic}")?;
        }
        if self.omitted > 0 {
            write!(f, "\nerror: and {} more", self.omitted)?;
        }
        Ok(())
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "warning: {}", self.0)
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", printable(&self.file))?;
        if let Some((line, column)) = self.position {
            write!(f, ":{line}:{column}")?;
        }
        if !self.path.is_empty() {
            write!(f, ": {}", printable(&self.path))?;
        }
        write!(f, ": {}", printable(&self.message))?;
        if let (Some(excerpt), Some((line, _))) = (&self.excerpt, self.position) {
            let margin = " ".repeat(line.to_string().len());
            write!(f, "\n  {line} | {}", excerpt.text)?;
            write!(
                f,
                "\n  {margin} | {}{}",
                " ".repeat(excerpt.mark),
                "^".repeat(excerpt.marked)
            )?;
        }
        if let Some(help) = &self.help {
            write!(f, "\n    = {}", printable(help))?;
        }
        Ok(())
    }
}

/// Gathers what is found wrong, so that one run names all of it.
pub(super) struct Report<'a> {
    file: &'a str,
    text: &'a str,
    diagnostics: Vec<Diagnostic>,
    omitted: usize,
    warnings: Vec<Warning>,
}

impl<'a> Report<'a> {
    pub(super) fn new(file: &'a str, text: &'a str) -> Report<'a> {
        Report {
            file,
            text,
            diagnostics: Vec::new(),
            omitted: 0,
            warnings: Vec::new(),
        }
    }

    /// Records an error about a node.
    pub(super) fn error(
        &mut self,
        document: &Document,
        at: NodeId,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        let path = document.path(at);
        self.error_at(document.span(at), path, message, help);
    }

    /// Records an error about a place that is no node: a key, a missing key, a syntax error.
    pub(super) fn error_at(
        &mut self,
        span: Span,
        path: String,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        if self.diagnostics.len() >= MAX_DIAGNOSTICS {
            self.omitted += 1;
            return;
        }
        let diagnostic = self.diagnostic(span, path, message.into(), help.into());
        self.diagnostics.push(diagnostic);
    }

    /// Records a warning about a node.
    pub(super) fn warning(
        &mut self,
        document: &Document,
        at: NodeId,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        if self.warnings.len() < MAX_DIAGNOSTICS {
            let diagnostic =
                self.diagnostic(document.span(at), document.path(at), message.into(), help.into());
            self.warnings.push(Warning(diagnostic));
        }
    }

    /// Whether an error was recorded.
    pub(super) fn has_errors(&self) -> bool {
        !self.diagnostics.is_empty()
    }

    /// The warnings, or the errors if there are any.
    pub(super) fn finish(mut self) -> Result<Vec<Warning>, ConfigError> {
        if self.diagnostics.is_empty() {
            self.warnings
                .sort_by_key(|Warning(diagnostic)| diagnostic.position);
            return Ok(self.warnings);
        }
        self.diagnostics.sort_by_key(|diagnostic| diagnostic.position);
        Err(ConfigError {
            diagnostics: self.diagnostics,
            omitted: self.omitted,
        })
    }

    fn diagnostic(&self, span: Span, path: String, message: String, help: String) -> Diagnostic {
        Diagnostic {
            file: self.file.to_owned(),
            position: Some((span.line, span.column)),
            path,
            message,
            help: (!help.is_empty()).then_some(help),
            excerpt: excerpt(self.text, span),
        }
    }
}

/// The line of `span` with its mark, cropped to [`EXCERPT_WIDTH`].
fn excerpt(text: &str, span: Span) -> Option<Excerpt> {
    let offset = span.offset?;
    let (before, after) = (text.get(..offset)?, text.get(offset..)?);
    let line_start = before.rfind(['\n', '\r']).map_or(0, |at| at + 1);
    let head: Vec<char> = before.get(line_start..)?.chars().collect();
    // Blanks at the line's end go, unless the mark is among them.
    let rest = after.split(['\n', '\r']).next().unwrap_or_default().trim_end();
    let marked = after
        .get(..span.length)
        .unwrap_or_default()
        .split(['\n', '\r'])
        .next()
        .unwrap_or_default();
    let marked = marked.trim_end().chars().count().max(1);

    // A long head is cropped so that the mark stands in the first half of the window.
    let skipped = if head.len() > EXCERPT_WIDTH / 2 {
        head.len() - EXCERPT_WIDTH / 3
    } else {
        0
    };
    let mut line = String::new();
    if skipped > 0 {
        line.push('…');
    }
    line.extend(head.iter().skip(skipped).map(|&c| printable_char(c)));
    let mark = line.chars().count();
    let room = EXCERPT_WIDTH.saturating_sub(mark);
    line.extend(rest.chars().take(room).map(printable_char));
    if rest.chars().nth(room).is_some() {
        line.push('…');
    }
    Some(Excerpt {
        text: line,
        mark,
        marked: marked.min(room.max(1)),
    })
}

/// A user's text in backticks, cropped.
pub(super) fn quoted(text: &str) -> String {
    match text.char_indices().nth(QUOTE_WIDTH) {
        Some((end, _)) => format!("`{}…`", text.get(..end).unwrap_or_default()),
        None => format!("`{text}`"),
    }
}

/// `text` without characters that a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().map(printable_char).collect()
}

fn printable_char(c: char) -> char {
    match c {
        '\t' => ' ',
        // Besides control characters: the bidirectional marks, which make a line read as another.
        '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}' => {
            '\u{fffd}'
        }
        c if c.is_control() => '\u{fffd}',
        c => c,
    }
}

/// The one of `known` that `word` was probably meant to be.
pub(super) fn did_you_mean<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    let plain = |text: &str| text.replace(['_', '-'], "").to_lowercase();
    if word.len() > 64 {
        return None;
    }
    let folded = plain(word);
    if let Some(same) = known.iter().find(|known| plain(known) == folded) {
        return Some(same);
    }
    let (distance, best) = known
        .iter()
        .map(|known| (strsim::osa_distance(&folded, &plain(known)), *known))
        .min()?;
    (distance <= 1 + best.len() / 4 && distance < best.len()).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_were_meant() {
        let known = ["name", "cid", "vhostUser", "outbound", "inbound", "limits"];
        for (word, meant) in [
            ("vhost_user", Some("vhostUser")),
            ("vhost-user", Some("vhostUser")),
            ("vhostuser", Some("vhostUser")),
            ("Cid", Some("cid")),
            ("outbonud", Some("outbound")),
            ("limit", Some("limits")),
            ("x", None),
            ("accessPlatform", None),
            ("", None),
        ] {
            assert_eq!(did_you_mean(word, &known), meant, "{word}");
        }
    }

    #[test]
    fn a_long_line_is_cropped_around_its_mark() {
        let text = format!("{}MARK{}", "a".repeat(500), "b".repeat(500));
        let span = Span {
            line: 1,
            column: 501,
            offset: Some(500),
            length: 4,
        };
        let excerpt = excerpt(&text, span).expect("an excerpt");
        let marked: String = excerpt
            .text
            .chars()
            .skip(excerpt.mark)
            .take(excerpt.marked)
            .collect();
        assert_eq!(marked, "MARK");
        assert!(excerpt.text.chars().count() <= EXCERPT_WIDTH + 2);
        assert!(excerpt.text.starts_with('…') && excerpt.text.ends_with('…'));
    }

    #[test]
    fn a_mark_ends_with_its_line() {
        let text = "first\nsecond\r\nthird";
        let span = Span {
            line: 2,
            column: 1,
            offset: Some(6),
            length: 12,
        };
        let excerpt = excerpt(text, span).expect("an excerpt");
        assert_eq!(
            (excerpt.text.as_str(), excerpt.mark, excerpt.marked),
            ("second", 0, 6)
        );
    }
}
