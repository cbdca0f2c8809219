//! The command line, and how long everything may take.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use crate::line::Line;

/// The speed of the sidecar against a plain client of the same service, and against vhost-device-vsock.
#[derive(Parser)]
pub struct Options {
    /// Lines with this in their name only; may be given several times
    #[arg(long, value_name = "NAME")]
    pub only: Vec<String>,
    /// Few lines, short windows: less than three minutes
    #[arg(long)]
    pub quick: bool,
    /// Name the lines and measure nothing
    #[arg(long)]
    pub list: bool,
    /// How often each contender has its turn
    #[arg(long, value_name = "N")]
    pub rounds: Option<usize>,
    /// Length of a turn in milliseconds
    #[arg(long, value_name = "MS")]
    pub window: Option<u64>,
    /// Where the figures go
    #[arg(long, default_value = "target/bench/speed.json", value_name = "FILE")]
    pub json: PathBuf,
    /// The peer's program
    #[arg(
        long,
        default_value = "target/tools/peer/bin/vhost-device-vsock",
        value_name = "FILE"
    )]
    pub peer: PathBuf,
    /// Draw plots into this directory
    #[arg(long, value_name = "DIR")]
    pub plots: Option<PathBuf>,
    /// What `cargo bench` says to every bench
    #[arg(long, hide = true)]
    bench: bool,
}

/// How to measure.
#[derive(Clone)]
pub struct Setting {
    pub rounds: usize,
    pub window: Duration,
    pub quick: bool,
    pub peer: PathBuf,
}

impl Options {
    /// The lines to be measured. An error is the end of the program: they were listed, or there are none.
    pub fn choose(&self, lines: Vec<Line>) -> Result<Vec<Line>, ExitCode> {
        let lines: Vec<_> = lines.into_iter().filter(|line| self.wants(line)).collect();
        if self.list {
            for line in &lines {
                println!("{:28} {}", line.name, line.what);
            }
            return Err(ExitCode::SUCCESS);
        }
        if lines.is_empty() {
            eprintln!("no line has such a name; --list shows them");
            return Err(ExitCode::FAILURE);
        }
        Ok(lines)
    }

    /// Whether a line is to be measured: one that is named is, in quick runs as well.
    fn wants(&self, line: &Line) -> bool {
        if self.only.is_empty() {
            return !self.quick || line.quick;
        }
        self.only.iter().any(|name| line.name.contains(name.as_str()))
    }

    pub fn setting(&self) -> Setting {
        let (rounds, window) = if self.quick { (5, 200) } else { (9, 1000) };
        Setting {
            rounds: self.rounds.unwrap_or(rounds).max(1),
            window: Duration::from_millis(self.window.unwrap_or(window).max(10)),
            quick: self.quick,
            peer: self.peer.clone(),
        }
    }
}
