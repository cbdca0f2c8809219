//! The sidecar's container, wherever it stands: what makes it a native sidecar, what restricted Pod Security wants, what its probes ask.

use serde_json::{Value, json};

use crate::tools::{list, named};

/// What every container of ours must be. `socket` is the mount of the directory of the vhost-user socket.
#[track_caller]
pub fn assert_sidecar(container: &Value, socket: &Value) {
    assert_eq!(container["name"], "vsock-sidecar");
    let image = container["image"].as_str().unwrap();
    assert_eq!(image, concat!("vsock-sidecar:", env!("CARGO_PKG_VERSION")));
    // The image's entry point is the program, and its default arguments are these.
    assert_eq!(container["command"], Value::Null);
    assert_eq!(
        container["args"],
        json!(["run", "--config", "/etc/vsock-sidecar/config.yaml"])
    );
    assert_eq!(container["restartPolicy"], "Always", "a native sidecar");
    assert_eq!(
        named(&container["env"], "VSOCK_SIDECAR_ADMIN")["value"],
        "unix:///run/vsock-sidecar-admin/admin.sock"
    );
    assert_eq!(named(&container["ports"], "vsock-metrics")["containerPort"], 9464);
    for (probe, argument, period, failures) in [
        ("startupProbe", "startup", 1, json!(60)),
        ("readinessProbe", "ready", 10, json!(3)),
        ("livenessProbe", "live", 20, json!(6)),
    ] {
        let probe = &container[probe];
        assert_eq!(
            probe["exec"]["command"],
            json!(["/vsock-sidecar", "probe", argument])
        );
        assert_eq!(probe["periodSeconds"], period);
        assert_eq!(probe["failureThreshold"], failures);
    }
    assert_eq!(
        container["resources"]["limits"],
        Value::Null,
        "guest memory counts to who touches it first"
    );
    assert_restricted(&container["securityContext"]);
    let mounts = &container["volumeMounts"];
    assert_eq!(list(mounts).len(), 3);
    let config = named(mounts, "vsock-sidecar-config");
    assert_eq!(config["mountPath"], "/etc/vsock-sidecar");
    assert_eq!(config["readOnly"], true);
    assert_eq!(config["subPath"], Value::Null, "a mount by subPath never changes");
    assert_eq!(
        named(mounts, "vsock-sidecar-admin")["mountPath"],
        "/run/vsock-sidecar-admin"
    );
    assert_eq!(named(mounts, socket["name"].as_str().unwrap()), socket);
}

/// The profile "restricted" of the Pod Security Standards, as far as a container's own context goes; and no root file system to write
/// to. Without a user: KubeVirt's pods and a namespace's range have theirs.
#[track_caller]
fn assert_restricted(context: &Value) {
    let expected = json!({
        "runAsNonRoot": true,
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    });
    assert_eq!(context, &expected);
}
