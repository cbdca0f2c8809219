//! System calls of another process, counted by perf at the kernel's tracepoint: cheap beside strace, which stops the process at each.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, Signal, kill_process};
use vsock_sidecar::embedded_guest::wait_readable;

use crate::contender::Outcome;

/// perf, attached and not counting yet.
pub struct Calls {
    perf: Child,
    control: File,
    answers: File,
    dir: tempfile::TempDir,
}

impl Calls {
    /// Attaches to all threads of a process.
    pub fn attach(pid: u32) -> Outcome<Calls> {
        let dir = tempfile::tempdir()?;
        let (control, answers) = (dir.path().join("control"), dir.path().join("answers"));
        let perf = {
            let opened = (fifo(&control)?, fifo(&answers)?);
            let perf = Command::new("perf")
                .args([
                    "stat",
                    "-x,",
                    "-D",
                    "-1",
                    "-e",
                    "raw_syscalls:sys_enter",
                    "-p",
                    &pid.to_string(),
                    "-o",
                ])
                .arg(dir.path().join("counts"))
                .arg("--control")
                .arg(format!("fifo:{},{}", control.display(), answers.display()))
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .map_err(|error| format!("perf: {error}"))?;
            (perf, opened)
        };
        let (perf, (control, answers)) = perf;
        Ok(Calls {
            perf,
            control,
            answers,
            dir,
        })
    }

    /// From now on.
    pub fn begin(&mut self) -> Outcome<()> {
        self.tell("enable\n")
    }

    /// Until now; how many there were.
    pub fn end(mut self) -> Outcome<f64> {
        self.tell("disable\n")?;
        kill_process(Pid::from_child(&self.perf), Signal::INT)?;
        self.perf.wait()?;
        let counts = fs::read_to_string(self.dir.path().join("counts"))?;
        let line = counts
            .lines()
            .find(|line| line.contains("raw_syscalls:sys_enter"));
        let count = line.and_then(|line| line.split(',').next()?.parse().ok());
        count.ok_or_else(|| format!("perf counts no system calls here: {}", counts.trim()).into())
    }

    fn tell(&mut self, what: &str) -> Outcome<()> {
        self.control.write_all(what.as_bytes())?;
        let deadline = Instant::now() + Duration::from_secs(5);
        if !wait_readable(&[self.answers.as_fd()], Some(deadline))? {
            return Err("perf cannot count system calls here".into());
        }
        // "ack\n" with a zero behind it.
        let _ = self.answers.read(&mut [0; 16])?;
        Ok(())
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        let _ = self.perf.kill();
        let _ = self.perf.wait();
    }
}

/// Open for both, so that neither side waits for the other.
fn fifo(path: &Path) -> Outcome<File> {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    Ok(File::options().read(true).write(true).open(path)?)
}
