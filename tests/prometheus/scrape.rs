//! A real Prometheus scrapes the admin server over TCP, and its own HTTP API says what it thinks of it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use vsock_sidecar::admin::{Admin, AdminServer, Answer, Check, Readiness, Source};
use vsock_sidecar::config::ListenAddress;
use vsock_sidecar::drain::Drain;
use vsock_sidecar::metrics::Registry;

use crate::missing;
use crate::page::populated;

const LONG: Duration = Duration::from_secs(60);

struct Exporter(Registry);

impl Source for Exporter {
    fn metrics(&self) -> Result<String, String> {
        self.0.encode().map_err(|error| error.to_string())
    }

    fn state(&self) -> Answer<'_, Value> {
        Box::pin(async { Value::Null })
    }

    fn live(&self) -> Answer<'_, Vec<Check>> {
        Box::pin(async { Vec::new() })
    }
}

/// A process that ends with the test.
struct Prometheus {
    child: Child,
    address: SocketAddr,
    log: std::path::PathBuf,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Prometheus {
    /// `None` if it is not installed.
    fn start(dir: &std::path::Path, target: SocketAddr) -> Option<Prometheus> {
        let config = dir.join("prometheus.yml");
        let scrape = format!(
            "global: {{scrape_interval: 250ms, scrape_timeout: 250ms}}\n\
             scrape_configs:\n- job_name: sidecar\n  static_configs: [{{targets: ['{target}']}}]\n"
        );
        std::fs::write(&config, scrape).unwrap();
        // It takes no port 0; one that was free a moment ago does.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .unwrap()
            .local_addr()
            .unwrap();
        let log = dir.join("log");
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn();
        match child {
            Ok(child) => Some(Prometheus { child, address, log }),
            Err(error) => {
                missing("prometheus", "prometheus", &error);
                None
            }
        }
    }

    /// The result of an instant query; `None` while the server does not answer.
    fn query(&self, query: &str) -> Option<Vec<Value>> {
        self.get(&format!("/api/v1/query?query={query}"))?["data"]["result"]
            .as_array()
            .cloned()
    }

    fn get(&self, path: &str) -> Option<Value> {
        let mut stream = TcpStream::connect(self.address).ok()?;
        stream.set_read_timeout(Some(LONG)).ok()?;
        // 1.0, so that the body is neither chunked nor kept open.
        write!(stream, "GET {path} HTTP/1.0\r\nhost: x\r\n\r\n").ok()?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply).ok()?;
        serde_json::from_str(reply.split_once("\r\n\r\n")?.1).ok()
    }

    /// Asks until the answer is there, and fails with what Prometheus says of its target.
    fn until<T>(&mut self, what: &str, mut ask: impl FnMut(&Prometheus) -> Option<T>) -> T {
        let deadline = Instant::now() + LONG;
        loop {
            if let Some(answer) = ask(self) {
                return answer;
            }
            let log = || std::fs::read_to_string(&self.log).unwrap_or_default();
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("prometheus ended with {status}:\n{}", log());
            }
            if Instant::now() >= deadline {
                panic!(
                    "{what}: not within {LONG:?}; targets: {:?}\n{}",
                    self.get("/api/v1/targets"),
                    log()
                );
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The value of a query's only series.
fn only(result: Option<Vec<Value>>) -> Option<f64> {
    match result?.as_slice() {
        [series] => series["value"][1].as_str()?.parse().ok(),
        _ => None,
    }
}

#[test]
fn a_real_prometheus_scrapes_us() {
    let server = AdminServer::bind(&[ListenAddress::Tcp((Ipv4Addr::LOCALHOST, 0).into())]).unwrap();
    let ListenAddress::Tcp(target) = server.addresses()[0] else {
        panic!("bound to TCP")
    };
    let drain = Drain::new();
    let admin = Admin {
        source: Arc::new(Exporter(populated())),
        startup: Readiness::new(),
        ready: Readiness::new(),
        drain: drain.watch(),
    };
    let _handle = server.spawn(admin).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let Some(mut prometheus) = Prometheus::start(dir.path(), target) else {
        return;
    };

    let up = "up%7Bjob%3D%22sidecar%22%7D";
    prometheus.until("up is 1", |prometheus| {
        (only(prometheus.query(up))? == 1.0).then_some(())
    });
    // A query sees a scrape when it is committed, a moment after the target is known to be up.
    let ingested = prometheus.until("all series are there", |prometheus| {
        only(prometheus.query("scrape_samples_scraped"))
    });
    let lines = populated()
        .encode()
        .unwrap()
        .lines()
        .filter(|line| !line.starts_with('#'))
        .count();
    assert_eq!(ingested as usize, lines, "every line is a sample");

    let rows = [
        ("vsock_session_state{state=\"running\"}", 1.0),
        ("vsock_virtio_feature_acked{feature=\"version_1\"}", 1.0),
        (
            "vsock_connections_refused_total{reason=\"no_rule\",rule=\"\"}",
            1.0,
        ),
        ("vsock_tcp_dial_duration_seconds_count{rule=\"db\"}", 1.0),
        (
            "histogram_quantile(1, vsock_tcp_dial_duration_seconds_bucket)",
            0.005,
        ),
    ];
    for (query, expected) in rows {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let value = prometheus.until(query, |prometheus| only(prometheus.query(&encoded)));
        assert_eq!(value, expected, "{query}");
    }

    // It knows the types from our TYPE lines, and thinks nothing of the page is wrong.
    let metadata = prometheus
        .get("/api/v1/metadata?metric=vsock_packets_total")
        .unwrap();
    assert_eq!(
        metadata["data"]["vsock_packets_total"][0]["type"], "counter",
        "{metadata}"
    );
    let targets = prometheus.get("/api/v1/targets").unwrap();
    assert_eq!(targets["data"]["activeTargets"][0]["lastError"], "", "{targets}");
}
