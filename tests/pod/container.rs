//! The sidecar's container: the image and the pod's manifest, made into what a runtime runs.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};

use crate::built::{Image, Runc};
use crate::tools::{list, text};
use crate::volumes::Volumes;

/// A running container with a network of its own, which is the pod's. Dropping it ends it.
pub struct Container(Runc);

impl Container {
    /// Runs a container of a pod's manifest.
    pub fn start(pod: &Value, container: &Value, volumes: &Volumes) -> Container {
        let image = Image::shared();
        let configuration = specification(pod, container, volumes, &image);
        Container(Runc::start(image, &configuration))
    }

    /// What an exec probe of the manifest says: nothing if it passes.
    pub fn probe(&self, probe: &Value) -> Result<(), String> {
        let command = list(&probe["exec"]["command"])
            .iter()
            .map(|word| word.as_str().unwrap());
        let command: Vec<&str> = command.collect();
        let output = self.0.command(&["exec"], &command);
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// Moves this thread, and those that it starts from now on, into the pod's network. False while there is none.
    pub fn enter_network(&self) -> bool {
        let state = self.0.command(&["state"], &[]);
        let state: Value = serde_json::from_slice(&state.stdout).unwrap_or_default();
        if state["status"] != "running" {
            return false;
        }
        let network = fs::File::open(format!("/proc/{}/ns/net", state["pid"])).unwrap();
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        true
    }

    /// SIGTERM, as kubelet has the runtime send it.
    pub fn terminate(&self) {
        let output = self.0.command(&["kill"], &["TERM"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
    }

    /// How it ended, if it has. The runtime hands on the exit code.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.0.child.try_wait().unwrap();
        assert!(
            status.is_none_or(|status| status.signal().is_none()),
            "{status:?}"
        );
        status
    }

    /// Everything that it wrote.
    pub fn output(&self) -> String {
        self.0.output()
    }
}

/// The configuration of a runtime, as a container runtime interface makes it of image and manifest.
fn specification(pod: &Value, container: &Value, volumes: &Volumes, image: &Image) -> Value {
    let or_default = |given: &Value, default: &Value| match given.is_null() {
        true => list(default).to_vec(),
        false => list(given).to_vec(),
    };
    // Without the manifest's command the image's entry point, with its arguments or the image's.
    let mut arguments = or_default(&container["command"], &image.config["Entrypoint"]);
    arguments.extend(or_default(&container["args"], &image.config["Cmd"]));
    let environment = list(&container["env"]).iter();
    let environment: Vec<String> = environment
        .map(|variable| {
            format!(
                "{}={}",
                variable["name"].as_str().unwrap(),
                variable["value"].as_str().unwrap()
            )
        })
        .collect();

    let (of_pod, own) = (&pod["spec"]["securityContext"], &container["securityContext"]);
    let context = |key: &str| match own[key].is_null() {
        true => of_pod[key].clone(),
        false => own[key].clone(),
    };
    assert_eq!(context("runAsNonRoot"), true);
    assert_eq!(own["capabilities"], json!({"drop": ["ALL"]}));
    assert_eq!(context("seccompProfile"), json!({"type": "RuntimeDefault"}));
    let seccomp: Value = serde_json::from_str(&text("deploy/seccomp/vsock-sidecar.json")).unwrap();
    let none = json!([]);

    let mut mounts = vec![json!({"destination": "/proc", "type": "proc", "source": "proc"})];
    mounts.extend(
        volumes
            .mounts(container)
            .into_iter()
            .map(|(inside, outside, read_only)| {
                let access = if read_only { "ro" } else { "rw" };
                json!({"destination": inside, "type": "bind", "source": outside, "options": ["bind", access]})
            }),
    );
    json!({
        "ociVersion": "1.0.0",
        "process": {
            "terminal": false,
            "user": {
                "uid": context("runAsUser"),
                "gid": context("runAsGroup"),
                "additionalGids": [of_pod["fsGroup"]],
            },
            "args": arguments,
            "env": environment,
            "cwd": "/",
            "noNewPrivileges": own["allowPrivilegeEscalation"] == false,
            "capabilities": {"bounding": none, "effective": none, "permitted": none, "inheritable": none, "ambient": none},
        },
        "root": {"path": image.mount(), "readonly": own["readOnlyRootFilesystem"]},
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}],
            "seccomp": seccomp,
        },
    })
}

/// An argument of a container, with the places that are mounted in it as they are outside.
pub fn outside(volumes: &Volumes, container: &Value, argument: &str) -> String {
    let place = |argument: String, (inside, outside, _): (String, PathBuf, bool)| {
        argument.replace(&format!("{inside}/"), &format!("{}/", Path::display(&outside)))
    };
    volumes
        .mounts(container)
        .into_iter()
        .fold(argument.to_owned(), place)
}
