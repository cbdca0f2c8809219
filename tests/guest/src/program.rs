//! Programs that the test put into the initramfs.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};

/// As much output as one answer carries, in bytes.
const PIECE: u64 = 16 << 10;

/// A program that runs or has run. What it writes, errors included, goes to a file.
pub struct Program {
    child: Child,
    log: String,
}

impl Program {
    /// Starts a program. `name` names its output and nothing else.
    pub fn start(name: &str, program: &str, arguments: &[&str]) -> io::Result<Program> {
        let log = format!("/{name}.log");
        let output = File::create(&log)?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        Ok(Program {
            child: command.spawn()?,
            log,
        })
    }

    /// `running`, `exited-CODE` or `signal-NUMBER`, and the output from this offset on, or as much of it as fits. The state
    /// is asked for first: with the end of the program, no output is to come but what a piece had no room for.
    pub fn look(&mut self, offset: u64) -> io::Result<(String, Vec<u8>)> {
        let state = match self.child.try_wait()? {
            None => "running".to_owned(),
            Some(status) => match status.code() {
                Some(code) => format!("exited-{code}"),
                None => format!("signal-{}", status.signal().unwrap_or_default()),
            },
        };
        let mut log = File::open(&self.log)?;
        log.seek(SeekFrom::Start(offset))?;
        let mut piece = Vec::new();
        log.take(PIECE).read_to_end(&mut piece)?;
        Ok((state, piece))
    }

    /// Ends it; nothing happens to one that has ended.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }
}
