//! What becomes of recorded pods.

use serde_json::json;
use vsock_sidecar::webhook::{Outcome, inject};

use crate::support::{apply, expect, request, settings};

#[test]
fn recorded_pods_become_the_golden_ones_and_stay_so() {
    for name in ["qemu-pod", "kubevirt-pod"] {
        let pod = &request(name)["request"]["object"];
        let Outcome::Injected { patched, warnings } = inject(pod, &settings()).unwrap() else {
            panic!("{name} was not injected");
        };
        assert_eq!(warnings, Vec::<String>::new(), "{name}");
        let after = apply(pod, &json!(patched.operations()));
        assert_eq!(&after, patched.document(), "{name}");
        expect(name, &after);
        assert_eq!(inject(&after, &settings()), Ok(Outcome::Unchanged), "{name}");
    }
}

#[test]
fn a_pod_without_the_label_is_left_alone() {
    let pod = &request("plain-pod")["request"]["object"];
    assert_eq!(
        inject(pod, &settings()),
        Ok(Outcome::NotSelected { warning: None })
    );
}

/// What a namespace with `pod-security.kubernetes.io/enforce: restricted` asks of every container (Kubernetes' Pod Security
/// Standards), and what KubeVirt asks of one that mounts its plugins' volume.
#[test]
fn the_container_keeps_to_the_restricted_standard() {
    for name in ["qemu-pod", "kubevirt-pod"] {
        let pod = &request(name)["request"]["object"];
        let Outcome::Injected { patched, .. } = inject(pod, &settings()).unwrap() else {
            panic!("{name} was not injected");
        };
        let container = &patched.document()["spec"]["initContainers"][0];
        assert_eq!(container["name"], "vsock-sidecar");
        let context = &container["securityContext"];
        assert_eq!(context["runAsNonRoot"], true);
        assert_eq!(context["allowPrivilegeEscalation"], false);
        assert_eq!(context["readOnlyRootFilesystem"], true);
        assert_eq!(context["capabilities"], json!({"drop": ["ALL"]}));
        assert_eq!(context["seccompProfile"], json!({"type": "RuntimeDefault"}));
        assert_eq!(container.get("privileged"), None);
        for port in container["ports"].as_array().unwrap() {
            assert_eq!(port.get("hostPort"), None);
        }
        for mount in container["volumeMounts"].as_array().unwrap() {
            let plugin = mount["name"] == "kubevirt-plugin-sockets";
            assert_eq!(mount.get("subPath").is_some(), plugin, "{mount}");
        }
        // KubeVirt's pod says who its user is; the other does not.
        let user = context.get("runAsUser").cloned();
        assert_eq!(user, (name == "qemu-pod").then(|| json!(65532)), "{name}");
        assert_eq!(
            patched.document()["spec"]["containers"][0]["name"],
            pod["spec"]["containers"][0]["name"]
        );
    }
}
