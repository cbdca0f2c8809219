//! Edits of a text: ranges of bytes and what replaces them, in the manner of the text around.

use std::borrow::Cow;
use std::ops::Range;

use super::Block;
use super::scan::Element;

/// Edits that are to be carried out together. None may overlap another.
#[derive(Debug)]
pub(super) struct Edits<'a> {
    text: &'a str,
    list: Vec<(Range<usize>, String)>,
}

impl<'a> Edits<'a> {
    pub(super) fn of(text: &'a str) -> Edits<'a> {
        Edits {
            text,
            list: Vec::new(),
        }
    }

    /// `new` in the place of `span`.
    pub(super) fn replace(&mut self, span: Range<usize>, new: impl Into<String>) {
        self.list.push((span, new.into()));
    }

    /// One attribute more, before the end of the element's start tag.
    pub(super) fn add_attribute(&mut self, element: &Element<'_>, key: &str, value: &str) {
        let at = self.end_of_start_tag(element);
        self.replace(at..at, format!(" {key}='{}'", escape(value)));
    }

    /// `blocks` as the element's last children, each on a line of its own if the element's end tag has one.
    pub(super) fn append(&mut self, element: &Element<'_>, blocks: &[Block]) {
        if blocks.is_empty() {
            return;
        }
        let Some(end) = element.end else {
            // `<a/>` becomes `<a>…</a>`.
            let at = self.end_of_start_tag(element);
            let indent = self.indent(element.start.start);
            let children = indent.write(blocks);
            let close = indent.line(0);
            let name = element.name;
            self.replace(at..element.start.end, format!(">{children}{close}</{name}>"));
            return;
        };
        let indent = self.indent(end);
        // Behind the last child and before the white space that precedes the end tag, which goes on preceding it.
        let at = match indent {
            Indent::None => end,
            Indent::Lines { .. } => self.trimmed(end),
        };
        self.replace(at..at, indent.write(blocks));
    }

    /// The text with all edits made.
    pub(super) fn apply(mut self) -> Cow<'a, str> {
        if self.list.is_empty() {
            return Cow::Borrowed(self.text);
        }
        // Stable: what was added first at one place stands first.
        self.list.sort_by_key(|(span, _)| (span.start, span.end));
        let more: usize = self.list.iter().map(|(_, new)| new.len()).sum();
        let mut text = String::with_capacity(self.text.len().saturating_add(more));
        let mut from = 0;
        for (span, new) in &self.list {
            text.push_str(self.text.get(from..span.start).unwrap_or_default());
            text.push_str(new);
            from = span.end;
        }
        text.push_str(self.text.get(from..).unwrap_or_default());
        Cow::Owned(text)
    }

    /// Where the `>` or `/>` of a start tag begins.
    fn end_of_start_tag(&self, element: &Element<'_>) -> usize {
        let tag = self.text.get(element.start.clone()).unwrap_or_default();
        let close = if element.is_empty { "/>" } else { ">" };
        let inside = tag.strip_suffix(close).unwrap_or(tag);
        element.start.start.saturating_add(inside.trim_end().len())
    }

    /// Where the white space ends that precedes `at`.
    fn trimmed(&self, at: usize) -> usize {
        let before = self.text.get(..at).unwrap_or_default();
        before.trim_end_matches([' ', '\t', '\r', '\n']).len()
    }

    /// How the tag at `at` is set off.
    fn indent(&self, at: usize) -> Indent<'a> {
        let before = self.text.get(..at).unwrap_or_default();
        let line = before.rfind('\n').and_then(|newline| {
            let own = before.get(newline.saturating_add(1)..)?;
            own.chars().all(|c| matches!(c, ' ' | '\t')).then_some(own)
        });
        line.map_or(Indent::None, |own| Indent::Lines {
            own,
            step: if own.contains('\t') || self.text.contains("\n\t<") {
                "\t"
            } else {
                "  "
            },
            newline: if before.ends_with(&format!("\r\n{own}")) {
                "\r\n"
            } else {
                "\n"
            },
        })
    }
}

/// The white space before a tag.
#[derive(Clone, Copy, Debug)]
enum Indent<'a> {
    /// The tag follows something on its line.
    None,
    /// The tag is the first of its line.
    Lines {
        own: &'a str,
        step: &'static str,
        newline: &'static str,
    },
}

impl Indent<'_> {
    /// What stands before an element so many levels further in.
    fn line(self, levels: usize) -> String {
        match self {
            Indent::None => String::new(),
            Indent::Lines { own, step, newline } => format!("{newline}{own}{}", step.repeat(levels)),
        }
    }

    fn write(self, blocks: &[Block]) -> String {
        let mut text = String::new();
        let mut put = |levels: usize, line: &str| {
            text.push_str(&self.line(levels));
            text.push_str(line);
        };
        for block in blocks {
            match block {
                Block::Line(line) => put(1, line),
                Block::Nest(open, lines, close) => {
                    put(1, open);
                    lines.iter().for_each(|line| put(2, line));
                    put(1, close);
                }
            }
        }
        text
    }
}

/// As the value of an attribute between apostrophes.
pub(super) fn escape(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            c => escaped.push(c),
        }
    }
    escaped
}
