//! Waiting with a deadline, and with somebody who may lose patience earlier.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Asked every [`TICK`] of a wait whether to go on; `false` ends the wait with an error of kind
/// [`Interrupted`](io::ErrorKind::Interrupted). May draw something while it is at it.
pub type GoOn<'a> = &'a mut dyn FnMut() -> bool;

/// How often a [`GoOn`] is asked.
pub const TICK: Duration = Duration::from_millis(50);

/// Waits until `fd` can be read, its peer is gone, or `deadline` has come, which is an error of kind `TimedOut`.
pub fn readable(fd: impl AsFd, deadline: Instant, go_on: GoOn<'_>) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left.min(TICK)).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) if left <= TICK => return Err(io::ErrorKind::TimedOut.into()),
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
        if !go_on() {
            return Err(io::ErrorKind::Interrupted.into());
        }
    }
}

/// The exit status of a child that ends before `deadline`.
pub fn end_of(child: &mut Child, deadline: Instant, go_on: GoOn<'_>) -> io::Result<ExitStatus> {
    let fd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    readable(&fd, deadline, go_on)?;
    child.wait()
}

/// The last lines of a log file, for a failure's report.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    let last = all.get(all.len().saturating_sub(lines)..).unwrap_or_default();
    format!(
        "--- {} (last {} of {} lines)\n{}\n",
        path.display(),
        last.len(),
        all.len(),
        last.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_wait_ends_by_data_by_its_deadline_or_by_wish() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let soon = Instant::now() + Duration::from_millis(120);
        let mut asked = 0;
        let timed_out = readable(&ours, soon, &mut || {
            asked += 1;
            true
        });
        assert_eq!(timed_out.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(asked >= 1, "somebody was asked meanwhile");

        let far = Instant::now() + Duration::from_secs(60);
        let refused = readable(&ours, far, &mut || false);
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::Interrupted);
        drop(theirs);
        readable(&ours, far, &mut || panic!("the end is there already")).unwrap();
    }

    #[test]
    fn a_tail_is_the_end_of_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        fs::write(&log, "a\nb\nc\n").unwrap();
        assert!(tail(&log, 2).ends_with("(last 2 of 3 lines)\nb\nc\n"));
        assert!(tail(&log, 9).ends_with("(last 3 of 3 lines)\na\nb\nc\n"));
        assert!(tail(&dir.path().join("none"), 2).ends_with("(last 0 of 0 lines)\n\n"));
    }
}
