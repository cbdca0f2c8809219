//! The sidecar of the pod of `helm test`, run outside of a pod with what the manifests say: arguments, environment, configuration, probes, and
//! the end.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::tools::{chart_with_files, documents, object, success, template};

const LONG: Duration = Duration::from_secs(60);

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The pod's file system and network, as far as they are not those of this machine.
struct Pod<'a> {
    root: &'a Path,
    metrics: String,
}

impl Pod<'_> {
    /// A text of a manifest with the pod's paths and port as they are here.
    fn here(&self, text: &str) -> String {
        let root = self.root.display();
        text.replace("0.0.0.0:9464", &self.metrics)
            .replace("127.0.0.1:9464", &self.metrics)
            .replace("/run/", &format!("{root}/run/"))
            .replace("/etc/", &format!("{root}/etc/"))
    }

    fn texts(&self, list: &Value) -> Vec<String> {
        let list = list.as_array().expect("a list");
        list.iter()
            .map(|text| self.here(text.as_str().expect("a text")))
            .collect()
    }

    fn command(&self, container: &Value, args: &[String]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"));
        let environment: BTreeMap<String, String> = container["env"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|variable| {
                let text = |key: &str| variable[key].as_str().expect("a text").to_owned();
                (text("name"), self.here(&text("value")))
            })
            .collect();
        command
            .args(args)
            .env_clear()
            .envs(environment)
            .stdin(Stdio::null());
        command
    }

    /// What the kubelet does: the command of a probe, without its first word, which is our program.
    fn probe(&self, container: &Value, probe: &str) -> Output {
        let command = self.texts(&container[probe]["exec"]["command"]);
        assert_eq!(command[0], "/vsock-sidecar");
        self.command(container, &command[1..])
            .output()
            .expect("the probe runs")
    }
}

#[test]
fn the_sidecar_of_the_manifests_passes_its_own_probes_and_ends_well() {
    let objects = documents(&success(template(&chart_with_files(), None, &[]), "defaults"));
    let spec = &object(&objects, "Pod", "-test")["spec"];
    let container = &spec["initContainers"][0];
    let config = object(&objects, "ConfigMap", "-config")["data"]["config.yaml"]
        .as_str()
        .expect("a configuration");

    let root = tempfile::tempdir().expect("a temporary directory");
    // A configuration takes no port 0; one that was free a moment ago does.
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    let pod = Pod {
        root: root.path(),
        metrics: free.expect("a port").to_string(),
    };
    for mount in container["volumeMounts"].as_array().expect("mounts") {
        let path = pod.here(&format!("{}/", mount["mountPath"].as_str().expect("a path")));
        fs::create_dir_all(path).expect("a directory");
    }
    let file = root.path().join("etc/vsock-sidecar/config.yaml");
    fs::write(file, pod.here(config)).expect("a file");

    let args = pod.texts(&container["args"]);
    let child = pod
        .command(container, &args)
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary runs");
    let mut sidecar = Running(child);
    let deadline = Instant::now() + LONG;
    loop {
        let output = pod.probe(container, "startupProbe");
        if output.status.success() {
            break;
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(Instant::now() < deadline, "it does not start: {said}");
        thread::yield_now();
    }
    let socket = root.path().join("run/vsock-sidecar/vsock.sock");
    assert!(socket.exists(), "the VMM's container starts after this probe");
    success(pod.probe(container, "readinessProbe"), "readinessProbe");
    success(pod.probe(container, "livenessProbe"), "livenessProbe");
    let asks = &spec["containers"][0];
    let output = pod.command(asks, &pod.texts(&asks["args"])).output();
    success(output.expect("it runs"), "the container of helm test");

    let pid = Pid::from_child(&sidecar.0);
    kill_process(pid, Signal::TERM).expect("a signal");
    let status = sidecar.0.wait().expect("it ends");
    assert!(status.success(), "{status}");
    assert!(!pod.probe(container, "livenessProbe").status.success());
}
