//! The binary as a process.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{LONG, until};

/// A running sidecar in a directory of its own. Dropping it kills it, and fails the test if it had panicked, or had
/// made a system call that its own filter refuses.
pub struct Sidecar {
    child: Child,
    dir: tempfile::TempDir,
}

impl Sidecar {
    /// Starts the binary with this configuration, in which `{dir}` stands for its directory, and waits until it has
    /// started. The admin server (unix) and the log (JSON, level debug) are set up here.
    #[track_caller]
    pub fn start(configuration: &str) -> Sidecar {
        Sidecar::start_in(tempfile::tempdir().unwrap(), configuration)
    }

    #[track_caller]
    pub fn start_in(dir: tempfile::TempDir, configuration: &str) -> Sidecar {
        let sidecar = Sidecar::spawn(dir, configuration);
        sidecar.started()
    }

    /// The same in a process that may have so many descriptors open.
    #[track_caller]
    pub fn start_with_descriptors(most: usize, configuration: &str) -> Sidecar {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit -n {most}; exec \"$0\" \"$@\"")]);
        command.arg(env!("CARGO_BIN_EXE_vsock-sidecar"));
        Sidecar::spawn_by(command, tempfile::tempdir().unwrap(), configuration).started()
    }

    fn spawn(dir: tempfile::TempDir, configuration: &str) -> Sidecar {
        Sidecar::spawn_by(
            Command::new(env!("CARGO_BIN_EXE_vsock-sidecar")),
            dir,
            configuration,
        )
    }

    fn spawn_by(mut command: Command, dir: tempfile::TempDir, configuration: &str) -> Sidecar {
        let file = dir.path().join("sidecar.yaml");
        // A test may have put a link there.
        if !file.exists() {
            fs::write(&file, text(dir.path(), configuration)).unwrap();
        }
        let output = File::create(dir.path().join("sidecar.log")).unwrap();
        let child = command
            .args(["run", "--config"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        Sidecar { child, dir }
    }

    #[track_caller]
    fn started(mut self) -> Sidecar {
        until("the sidecar answers /startupz with 200", || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the sidecar ended with {status}\n{}", self.log());
            }
            matches!(self.try_get("/startupz"), Some((200, _)))
        });
        self
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A request to the admin server; `None` if nobody answers.
    pub fn try_get(&self, path: &str) -> Option<(u16, String)> {
        let mut stream = UnixStream::connect(self.path("admin.sock")).ok()?;
        stream.set_read_timeout(Some(LONG)).ok()?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: sidecar\r\nConnection: close\r\n\r\n"
        )
        .ok()?;
        let mut response = String::new();
        stream.read_to_string(&mut response).ok()?;
        let status = response.split(' ').nth(1)?.parse().ok()?;
        Some((status, response.split_once("\r\n\r\n")?.1.to_owned()))
    }

    /// A POST to the admin server: status and body.
    #[track_caller]
    pub fn post(&self, path: &str) -> (u16, String) {
        let mut stream = UnixStream::connect(self.path("admin.sock")).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nHost: sidecar\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        let status = response.split(' ').nth(1).unwrap().parse().unwrap();
        (status, response.split_once("\r\n\r\n").unwrap().1.to_owned())
    }

    /// The file as the sidecar would have been started with this configuration.
    pub fn file_with(&self, configuration: &str) -> String {
        text(self.dir.path(), configuration)
    }

    /// Another configuration in the file's place, by rename.
    pub fn rewrite(&self, configuration: &str) {
        let next = self.path("next.yaml");
        fs::write(&next, self.file_with(configuration)).unwrap();
        fs::rename(next, self.path("sidecar.yaml")).unwrap();
    }

    /// Another configuration, in use when this returns: what changed, as the sidecar says it.
    #[track_caller]
    pub fn reload(&self, configuration: &str) -> String {
        self.rewrite(configuration);
        let (status, said) = self.post("/-/reload");
        assert_eq!(status, 200, "{said}\n{}", self.log_tail());
        said
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The body of a page that must be there.
    #[track_caller]
    pub fn get(&self, path: &str) -> String {
        let (status, body) = self.try_get(path).expect("the admin server answers");
        assert_eq!(status, 200, "GET {path}: {body}");
        body
    }

    /// The sum of the samples of a family which have all these labels, of which there must be one.
    #[track_caller]
    pub fn metric(&self, family: &str, labels: &[(&str, &str)]) -> f64 {
        let page = self.get("/metrics");
        samples(&page, family, labels)
            .unwrap_or_else(|| panic!("no sample of {family} with {labels:?} in\n{page}"))
    }

    /// Waits until a metric has a value.
    #[track_caller]
    pub fn until_metric(&self, family: &str, labels: &[(&str, &str)], value: f64) {
        let mut last = f64::NAN;
        let deadline = Instant::now() + LONG;
        while last != value {
            assert!(
                Instant::now() < deadline,
                "{family} {labels:?} is {last} and not {value}\n{}",
                self.log_tail()
            );
            last = self.metric(family, labels);
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    /// `/state`.
    #[track_caller]
    pub fn state(&self) -> Value {
        serde_json::from_str(&self.get("/state")).expect("/state is JSON")
    }

    /// Everything that was logged.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.path("sidecar.log")).unwrap_or_default()).into_owned()
    }

    /// The end of the log, for a failure's report.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// The events of the log with this message so far, fields included. An event is written a little later than what it tells of
    /// happens, so this is for a sidecar that has ended, and for what should not be there: see [`Self::logged`].
    pub fn events(&self, message: &str) -> Vec<Value> {
        let log = self.log();
        let events = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        events
            .filter(|event| field(event, "message") == message)
            .collect()
    }

    /// The events with this message, as soon as one of them is `wanted`.
    #[track_caller]
    pub fn logged(&self, message: &str, wanted: impl Fn(&Value) -> bool) -> Vec<Value> {
        until(&format!("the log says that {message}"), || {
            self.events(message).iter().any(&wanted)
        });
        self.events(message)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// User and system time spent so far.
    pub fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        // Behind the command's name, which may hold blanks: state is field 3, utime 14, stime 15.
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
    }

    /// Anonymous memory in bytes: what it allocated, without mapped guests, binary and libraries.
    pub fn anonymous_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// Open descriptors.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Threads.
    pub fn threads(&self) -> usize {
        fs::read_dir(format!("/proc/{}/task", self.pid()))
            .unwrap()
            .count()
    }

    pub fn terminate(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }

    /// SIGKILL; its directory stays.
    pub fn kill(mut self) -> tempfile::TempDir {
        let _ = self.child.kill();
        let _ = self.child.wait();
        std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap())
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// The exit status, which must come within `patience`.
    #[track_caller]
    pub fn wait(&mut self, patience: Duration) -> ExitStatus {
        wait(&mut self.child, patience)
            .unwrap_or_else(|| panic!("still running after {patience:?}\n{}", self.log_tail()))
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let log = self.log();
        if std::thread::panicking() {
            eprintln!("--- the sidecar's log:\n{}", self.log_tail());
        } else if let Some(line) = log.lines().find(|line| line.contains("panicked at")) {
            panic!("the sidecar panicked: {line}");
        } else if let Some(line) = log
            .lines()
            .find(|line| line.contains("refused by the seccomp filter"))
        {
            panic!("the list of system calls is short of one: {line}");
        }
    }
}

/// Runs the binary with a configuration that it should refuse: exit code, stderr.
#[track_caller]
pub fn run_to_end(file: &Path) -> (Option<i32>, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"))
        .args(["run", "--config"])
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let Some(status) = wait(&mut child, LONG) else {
        let _ = child.kill();
        let _ = child.wait();
        panic!("the sidecar runs with a configuration that it should refuse");
    };
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (status.code(), said)
}

/// A field of a log event, wherever the format puts it; empty if there is none.
pub fn field(event: &Value, name: &str) -> String {
    let value = event.get(name).or_else(|| event.get("fields")?.get(name));
    match value {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    }
}

/// The sum of samples of a page; `None` if there is none.
pub fn samples(page: &str, family: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let mut found = None;
    for line in page.lines() {
        let Some(rest) = line.strip_prefix(family) else {
            continue;
        };
        if !rest.starts_with(['{', ' '])
            || !labels.iter().all(|(name, value)| {
                rest.contains(&format!("{{{name}=\"{value}\""))
                    || rest.contains(&format!(",{name}=\"{value}\""))
            })
        {
            continue;
        }
        let value: f64 = line.rsplit(' ').next().unwrap_or_default().parse().unwrap();
        found = Some(found.unwrap_or(0.0) + value);
    }
    found
}

/// The text of a configuration: with an admin server and a log, unless it has them.
fn text(dir: &Path, configuration: &str) -> String {
    let head = if configuration.contains("admin:") {
        String::new()
    } else {
        format!(
            "admin: {{listen: [\"unix://{}\"]}}\n",
            dir.join("admin.sock").display()
        )
    };
    let log = if configuration.contains("log:") {
        ""
    } else {
        "log: {format: json, level: debug}\n"
    };
    head + log + &configuration.replace("{dir}", &dir.display().to_string())
}

fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}
