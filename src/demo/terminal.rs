//! What the demo prints: aligned plain lines, with colour and a moving progress bar only where there is a terminal.

use std::io::Write;
use std::time::{Duration, Instant};

use super::Error;
pub(super) use crate::terminal::{Style, grouped, rate, size};

/// How often the progress bar moves.
const FRAME: Duration = Duration::from_millis(80);

/// Cells of the progress bar.
const BAR: usize = 28;

/// Where the demo prints to.
pub(super) struct Terminal {
    out: Box<dyn Write>,
    /// Lines can be overwritten.
    moving: bool,
    colour: bool,
    /// When the progress bar was last drawn.
    drawn: Option<Instant>,
}

impl Terminal {
    pub(super) fn new(out: impl Write + 'static, moving: bool, colour: bool) -> Terminal {
        Terminal {
            out: Box::new(out),
            moving,
            colour,
            drawn: None,
        }
    }

    /// One line.
    pub(super) fn line(&mut self, text: &str) -> Result<(), Error> {
        writeln!(self.out, "{text}").map_err(Error::Output)
    }

    pub(super) fn title(&mut self, name: &str, what: &str) -> Result<(), Error> {
        let text = format!("\n{}  {what}\n", self.paint(Style::Bold, name));
        self.line(&text)
    }

    /// A name, a value and a remark.
    pub(super) fn field(&mut self, name: &str, value: &str, remark: &str) -> Result<(), Error> {
        let remark = match remark {
            "" => String::new(),
            remark => self.paint(Style::Dim, &format!("  ({remark})")),
        };
        let name = self.paint(Style::Dim, &format!("{name:<10}"));
        self.line(&format!("  {name} {value}{remark}"))
    }

    /// The heading of an act: what happens, and over which way.
    pub(super) fn act(&mut self, number: u32, what: &str, way: &str) -> Result<(), Error> {
        let number = self.paint(Style::Cyan, &number.to_string());
        let what = self.paint(Style::Bold, what);
        let way = self.paint(Style::Dim, way);
        self.line(&format!("\n{number} {what}\n  {way}"))
    }

    /// The heading of a table: what it shows, and where that comes from.
    pub(super) fn heading(&mut self, what: &str, source: &str) -> Result<(), Error> {
        let what = self.paint(Style::Bold, what);
        let source = self.paint(Style::Dim, source);
        self.line(format!("\n{what}  {source}").trim_end())
    }

    /// Something that is sent.
    pub(super) fn out_line(&mut self, text: &str) -> Result<(), Error> {
        let mark = self.paint(Style::Cyan, ">");
        self.line(&format!("    {mark} {text}"))
    }

    /// Something that comes back, and after how long.
    pub(super) fn in_line(&mut self, text: &str, took: Option<Duration>) -> Result<(), Error> {
        let mark = self.paint(Style::Green, "<");
        let took = took.map(|t| self.paint(Style::Dim, &format!("  {}", milliseconds(t))));
        self.line(&format!("    {mark} {text}{}", took.unwrap_or_default()))
    }

    /// Draws the progress bar, if there is a terminal and it is time.
    pub(super) fn progress(
        &mut self,
        label: &str,
        fraction: f64,
        bytes: u64,
        took: Duration,
    ) -> Result<(), Error> {
        if !self.moving || self.drawn.is_some_and(|drawn| drawn.elapsed() < FRAME) {
            return Ok(());
        }
        self.drawn = Some(Instant::now());
        let full = (fraction.clamp(0.0, 1.0) * BAR as f64) as usize;
        let done = self.paint(Style::Green, &"█".repeat(full));
        let rest = self.paint(Style::Dim, &"░".repeat(BAR - full));
        let text = format!("\r    {label:<17} {done}{rest}  {:>12}", rate(bytes, took));
        self.out
            .write_all(text.as_bytes())
            .and_then(|()| self.out.flush())
            .map_err(Error::Output)
    }

    /// Something that takes its time begins. On a terminal [`elapsed`](Terminal::elapsed) says how long it has taken.
    pub(super) fn waiting(&mut self, what: &str) -> Result<(), Error> {
        match self.moving {
            true => Ok(()),
            false => self.line(&format!("  {what}")),
        }
    }

    /// How long something has taken, if there is a terminal and it is time. What cannot be drawn is not: the next line
    /// finds out.
    pub(super) fn elapsed(&mut self, what: &str, since: Instant) {
        if self.moving && self.drawn.is_none_or(|drawn| drawn.elapsed() >= FRAME) {
            self.drawn = Some(Instant::now());
            let _ = write!(
                self.out,
                "\r\x1b[K  {what}  {:.1} s",
                since.elapsed().as_secs_f64()
            );
            let _ = self.out.flush();
        }
    }

    /// Removes what [`elapsed`](Terminal::elapsed) drew.
    pub(super) fn clear(&mut self) -> Result<(), Error> {
        match self.drawn.take() {
            Some(_) => self.out.write_all(b"\r\x1b[K").map_err(Error::Output),
            None => Ok(()),
        }
    }

    /// A remark below a result.
    pub(super) fn remark(&mut self, text: &str) -> Result<(), Error> {
        let text = self.paint(Style::Dim, text);
        self.line(&format!("    {:<17} {text}", ""))
    }

    /// What a bulk run gave, in place of its progress bar.
    pub(super) fn result(&mut self, label: &str, bytes: u64, took: Duration) -> Result<(), Error> {
        self.drawn = None;
        let clear = if self.moving { "\r\x1b[K" } else { "" };
        let rate = self.paint(Style::Green, &format!("{:>12}", rate(bytes, took)));
        let text = format!(
            "{clear}    {label:<17} {:>10} in {:>6.2} s {rate}",
            size(bytes),
            took.as_secs_f64()
        );
        self.line(&text)
    }

    /// Text in a style, if there is colour. Pad before painting: the codes count as characters.
    pub(super) fn paint(&self, style: Style, text: &str) -> String {
        match self.colour {
            true => style.paint(text),
            false => text.to_owned(),
        }
    }
}

/// `0.42 ms`.
pub(super) fn milliseconds(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1e3)
}
