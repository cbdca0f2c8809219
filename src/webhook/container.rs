//! What is put into a pod: the container, its volumes and the VMM's mount. The one place where their fields are decided.
//!
//! The Helm library chart and the MutatingAdmissionPolicy add the same; `tests/webhook/golden/` holds what they are compared with.

use serde_json::{Value, json};

use super::settings::Settings;

/// Name of the container.
pub const NAME: &str = "vsock-sidecar";

/// The label that asks for the sidecar, with the value `true`.
pub const INJECT_LABEL: &str = "vsock-sidecar.io/inject";
/// The label of pods that have the sidecar, with the value `true`; what a PodMonitor selects.
pub const INJECTED_LABEL: &str = "vsock-sidecar.io/injected";
/// The annotation that names the ConfigMap.
pub const CONFIG_ANNOTATION: &str = "vsock-sidecar.io/config";
/// The annotation that names the VMM's container, where it is neither `compute` nor the first.
pub const VMM_ANNOTATION: &str = "vsock-sidecar.io/vmm-container";
/// The annotation that says which version was put in.
pub const VERSION_ANNOTATION: &str = "vsock-sidecar.io/version";

/// The volume of the configuration, a ConfigMap.
pub const CONFIG_VOLUME: &str = "vsock-sidecar-config";
/// The volume of the vhost-user sockets, shared with the VMM.
pub const SOCKET_VOLUME: &str = "vsock-sidecar-socket";
/// The volume of the admin socket, which only the sidecar's own container has.
pub const ADMIN_VOLUME: &str = "vsock-sidecar-admin";
/// The volume that KubeVirt shares between compute and its plugins' containers (`rendervolumes.go`, 1.9).
pub const KUBEVIRT_VOLUME: &str = "kubevirt-plugin-sockets";

/// Where the configuration is. The directory and never a `subPath`, which would not see a changed ConfigMap.
pub const CONFIG_DIRECTORY: &str = "/etc/vsock-sidecar";
/// Where the vhost-user sockets are, in the sidecar and in the VMM's container.
pub const SOCKET_DIRECTORY: &str = "/run/vsock-sidecar";
/// Where the admin socket is.
pub const ADMIN_DIRECTORY: &str = "/run/vsock-sidecar-admin";
/// Where KubeVirt's compute container has all of [`KUBEVIRT_VOLUME`].
pub const KUBEVIRT_DIRECTORY: &str = "/var/run/kubevirt-plugin";

/// The user where the pod names none or root: that of the image, as a number for `runAsNonRoot`.
pub const USER: i64 = 65532;
/// The port of `/metrics`; the configuration's `admin.listen` has to have it.
const METRICS_PORT: u16 = 9464;

/// What of the container depends on the pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Needs {
    /// The volume of the vhost-user sockets.
    pub sockets: Sockets,
    /// The user to run as; `None` leaves it to the pod.
    pub user: Option<i64>,
    /// Whether every container of the pod has limits equal to its requests. Ours has to have them, too, or the pod would
    /// lose the CPUs that the kubelet pins for it.
    pub guaranteed: bool,
}

/// Which volume has the vhost-user sockets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sockets {
    /// Our own.
    Own,
    /// That of KubeVirt's plugins.
    KubevirtPlugin,
}

impl Sockets {
    /// The mount of the sidecar's container.
    pub fn mount(self) -> Value {
        match self {
            Sockets::Own => mount(SOCKET_VOLUME, SOCKET_DIRECTORY),
            // A sub-directory with the plugin's name, so that the path is the same in compute, which has the whole volume.
            // KubeVirt refuses plugins' containers without a subPath.
            Sockets::KubevirtPlugin => json!({
                "name": KUBEVIRT_VOLUME,
                "mountPath": self.directory(),
                "subPath": NAME,
            }),
        }
    }

    /// The part of the volume that the sidecar has; `None` for all of it.
    pub fn sub_path(self) -> Option<&'static str> {
        match self {
            Sockets::Own => None,
            Sockets::KubevirtPlugin => Some(NAME),
        }
    }

    /// The volume's name.
    pub fn volume(self) -> &'static str {
        match self {
            Sockets::Own => SOCKET_VOLUME,
            Sockets::KubevirtPlugin => KUBEVIRT_VOLUME,
        }
    }

    /// Where the sidecar has it.
    pub fn directory(self) -> String {
        match self {
            Sockets::Own => SOCKET_DIRECTORY.to_owned(),
            Sockets::KubevirtPlugin => format!("{KUBEVIRT_DIRECTORY}/{NAME}"),
        }
    }
}

/// The native sidecar: an init container that goes on, so that it starts before the VMM and ends after it.
pub fn container(settings: &Settings, needs: &Needs) -> Value {
    let mut container = json!({
        "name": NAME,
        "image": settings.image,
        "args": ["run", "--config", format!("{CONFIG_DIRECTORY}/config.yaml")],
        "restartPolicy": "Always",
        "env": [{"name": "VSOCK_SIDECAR_ADMIN", "value": format!("unix://{ADMIN_DIRECTORY}/admin.sock")}],
        "ports": [{"name": "vsock-metrics", "containerPort": METRICS_PORT, "protocol": "TCP"}],
        // The VMM starts once this has passed. A VMM that finds no socket ends; QEMU never tries again.
        "startupProbe": probe("startup", 1, 60, 2),
        "readinessProbe": probe("ready", 10, 3, 5),
        // A restart costs the guest its vsock until the VM is made anew, so the last resort only: after two minutes.
        "livenessProbe": probe("live", 20, 6, 5),
        "resources": resources(settings, needs),
        "securityContext": security_context(needs),
        // The one line with which a bad configuration ends the sidecar shows in `kubectl describe`.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": CONFIG_VOLUME, "mountPath": CONFIG_DIRECTORY, "readOnly": true},
            needs.sockets.mount(),
            mount(ADMIN_VOLUME, ADMIN_DIRECTORY),
        ],
    });
    if let (Some(policy), Some(fields)) = (settings.image_pull_policy, container.as_object_mut()) {
        fields.insert("imagePullPolicy".to_owned(), json!(policy.as_str()));
    }
    container
}

/// What the restricted Pod Security Standard asks for. `/run/…` are volumes, so that the root can be read-only.
fn security_context(needs: &Needs) -> Value {
    let mut context = json!({
        "allowPrivilegeEscalation": false,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": true,
        "runAsNonRoot": true,
        "seccompProfile": {"type": "RuntimeDefault"},
    });
    if let (Some(user), Some(fields)) = (needs.user, context.as_object_mut()) {
        fields.insert("runAsUser".to_owned(), json!(user));
    }
    context
}

/// Exec probes: KubeVirt's masquerade takes what is sent to the pod's address, and to 127.0.0.1 in it, to the guest.
///
/// The kubelet's time is longer than that of `probe` itself (1 s), so that it is `probe` that says what is wrong.
fn probe(what: &str, period: u32, failures: u32, timeout: u32) -> Value {
    json!({
        "exec": {"command": ["/vsock-sidecar", "probe", what]},
        "periodSeconds": period,
        "failureThreshold": failures,
        "timeoutSeconds": timeout,
    })
}

fn resources(settings: &Settings, needs: &Needs) -> Value {
    match needs.guaranteed {
        true => {
            let exactly = &settings.guaranteed_resources;
            json!({"requests": exactly, "limits": exactly})
        }
        false => settings.resources.clone(),
    }
}

fn mount(volume: &str, path: &str) -> Value {
    json!({"name": volume, "mountPath": path})
}

/// The volume of the configuration.
pub fn config_volume(config_map: &str) -> Value {
    json!({"name": CONFIG_VOLUME, "configMap": {"name": config_map}})
}

/// A volume that lives as long as the pod, for sockets.
pub fn directory_volume(name: &str) -> Value {
    json!({"name": name, "emptyDir": {}})
}

/// The VMM's mount of [`SOCKET_VOLUME`]. Under KubeVirt compute has its mount already.
pub fn vmm_mount() -> Value {
    Sockets::Own.mount()
}
