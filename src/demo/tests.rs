//! The demo, played to a string.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::interrupt::Interrupt;
use super::terminal::{Terminal, grouped, rate, size};
use super::{Effort, Error, Options, show};

#[derive(Clone, Default)]
struct Page(Arc<Mutex<Vec<u8>>>);

impl Write for Page {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Page {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

const SMALL: Effort = Effort {
    bytes: 8 << 20,
    time: Duration::from_secs(60),
};

/// One demo at a time, so that what it leaves can be seen.
static STAGE: Mutex<()> = Mutex::new(());

fn demo_directories() -> usize {
    let ours = format!("vsock-demo-{}-", std::process::id());
    let entries = std::fs::read_dir(std::env::temp_dir()).unwrap();
    entries
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with(&ours))
        .count()
}

#[test]
fn the_demo_shows_every_act_and_leaves_nothing() {
    let _alone = STAGE.lock().unwrap_or_else(PoisonError::into_inner);
    let page = Page::default();
    show(
        &mut Terminal::new(page.clone(), false, false),
        &Interrupt::default(),
        SMALL,
        Options::default(),
    )
    .unwrap();
    let text = page.text();
    for expected in [
        "Hello from a TCP service that knows nothing of vsock.",
        "Hello from a server in the guest that knows nothing of TCP.",
        "RST: connect() fails at once",
        "guest -> service    8.00 MiB in",
        "service -> guest    8.",
        "version_1                  yes   yes",
        "ring_event_idx             yes   yes",
        "rx 128, tx 128",
        "256.00 MiB",
        "refused    1 for want of a rule",
        "standard   kept by the device",
    ] {
        assert!(text.contains(expected), "{expected:?} is missing in\n{text}");
    }
    assert!(
        !text.contains('\x1b') && !text.contains('\r'),
        "no colour where there is no terminal"
    );
    assert_eq!(demo_directories(), 0);
}

#[test]
fn a_terminal_gets_colour_and_a_bar() {
    let page = Page::default();
    let mut terminal = Terminal::new(page.clone(), true, true);
    terminal.act(1, "what", "way").unwrap();
    terminal
        .progress("a -> b", 0.5, 1 << 20, Duration::from_secs(1))
        .unwrap();
    terminal
        .result("a -> b", 1 << 20, Duration::from_secs(1))
        .unwrap();
    assert!(page.text().contains("\x1b[1mwhat\x1b[0m"));
    assert!(page.text().contains(&"█".repeat(14)));
    assert!(page.text().contains("\r\x1b[K"), "the result replaces the bar");
}

#[test]
fn ctrl_c_takes_everything_down() {
    let _alone = STAGE.lock().unwrap_or_else(PoisonError::into_inner);
    let interrupt = Interrupt::default();
    interrupt.raise();
    let page = Page::default();
    let options = Options {
        keep: true,
        vm: false,
    };
    let shown = show(&mut Terminal::new(page, false, false), &interrupt, SMALL, options);
    assert!(matches!(shown, Err(Error::Interrupted)));
    assert_eq!(demo_directories(), 0);
}

#[test]
fn figures_read_well() {
    assert_eq!(grouped(1_234_567), "1,234,567");
    assert_eq!(grouped(123), "123");
    assert_eq!(size(1 << 30), "1.00 GiB");
    assert_eq!(size(17), "17 B");
    assert_eq!(rate(3_140_000_000, Duration::from_secs(1)), "3.14 GB/s");
    assert_eq!(rate(5_000_000, Duration::from_secs(2)), "2.5 MB/s");
}
