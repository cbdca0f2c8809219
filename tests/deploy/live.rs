//! A sidecar with traffic, what it exports, and a Prometheus that scrapes it.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;
use vsock_sidecar::embedded_guest::Sockets;
use vsock_sidecar::metrics::WebhookRegistry;

use crate::expressions::Page;
use crate::support::{LONG, Sidecar, echo, free_port, linux, serve, until};
use crate::tools::IMAGE_TOOLS;

/// A sidecar whose guest has had a connection each way, one refused and one whose target is not there.
pub struct Busy {
    pub sidecar: Sidecar,
    pub port: u16,
    guest: Sockets,
}

impl Busy {
    pub fn start() -> Busy {
        let (port, nobody) = (free_port(), free_port());
        let service = serve(echo);
        let sidecar = Sidecar::start(&format!(
            "admin: {{listen: [\"unix://{{dir}}/admin.sock\", \"tcp://127.0.0.1:{port}\"]}}\n\
             guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
             outbound:\n  - {{name: echo, port: 7, to: \"tcp://127.0.0.1:{service}\"}}\n  \
             - {{name: gone, port: 8, to: \"tcp://127.0.0.1:{nobody}\"}}\n  \
             inbound: [{{name: mux, listen: \"unix://{{dir}}/mux.sock\", protocol: connect}}]\n"
        ));
        let guest = linux(&sidecar.path("web.sock"));
        let busy = Busy { sidecar, port, guest };
        busy.talk();
        busy
    }

    fn talk(&self) {
        let stream = self.guest.connect(7).unwrap();
        stream.set_read_timeout(Some(LONG));
        (&stream).write_all(b"there and back").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        (&stream).read_to_end(&mut back).unwrap();
        assert_eq!(back, b"there and back");
        assert!(self.guest.connect(8).is_err());
        assert!(self.guest.connect(9).is_err());

        let listener = self.guest.listen(22).unwrap();
        let mut client = UnixStream::connect(self.sidecar.path("mux.sock")).unwrap();
        client.write_all(b"CONNECT 22\n").unwrap();
        let server = listener.accept_timeout(LONG).unwrap();
        drop(server);
        client.set_read_timeout(Some(LONG)).unwrap();
        client.read_to_end(&mut Vec::new()).unwrap();
    }
}

/// What is exported: by a sidecar, and by the webhook, which has all of its series from the start.
pub fn page() -> &'static Page {
    static PAGE: OnceLock<Page> = OnceLock::new();
    PAGE.get_or_init(|| {
        let busy = Busy::start();
        let webhook = WebhookRegistry::new().unwrap().encode().unwrap();
        Page::read(&(busy.sidecar.get("/metrics") + &webhook))
    })
}

/// A Prometheus that ends with the test.
pub struct Prometheus {
    child: Child,
    address: SocketAddr,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Prometheus {
    /// Scrapes this port of this machine four times a second, as a job of a plain host, and evaluates the alert rules.
    pub fn start(dir: &Path, port: u16, rules: &Path) -> Prometheus {
        let config = dir.join("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 250ms}}\n\
             rule_files: ['{}']\n\
             scrape_configs:\n- job_name: vsock\n  static_configs: [{{targets: ['127.0.0.1:{port}']}}]\n",
            rules.display()
        );
        fs::write(&config, text).unwrap();
        // It takes no port 0; one that was free a moment ago does.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .unwrap()
            .local_addr()
            .unwrap();
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(fs::File::create(dir.join("log")).unwrap())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run prometheus: {error}; install it with: {IMAGE_TOOLS}"));
        Prometheus { child, address }
    }

    /// A path of its HTTP API; `None` while it does not answer.
    pub fn get(&self, path: &str) -> Option<Value> {
        let mut stream = TcpStream::connect(self.address).ok()?;
        stream.set_read_timeout(Some(LONG)).ok()?;
        // 1.0, so that the body is neither chunked nor kept open.
        write!(stream, "GET {path} HTTP/1.0\r\nhost: x\r\n\r\n").ok()?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply).ok()?;
        serde_json::from_str(reply.split_once("\r\n\r\n")?.1).ok()
    }

    /// The answer to an instant query.
    #[track_caller]
    pub fn query(&self, query: &str) -> Vec<Value> {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let mut answer = Value::Null;
        until("Prometheus answers", || {
            answer = self
                .get(&format!("/api/v1/query?query={encoded}"))
                .unwrap_or_default();
            answer != Value::Null
        });
        assert_eq!(answer["status"], "success", "{query}: {answer}");
        answer["data"]["result"].as_array().unwrap().clone()
    }
}
