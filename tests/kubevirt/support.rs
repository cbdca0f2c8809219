//! The binary as KubeVirt sees it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use hyper::http::uri::PathAndQuery;
use rustix::process::{Pid, Signal, kill_process};
use tokio::runtime::Runtime;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;
use vsock_sidecar::kubevirt::hook::messages::{Empty, InfoResult};

/// No step of a healthy test takes as long, not even on a loaded machine.
pub const LONG: Duration = Duration::from_secs(60);

pub const INFO: &str = "/kubevirt.hooks.info.Info/Info";
pub const DEFINE: &str = "/kubevirt.hooks.v1alpha3.Callbacks/OnDefineDomain";
pub const CLOUD_INIT: &str = "/kubevirt.hooks.v1alpha3.Callbacks/PreCloudInitIso";
pub const SHUTDOWN: &str = "/kubevirt.hooks.v1alpha3.Callbacks/Shutdown";
pub const MUTATE: &str = "/kubevirt.hooks.plugins.v1alpha1.DomainHookService/MutateDomain";

/// Waits until `condition` gives a value.
#[track_caller]
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LONG;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "gave up waiting for this: {what}");
        thread::sleep(Duration::from_millis(3));
    }
}

/// The directory that a hook sidecar shares with `compute`, and a sidecar in it. Dropping it kills the sidecar, and fails the
/// test if that had panicked or made a system call that its own filter refuses.
pub struct Pod {
    dir: tempfile::TempDir,
    child: Option<Child>,
}

impl Pod {
    /// An empty directory, and nobody running.
    pub fn empty() -> Pod {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("kubevirt-hooks")).unwrap();
        Pod { dir, child: None }
    }

    /// A sidecar that has one guest and nothing else, whose hook can be called.
    pub fn start() -> Pod {
        let mut pod = Pod::empty();
        pod.spawn(&pod.configuration(""));
        until("the hook's socket", || {
            pod.assert_running();
            pod.hook().exists().then_some(())
        });
        pod
    }

    /// The configuration of a guest with its socket where a legacy hook has it.
    pub fn configuration(&self, rules: &str) -> String {
        format!(
            "admin: {{listen: [\"unix://{}\"]}}\nlog: {{format: json, level: debug}}\n\
             guests:\n- name: vm\n  cid: 3\n  vhostUser: {{socket: {}}}\n{rules}",
            self.path("admin.sock").display(),
            self.socket().display()
        )
    }

    /// Starts the sidecar.
    pub fn spawn(&mut self, configuration: &str) {
        self.spawn_as(None, configuration, &[]);
    }

    /// Starts the sidecar as a container of this name and with further arguments.
    pub fn spawn_as(&mut self, container: Option<&str>, configuration: &str, arguments: &[&str]) {
        fs::write(self.path("sidecar.yaml"), configuration).unwrap();
        let output = File::create(self.path("sidecar.log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"))
            .args(["run", "--config"])
            .arg(self.path("sidecar.yaml"))
            .arg("--kubevirt-hook")
            .arg(self.hook())
            .args(arguments)
            .env_remove("CONTAINER_NAME")
            .envs(container.map(|name| ("CONTAINER_NAME", name)))
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The directory in which virt-launcher looks for hooks.
    pub fn hooks(&self) -> PathBuf {
        self.path("kubevirt-hooks")
    }

    pub fn hook(&self) -> PathBuf {
        self.hooks().join("vsock-sidecar.sock")
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> PathBuf {
        self.hooks().join("userdata/vsock.sock")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("sidecar.log")).unwrap_or_default()
    }

    pub fn terminate(&self) {
        let child = self.child.as_ref().unwrap();
        kill_process(Pid::from_child(child), Signal::TERM).unwrap();
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[track_caller]
    pub fn assert_running(&mut self) {
        if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
            panic!("the sidecar has ended with {status}\n{}", self.log());
        }
    }

    /// How the sidecar ends by itself.
    #[track_caller]
    pub fn end(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        let ended = until("the sidecar's end", || child.try_wait().unwrap());
        self.check_log();
        ended
    }

    /// A request to the admin server: the body.
    pub fn admin(&self, path: &str) -> String {
        use std::io::Write;
        let mut stream = UnixStream::connect(self.path("admin.sock")).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    fn check_log(&self) {
        let log = self.log();
        for bad in ["panicked at", "refused by the seccomp filter"] {
            let line = log.lines().find(|line| line.contains(bad));
            assert_eq!(line, None, "the sidecar's log");
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        match thread::panicking() {
            true => eprintln!("--- the sidecar's log:\n{}", self.log()),
            false => self.check_log(),
        }
    }
}

/// virt-launcher's end of a hook: a connection for each call.
pub struct Launcher {
    runtime: Runtime,
}

impl Launcher {
    pub fn new() -> Launcher {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        Launcher { runtime }
    }

    /// Calls a method of the hook at `socket`. Waits for one that is bound and does not listen yet, which refuses connections, as
    /// KubeVirt's own dial does (pkg/util/net/grpc/grpc.go, `WithBlock`).
    pub fn call<Asked, Answer>(&self, socket: &Path, method: &str, asked: Asked) -> Result<Answer, Status>
    where
        Asked: prost::Message + 'static,
        Answer: prost::Message + Default + 'static,
    {
        until("the hook listens", || match UnixStream::connect(socket) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => None,
            _ => Some(()),
        });
        let uri = format!("unix://{}", socket.display());
        let method = PathAndQuery::try_from(method).unwrap();
        self.runtime.block_on(async {
            let call = async {
                let channel = Endpoint::from_shared(uri)
                    .unwrap()
                    .connect()
                    .await
                    .map_err(|error| Status::unavailable(format!("{error:?}")))?;
                let mut client: Grpc<Channel> = Grpc::new(channel);
                client
                    .ready()
                    .await
                    .map_err(|error| Status::unavailable(error.to_string()))?;
                let codec = ProstCodec::<Asked, Answer>::default();
                client.unary(Request::new(asked), method, codec).await
            };
            let answer = tokio::time::timeout(LONG, call)
                .await
                .expect("the hook answers in time");
            answer.map(tonic::Response::into_inner)
        })
    }

    /// Looks for hooks as virt-launcher does: every file of the directory is dialled and asked, and one that does not answer is
    /// the end of the virtual machine.
    #[track_caller]
    pub fn collect(&self, pod: &mut Pod) -> InfoResult {
        until("a hook", || {
            pod.assert_running();
            let entries = fs::read_dir(pod.hooks()).unwrap().map(Result::unwrap);
            let files = entries.filter(|entry| !entry.file_type().unwrap().is_dir());
            let answers: Vec<InfoResult> = files
                .map(|file| self.call(&file.path(), INFO, Empty {}).unwrap())
                .collect();
            assert!(answers.len() < 2, "{answers:?}");
            answers.into_iter().next()
        })
    }
}
