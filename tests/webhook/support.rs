//! Recorded requests, certificates as Kubernetes mounts them, the program, and a client like the API server.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use vsock_sidecar::webhook::Settings;

pub(crate) const IMAGE: &str = "registry.example/vsock-sidecar:0.1.0";
/// The name by which an API server knows a Service.
const NAME: &str = "vsock-sidecar-webhook.vsock-sidecar.svc";
/// Longer than anything here takes.
pub(crate) const LONG: Duration = Duration::from_secs(60);

fn here(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/webhook")
        .join(name)
}

pub(crate) fn request(name: &str) -> Value {
    let text = fs::read_to_string(here(&format!("requests/{name}.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

pub(crate) fn settings() -> Settings {
    Settings::new(IMAGE).unwrap()
}

/// Applies a JSON patch by somebody else's hand.
pub(crate) fn apply(pod: &Value, operations: &Value) -> Value {
    let patch: json_patch::Patch = serde_json::from_value(operations.clone()).unwrap();
    let mut pod = pod.clone();
    json_patch::patch(&mut pod, &patch).unwrap();
    pod
}

/// Compares a pod with what is written down.
#[track_caller]
pub(crate) fn expect(name: &str, pod: &Value) {
    let file = here(&format!("golden/{name}.json"));
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(&file, format!("{pod:#}\n")).unwrap();
    }
    let expected: Value =
        serde_json::from_str(&fs::read_to_string(&file).unwrap_or_default()).unwrap_or_default();
    assert_eq!(
        format!("{pod:#}"),
        format!("{expected:#}"),
        "{} differs",
        file.display()
    );
}

/// Bytes of base64 with padding.
pub(crate) fn decoded(base64: &str) -> Vec<u8> {
    const ALPHABET: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    assert_eq!(base64.len() % 4, 0);
    let (mut bytes, mut bits, mut held) = (Vec::new(), 0_u32, 0);
    for digit in base64.trim_end_matches('=').chars() {
        bits = bits << 6 | ALPHABET.find(digit).unwrap() as u32;
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    bytes
}

/// Who signs the certificates that the client trusts.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, both as PEM.
#[derive(Clone)]
pub(crate) struct Pair {
    pub(crate) certificate: String,
    pub(crate) key: String,
    der: Vec<u8>,
}

impl Authority {
    pub(crate) fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// A new certificate for the server, until the beginning of `year`.
    pub(crate) fn issue(&self, year: i32) -> Pair {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![NAME.to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Pair {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            der: certificate.der().to_vec(),
        }
    }

    fn client(&self) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Arc::new(config)
    }
}

/// A volume as the kubelet makes them of a Secret: its files are links through `..data`, a link to a directory.
pub(crate) struct Volume {
    dir: tempfile::TempDir,
    versions: u32,
}

impl Volume {
    pub(crate) fn new(pair: &Pair) -> Volume {
        let mut volume = Volume {
            dir: tempfile::tempdir().unwrap(),
            versions: 0,
        };
        volume.swap(&pair.certificate, &pair.key);
        for file in ["tls.crt", "tls.key"] {
            symlink(Path::new("..data").join(file), volume.file(file)).unwrap();
        }
        volume
    }

    pub(crate) fn swap(&mut self, certificate: &str, key: &str) {
        self.versions += 1;
        let name = format!("..version-{}", self.versions);
        let directory = self.file(&name);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("tls.crt"), certificate).unwrap();
        fs::write(directory.join("tls.key"), key).unwrap();
        let link = self.file("..data_tmp");
        symlink(&name, &link).unwrap();
        fs::rename(&link, self.file("..data")).unwrap();
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// The running program.
pub(crate) struct Webhook {
    child: Child,
    pub(crate) address: SocketAddr,
    metrics: SocketAddr,
    client: Arc<ClientConfig>,
    pub(crate) authority: Authority,
    pub(crate) volume: Volume,
    /// Lines of the log so far.
    log: Arc<Mutex<Vec<Value>>>,
}

impl Webhook {
    pub(crate) fn start(arguments: &[&str]) -> Webhook {
        let authority = Authority::new();
        let volume = Volume::new(&authority.issue(2050));
        let mut child = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"))
            .args([
                "webhook",
                "--listen",
                "127.0.0.1:0",
                "--metrics",
                "127.0.0.1:0",
                "--image",
                IMAGE,
            ])
            .args(["--log-format", "json"])
            .arg("--certificate")
            .arg(volume.file("tls.crt"))
            .arg("--key")
            .arg(volume.file("tls.key"))
            .args(arguments)
            .env_remove("VSOCK_SIDECAR_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let serves = follow(child.stderr.take().unwrap(), log.clone());
        let Ok(event) = serves.recv_timeout(LONG) else {
            panic!("it does not serve: {:?}", log.lock().unwrap());
        };
        let address = |key: &str| event[key].as_str().unwrap().parse().unwrap();
        Webhook {
            address: address("address"),
            metrics: address("metrics"),
            client: authority.client(),
            authority,
            volume,
            child,
            log,
        }
    }

    pub(crate) fn connect(&self) -> io::Result<Client> {
        self.connect_as(&self.client)
    }

    /// A client that knows nothing of our authority.
    pub(crate) fn connect_as_stranger(&self) -> io::Result<Client> {
        self.connect_as(&Authority::new().client())
    }

    fn connect_as(&self, config: &Arc<ClientConfig>) -> io::Result<Client> {
        let name = ServerName::try_from(NAME).unwrap();
        let mut tls = ClientConnection::new(config.clone(), name).unwrap();
        let mut tcp = TcpStream::connect(self.address)?;
        tcp.set_read_timeout(Some(LONG))?;
        tcp.set_nodelay(true)?;
        while tls.is_handshaking() {
            tls.complete_io(&mut tcp)?;
        }
        Ok(Client(StreamOwned::new(tls, tcp)))
    }

    /// The page of /metrics.
    pub(crate) fn scrape(&self) -> String {
        let mut stream = TcpStream::connect(self.metrics).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
            .unwrap();
        let (status, body) = read_response(&mut stream).unwrap();
        assert_eq!(status, 200);
        body
    }

    pub(crate) fn metric(&self, series: &str) -> f64 {
        let page = self.scrape();
        let line = page
            .lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {series} in\n{page}"))
            .parse()
            .unwrap()
    }

    /// Waits until a series has a value.
    #[track_caller]
    pub(crate) fn wait_for(&self, series: &str, value: f64) {
        until(&format!("{series} is {value}"), || self.metric(series) == value);
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// A line of /proc/PID/status.
    pub(crate) fn status(&self, name: &str) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid().as_raw_nonzero())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name}")).trim().to_owned()
    }

    /// The most memory that it has had, in bytes.
    pub(crate) fn peak_memory(&self) -> u64 {
        let peak = self.status("VmHWM:");
        let kibibytes: u64 = peak.trim_end_matches(" kB").parse().unwrap();
        kibibytes << 10
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for its end.
    pub(crate) fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LONG;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Events of the log with this message.
    pub(crate) fn events(&self, message: &str) -> Vec<Value> {
        let log = self.log.lock().unwrap();
        log.iter()
            .filter(|event| event["message"] == message)
            .cloned()
            .collect()
    }
}

impl Drop for Webhook {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Collects the log, and hands over the event that says where it serves.
fn follow(stderr: impl Read + Send + 'static, log: Arc<Mutex<Vec<Value>>>) -> Receiver<Value> {
    let (serves, served) = channel();
    thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            let event: Value = serde_json::from_str(&line).unwrap_or(Value::String(line));
            if event["message"] == "the webhook serves" {
                let _ = serves.send(event.clone());
            }
            log.lock().unwrap().push(event);
        }
    });
    served
}

/// Waits for a condition.
#[track_caller]
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A TLS connection.
pub(crate) struct Client(pub(crate) StreamOwned<ClientConnection, TcpStream>);

impl Client {
    /// Whether the server has shown this certificate.
    pub(crate) fn was_shown(&self, pair: &Pair) -> bool {
        self.0.conn.peer_certificates().unwrap()[0].as_ref() == pair.der.as_slice()
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)?;
        self.0.flush()
    }

    pub(crate) fn response(&mut self) -> io::Result<(u16, String)> {
        read_response(&mut self.0)
    }

    /// One request and its response.
    pub(crate) fn ask(&mut self, head: &str, body: &[u8]) -> io::Result<(u16, String)> {
        let head = format!(
            "{head} HTTP/1.1\r\nhost: {NAME}\r\ncontent-length: {}\r\n",
            body.len()
        );
        let json = "content-type: application/json\r\n\r\n";
        self.send(&[head.as_bytes(), json.as_bytes(), body].concat())?;
        self.response()
    }

    /// A review as the API server sends it, and its answer.
    pub(crate) fn review(&mut self, review: &Value) -> Value {
        let (status, body) = self
            .ask("POST /mutate?timeout=10s", review.to_string().as_bytes())
            .unwrap();
        assert_eq!(status, 200, "{body}");
        let answer: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(answer["apiVersion"], "admission.k8s.io/v1");
        assert_eq!(answer["kind"], "AdmissionReview");
        assert_eq!(answer["response"]["uid"], review["request"]["uid"]);
        answer["response"].clone()
    }
}

fn read_response(stream: &mut impl Read) -> io::Result<(u16, String)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let length = head.lines().find_map(|line| {
        line.to_ascii_lowercase()
            .strip_prefix("content-length:")?
            .trim()
            .parse()
            .ok()
    });
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body)?;
    Ok((status, String::from_utf8(body).unwrap()))
}
