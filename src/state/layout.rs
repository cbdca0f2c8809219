//! Lines: wrapped sentences and tables that fit their terminal.

use crate::terminal::Style;

/// Sentences are easier to read when they are not as wide as the terminal.
const PROSE: usize = 100;
/// Below this nothing can be laid out; the terminal wraps then.
const NARROWEST: usize = 40;
/// Columns of a field's name.
const NAME: usize = 17;
/// How short most cells may be cut before a column goes instead.
const CUT: usize = 16;
/// Between two columns of a table.
const GAP: usize = 2;
/// Before everything that belongs to a guest.
pub(super) const INDENT: usize = 2;

/// Text in one style.
pub(super) type Span = (Style, String);

/// A text that is plain.
pub(super) fn plain(text: impl Into<String>) -> Span {
    (Style::Plain, text.into())
}

/// A text that is beside the point.
pub(super) fn dim(text: impl Into<String>) -> Span {
    (Style::Dim, text.into())
}

/// A column of a table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column {
    title: &'static str,
    right: bool,
    /// How short its cells may be cut; `None` if they may not.
    cut: Option<usize>,
    /// 0 stays; of the others those with the highest go first when the terminal is too narrow.
    rank: u8,
}

impl Column {
    /// A column of words.
    pub(super) const fn left(title: &'static str) -> Column {
        Column {
            title,
            right: false,
            cut: None,
            rank: 0,
        }
    }

    /// A column of numbers.
    pub(super) const fn right(title: &'static str) -> Column {
        Column {
            right: true,
            ..Column::left(title)
        }
    }

    /// One whose cells may be cut.
    pub(super) const fn cut(self) -> Column {
        Column {
            cut: Some(CUT),
            ..self
        }
    }

    /// One that may be left out; the highest rank goes first.
    pub(super) const fn rank(self, rank: u8) -> Column {
        Column { rank, ..self }
    }
}

/// The text that comes into being.
pub(super) struct Page {
    text: String,
    width: Option<usize>,
    colour: bool,
}

impl Page {
    pub(super) fn new(width: Option<usize>, colour: bool) -> Page {
        Page {
            text: String::new(),
            width: width.map(|width| width.max(NARROWEST)),
            colour,
        }
    }

    pub(super) fn finish(self) -> String {
        self.text
    }

    pub(super) fn blank(&mut self) {
        self.text.push('\n');
    }

    /// The heading of a table, with a remark in parentheses.
    pub(super) fn heading(&mut self, what: &str, remark: &str) {
        self.blank();
        let spans = [(Style::Bold, what.to_owned()), dim(format!("({remark})"))];
        self.wrapped(INDENT, INDENT + 2, &spans);
    }

    /// A name and what is said of it; the sentences hang beside the name.
    pub(super) fn field(&mut self, name: &str, spans: &[Span]) {
        self.named(INDENT, NAME, name, spans);
    }

    /// The same with an indentation and a width of the name.
    pub(super) fn named(&mut self, indent: usize, width: usize, name: &str, spans: &[Span]) {
        let padded = format!("{:indent$}{name:<width$} ", "");
        self.push(&[(Style::Dim, padded)]);
        let hang = indent + width + 1;
        self.wrapped_from(hang, hang, self.prose(), spans);
    }

    /// A line of a log: as wide as the terminal, and one line where there is none, for `grep`.
    pub(super) fn entry(&mut self, name: &str, spans: &[Span]) {
        self.push(&[(Style::Dim, format!("{:INDENT$}{name} ", ""))]);
        let at = INDENT + name.chars().count() + 1;
        self.wrapped_from(at, at, self.width.unwrap_or(usize::MAX), spans);
    }

    /// Sentences with an indentation.
    pub(super) fn wrapped(&mut self, first: usize, hang: usize, spans: &[Span]) {
        self.text.extend(std::iter::repeat_n(' ', first));
        self.wrapped_from(first, hang, self.prose(), spans);
    }

    /// Sentences from column `at` on, further lines from column `hang` on. A word is never broken: it may be an option
    /// that somebody copies.
    fn wrapped_from(&mut self, at: usize, hang: usize, width: usize, spans: &[Span]) {
        let mut column = at;
        let mut line: Vec<Span> = Vec::new();
        for (style, text) in spans {
            for word in text.split(' ').filter(|word| !word.is_empty()) {
                let length = word.chars().count();
                let blank = usize::from(!line.is_empty());
                if !line.is_empty() && column + blank + length > width {
                    self.end_line(&line);
                    line.clear();
                    self.text.extend(std::iter::repeat_n(' ', hang));
                    column = hang;
                }
                let blank = usize::from(!line.is_empty());
                column += blank + length;
                match line.last_mut() {
                    Some((last, text)) if last == style => {
                        text.push(' ');
                        text.push_str(word);
                    }
                    Some(_) => {
                        line.push(plain(" "));
                        line.push((*style, word.to_owned()));
                    }
                    None => line.push((*style, word.to_owned())),
                }
            }
        }
        self.end_line(&line);
    }

    /// A table, if it has rows. What does not fit is cut where it may be, then left out, which is said.
    pub(super) fn table(&mut self, columns: &[Column], rows: &[Vec<Span>]) {
        if rows.is_empty() {
            return;
        }
        let mut columns: Vec<(usize, Column, usize)> = columns
            .iter()
            .enumerate()
            .map(|(index, column)| {
                let cells = rows.iter().filter_map(|row| row.get(index));
                let widest = cells.map(|(_, text)| text.chars().count()).max().unwrap_or(0);
                (index, *column, widest.max(column.title.chars().count()))
            })
            .collect();
        let left_out = self.width.map_or(Vec::new(), |width| fit(&mut columns, width));
        let titles: Vec<Span> = columns.iter().map(|(_, column, _)| dim(column.title)).collect();
        self.row(&columns, titles.iter());
        for row in rows {
            self.row(&columns, columns.iter().filter_map(|(index, ..)| row.get(*index)));
        }
        if !left_out.is_empty() {
            let note = format!("(no room for: {})", left_out.join(", "));
            self.wrapped(INDENT, INDENT, &[dim(note)]);
        }
    }

    fn row<'a>(&mut self, columns: &[(usize, Column, usize)], cells: impl Iterator<Item = &'a Span>) {
        let mut line = vec![plain(" ".repeat(INDENT))];
        for (number, ((_, column, width), (style, text))) in columns.iter().zip(cells).enumerate() {
            let text = cut(text, *width);
            let pad = " ".repeat(width.saturating_sub(text.chars().count()));
            if number > 0 {
                line.push(plain(" ".repeat(GAP)));
            }
            if column.right {
                line.push(plain(pad));
                line.push((*style, text));
            } else {
                line.push((*style, text));
                line.push(plain(pad));
            }
        }
        // No blanks at the end: they would wrap, and show when somebody copies.
        while line
            .last()
            .is_some_and(|(style, text)| *style == Style::Plain && text.trim().is_empty())
        {
            line.pop();
        }
        self.end_line(&line);
    }

    /// How wide sentences are.
    fn prose(&self) -> usize {
        self.width.unwrap_or(PROSE).min(PROSE)
    }

    fn end_line(&mut self, spans: &[Span]) {
        self.push(spans);
        let kept = self.text.trim_end_matches(' ').len();
        self.text.truncate(kept);
        self.text.push('\n');
    }

    fn push(&mut self, spans: &[Span]) {
        for (style, text) in spans {
            match self.colour {
                true => self.text.push_str(&style.paint(text)),
                false => self.text.push_str(text),
            }
        }
    }
}

/// Narrows columns to `width`; answers the titles of those that had to go.
fn fit(columns: &mut Vec<(usize, Column, usize)>, width: usize) -> Vec<&'static str> {
    let taken = |columns: &[(usize, Column, usize)]| {
        let gaps = GAP * columns.len().saturating_sub(1);
        INDENT + gaps + columns.iter().map(|(.., width)| width).sum::<usize>()
    };
    let floor = |column: &Column, width: usize| column.cut.map_or(width, |least| least.min(width));
    let least = |columns: &[(usize, Column, usize)]| {
        let spare = columns
            .iter()
            .map(|(_, column, width)| width - floor(column, *width));
        taken(columns) - spare.sum::<usize>()
    };
    let mut left_out = Vec::new();
    while least(columns) > width {
        let last = columns
            .iter()
            .enumerate()
            .max_by_key(|(at, (_, column, _))| (column.rank, *at))
            .filter(|(_, (_, column, _))| column.rank > 0)
            .map(|(at, _)| at);
        let Some(last) = last else {
            break;
        };
        left_out.insert(0, columns.remove(last).1.title);
    }
    // The widest gives way, character by character, so that two long columns end up alike.
    while taken(columns) > width {
        let widest = columns
            .iter_mut()
            .filter(|(_, column, width)| *width > floor(column, *width))
            .max_by_key(|(.., width)| *width);
        match widest {
            Some((.., width)) => *width -= 1,
            None => break,
        }
    }
    left_out
}

/// A text in at most `width` characters.
fn cut(text: &str, width: usize) -> String {
    match text.char_indices().nth(width) {
        None => text.to_owned(),
        Some(_) => text.chars().take(width.saturating_sub(1)).chain(['…']).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(page: Page) -> Vec<String> {
        page.finish().lines().map(str::to_owned).collect()
    }

    #[test]
    fn sentences_hang_beside_their_name_and_words_stay_whole() {
        let mut page = Page::new(Some(40), false);
        page.named(
            2,
            5,
            "seen",
            &[
                plain("one two three four"),
                plain("five six seven eight nine ten"),
            ],
        );
        page.named(
            2,
            5,
            "",
            &[plain("-device vhost-user-vsock-pci,iommu_platform=on,ats=on now")],
        );
        assert_eq!(
            lines(page),
            [
                "  seen  one two three four five six",
                "        seven eight nine ten",
                "        -device",
                "        vhost-user-vsock-pci,iommu_platform=on,ats=on",
                "        now",
            ]
        );
    }

    #[test]
    fn styles_change_between_words() {
        let mut page = Page::new(Some(40), true);
        page.wrapped(
            0,
            2,
            &[(Style::Bold, "a b".into()), plain("c"), (Style::Red, "d".into())],
        );
        assert_eq!(page.finish(), "\x1b[1ma b\x1b[0m c \x1b[31md\x1b[0m\n");
    }

    const COLUMNS: [Column; 4] = [
        Column::left("name"),
        Column::left("peer").cut(),
        Column::right("bytes").rank(1),
        Column::right("credit").rank(2),
    ];

    fn rows() -> Vec<Vec<Span>> {
        vec![
            vec![
                plain("database"),
                plain("postgres.shop.svc:5432"),
                plain("1"),
                plain("262,144"),
            ],
            vec![
                plain("b"),
                plain("tokyo.example:5432"),
                plain("12,345"),
                plain("0"),
            ],
        ]
    }

    #[test]
    fn a_table_is_as_wide_as_it_needs_where_there_is_room() {
        let mut page = Page::new(None, false);
        page.table(&COLUMNS, &rows());
        assert_eq!(
            lines(page),
            [
                "  name      peer                     bytes   credit",
                "  database  postgres.shop.svc:5432       1  262,144",
                "  b         tokyo.example:5432      12,345        0",
            ]
        );
    }

    #[test]
    fn a_narrow_terminal_cuts_cells_before_it_loses_columns_and_says_so() {
        let mut page = Page::new(Some(48), false);
        page.table(&COLUMNS, &rows());
        let narrow = lines(page);
        assert_eq!(narrow[1], "  database  postgres.shop.svc:…       1  262,144");
        let mut page = Page::new(Some(40), false);
        page.table(&COLUMNS, &rows());
        assert_eq!(
            lines(page),
            [
                "  name      peer                   bytes",
                "  database  postgres.shop.svc:5…       1",
                "  b         tokyo.example:5432    12,345",
                "  (no room for: credit)",
            ]
        );
    }

    #[test]
    fn an_empty_table_is_none() {
        let mut page = Page::new(None, false);
        page.table(&COLUMNS, &[]);
        assert_eq!(page.finish(), "");
    }
}
