//! What the kernel says about a process: processor time, memory, descriptors, wake-ups.

use std::fs;
use std::time::Duration;

/// Processor time that all threads of a process have taken so far, from /proc/PID/task/TID/schedstat: in nanoseconds, where
/// `stat` counts in ticks of 10 ms. Threads that have ended count no more, so compare only while none ends.
pub fn cpu(pid: u32) -> Duration {
    Duration::from_nanos(sum_of_tasks(pid, |task| {
        first_number(&format!("{task}/schedstat"))
    }))
}

/// What this thread has taken so far.
pub fn cpu_of_this_thread() -> Duration {
    Duration::from_nanos(first_number("/proc/thread-self/schedstat"))
}

/// How often threads of a process went to sleep so far, which is how often they were woken.
pub fn sleeps(pid: u32) -> u64 {
    sum_of_tasks(pid, |task| {
        status(&format!("{task}/status"), "voluntary_ctxt_switches:")
    })
}

/// Anonymous memory in bytes: what the process allocated, without binary, libraries and guests.
pub fn memory(pid: u32) -> u64 {
    status(&format!("/proc/{pid}/status"), "RssAnon:") * 1024
}

/// Open descriptors.
pub fn descriptors(pid: u32) -> u64 {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |dir| dir.count() as u64)
}

fn sum_of_tasks(pid: u32, of: impl Fn(&str) -> u64) -> u64 {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return 0;
    };
    tasks
        .flatten()
        .map(|task| of(&task.path().display().to_string()))
        .sum()
}

fn first_number(path: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split(' ')
        .next()
        .and_then(|word| word.trim().parse().ok())
        .unwrap_or(0)
}

fn status(path: &str, field: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}
