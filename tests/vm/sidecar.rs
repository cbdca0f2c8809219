//! One run of the real binary.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// A running sidecar with an admin server on a unix socket; dropping it kills it.
pub struct Sidecar {
    child: Child,
    admin: PathBuf,
    log: PathBuf,
}

impl Sidecar {
    /// Starts the binary with a configuration whose `admin` section is added here, and waits until it has started.
    pub fn start(dir: &Path, configuration: &str) -> Sidecar {
        let (file, admin, log) = (
            dir.join("sidecar.yaml"),
            dir.join("admin.sock"),
            dir.join("sidecar.log"),
        );
        let head = format!("admin:\n  listen: [\"unix://{}\"]\n", admin.display());
        fs::write(&file, head + configuration).unwrap();
        let output = OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let mut command = super::qemu::die_with_us(binary());
        command.arg("run").arg("--config").arg(&file);
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output);
        let child = command.spawn().unwrap();
        let mut sidecar = Sidecar { child, admin, log };
        super::wait_until(
            "the sidecar answers /startupz with 200",
            Duration::from_secs(10),
            || {
                if let Some(status) = sidecar.child.try_wait().unwrap() {
                    panic!("the sidecar ended with {status}\n{}", sidecar.log_tail());
                }
                matches!(sidecar.get("/startupz"), Ok((200, _)))
            },
        );
        sidecar
    }

    /// A request to the admin server: status and body.
    pub fn get(&self, path: &str) -> io::Result<(u16, String)> {
        let mut stream = UnixStream::connect(&self.admin)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: sidecar\r\nConnection: close\r\n\r\n"
        )?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        let status = response.split(' ').nth(1).and_then(|word| word.parse().ok());
        let body = response.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
        status
            .zip(body)
            .ok_or_else(|| io::Error::other(format!("no HTTP response: {response:?}")))
    }

    /// The sum of the samples of a metric family which have all these labels.
    pub fn metric(&self, family: &str, labels: &[(&str, &str)]) -> f64 {
        let (status, text) = self.get("/metrics").unwrap();
        assert_eq!(status, 200, "GET /metrics");
        let samples = text.lines().filter(|line| {
            let rest = line.strip_prefix(family).unwrap_or_default();
            (rest.starts_with('{') || rest.starts_with(' '))
                && labels
                    .iter()
                    .all(|(name, value)| rest.contains(&format!("{name}=\"{value}\"")))
        });
        samples
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// Everything that was logged.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The end of the log, for a failure's report.
    pub fn log_tail(&self) -> String {
        super::tail(&self.log, 40)
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }

    /// The exit status, when the process ends in time.
    pub fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        super::wait_for_end(&mut self.child, patience)
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            return;
        }
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let refused = log
            .lines()
            .find(|line| line.contains("refused by the seccomp filter"));
        assert_eq!(refused, None, "the list of system calls is short of one");
    }
}

/// The binary under test: this package's, or the one named by the environment, such as a release build.
fn binary() -> OsString {
    std::env::var_os("VSOCK_SIDECAR_BINARY").unwrap_or_else(|| env!("CARGO_BIN_EXE_vsock-sidecar").into())
}
