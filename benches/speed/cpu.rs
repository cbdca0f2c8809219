//! Processor time, from /proc/PID/task/TID/schedstat: in nanoseconds, where `stat` counts in ticks of 10 ms.

use std::fs;
use std::time::Duration;

/// What all threads of a process have taken so far. Those that have ended count no more, so compare only while none ends.
pub fn of_process(pid: u32) -> Duration {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Duration::ZERO;
    };
    let nanos = tasks
        .flatten()
        .map(|task| nanos(&format!("{}/schedstat", task.path().display())))
        .sum();
    Duration::from_nanos(nanos)
}

/// What this thread has taken so far.
pub fn of_this_thread() -> Duration {
    Duration::from_nanos(nanos("/proc/thread-self/schedstat"))
}

fn nanos(path: &str) -> u64 {
    fs::read_to_string(path)
        .ok()
        .and_then(|text| text.split(' ').next()?.parse().ok())
        .unwrap_or(0)
}
