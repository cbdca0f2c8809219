//! The `process_*` families that every Prometheus client exports, under their standard names.
//!
//! Written here rather than taken from the `prometheus` crate for two reasons: its `process_cpu_seconds_total`
//! counts whole seconds, so that the rate of a sidecar at a few percent is a comb; and it opens and lists
//! `/proc/self/fd` at each scrape, which is not free with 100,000 connections.

use std::fs;
use std::os::unix::fs::MetadataExt;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

use super::page::{Family, Page, counter, gauge};

static CPU: Family = counter(
    "process_cpu_seconds_total",
    &[],
    "User and system CPU time spent, in seconds.",
);
static RESIDENT: Family = gauge(
    "process_resident_memory_bytes",
    &[],
    "Resident memory in bytes; pages of guest memory that the sidecar has touched are part of it.",
);
static VIRTUAL: Family = gauge(
    "process_virtual_memory_bytes",
    &[],
    "Virtual memory in bytes, mapped guest memory included.",
);
static OPEN_FDS: Family = gauge("process_open_fds", &[], "Open file descriptors.");
static MAX_FDS: Family = gauge(
    "process_max_fds",
    &[],
    "File descriptors the process may open (RLIMIT_NOFILE).",
);
static START: Family = gauge(
    "process_start_time_seconds",
    &[],
    "Unix time at which the process began.",
);
static THREADS: Family = gauge("process_threads", &[], "Threads of the process.");

static FAMILIES: [&Family; 7] = [&CPU, &RESIDENT, &VIRTUAL, &OPEN_FDS, &MAX_FDS, &START, &THREADS];

/// Reads `/proc/self` when asked.
pub(super) struct Process {
    descs: Vec<Desc>,
    /// Unix time of the machine's start in seconds; `None` where `/proc/stat` cannot be read.
    boot_time: Option<f64>,
}

impl Process {
    pub(super) fn register(to: &prometheus::Registry) -> prometheus::Result<()> {
        let descs = FAMILIES.into_iter().map(Family::desc).collect::<Result<_, _>>()?;
        let boot_time = fs::read_to_string("/proc/stat")
            .ok()
            .and_then(|text| boot_time(&text));
        to.register(Box::new(Process { descs, boot_time }))
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    /// What cannot be read is left out: no value is better than a wrong one.
    fn collect(&self) -> Vec<MetricFamily> {
        let mut page = Page::default();
        if let Some(stat) = fs::read_to_string("/proc/self/stat")
            .ok()
            .and_then(|text| Stat::parse(&text))
        {
            let ticks = rustix::param::clock_ticks_per_second() as f64;
            page.push(&CPU, &[], stat.cpu_ticks as f64 / ticks);
            page.push(
                &RESIDENT,
                &[],
                stat.resident_pages as f64 * rustix::param::page_size() as f64,
            );
            page.push(&VIRTUAL, &[], stat.virtual_bytes as f64);
            page.push(&THREADS, &[], stat.threads as f64);
            if let Some(boot_time) = self.boot_time {
                page.push(&START, &[], boot_time + stat.start_ticks as f64 / ticks);
            }
        }
        if let Some(open) = open_descriptors() {
            page.push(&OPEN_FDS, &[], open as f64);
        }
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        page.push(&MAX_FDS, &[], limit.map_or(f64::INFINITY, |max| max as f64));
        page.finish()
    }
}

/// The fields of `/proc/self/stat` that are exported; see proc_pid_stat(5).
#[derive(PartialEq, Eq, Debug)]
struct Stat {
    /// User and system time (14, 15).
    cpu_ticks: u64,
    /// 20.
    threads: u64,
    /// Since the machine's start (22).
    start_ticks: u64,
    /// 23.
    virtual_bytes: u64,
    /// 24.
    resident_pages: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Stat> {
        // The second field is the command in parentheses and may hold spaces and parentheses of its own.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Stat {
            cpu_ticks: field(14)? + field(15)?,
            threads: field(20)?,
            start_ticks: field(22)?,
            virtual_bytes: field(23)?,
            resident_pages: field(24)?,
        })
    }
}

/// `btime` of `/proc/stat`.
fn boot_time(text: &str) -> Option<f64> {
    text.lines()
        .find_map(|line| line.strip_prefix("btime "))?
        .trim()
        .parse()
        .ok()
}

/// How many descriptors this process has open; `None` without /proc.
///
/// Since Linux 6.2 the size of `/proc/self/fd` is the number of descriptors (fs/proc/fd.c); before it is 0.
pub fn open_descriptors() -> Option<u64> {
    match fs::metadata("/proc/self/fd").ok()?.size() {
        // Minus the descriptor that the listing itself needs.
        0 => Some((fs::read_dir("/proc/self/fd").ok()?.count() as u64).saturating_sub(1)),
        open => Some(open),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_a_parenthesis_and_spaces_does_not_shift_the_fields() {
        let text = "42 (vs) side (car) S 1 42 42 0 -1 4194304 100 0 0 0 700 300 0 0 20 0 3 0 12345 1048576 256 \
                    18446744073709551615 0 0 0 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0\n";
        let stat = Stat::parse(text).unwrap();
        let expected = Stat {
            cpu_ticks: 1000,
            threads: 3,
            start_ticks: 12345,
            virtual_bytes: 1048576,
            resident_pages: 256,
        };
        assert_eq!(stat, expected);
        assert_eq!(Stat::parse("42 (short) S 1"), None);
        assert_eq!(Stat::parse(""), None);
    }

    #[test]
    fn the_machines_start_is_found_among_the_other_lines() {
        assert_eq!(
            boot_time("cpu 1 2 3\nbtime 1700000000\nprocesses 9\n"),
            Some(1_700_000_000.0)
        );
        assert_eq!(boot_time("cpu 1 2 3\n"), None);
    }

    #[test]
    fn an_opened_file_is_one_more_descriptor() {
        // Other tests of this process open and close files at the same time: enough files to drown them.
        let before = open_descriptors().unwrap();
        let files: Vec<_> = (0..200).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let after = open_descriptors().unwrap();
        assert!(
            after >= before + 100,
            "{before} descriptors before and {after} after {} more",
            files.len()
        );
    }
}
