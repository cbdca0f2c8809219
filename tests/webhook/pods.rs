//! Pods of unusual shapes: what each becomes, or why it is refused.

use serde_json::{Value, json};
use vsock_sidecar::webhook::{Outcome, Refusal, inject};

use crate::support::{apply, request, settings};

/// A pod that asks for the sidecar, with this instead of its fields.
fn pod(spec: Value) -> Value {
    json!({
        "metadata": {
            "name": "vm",
            "labels": {"vsock-sidecar.io/inject": "true"},
            "annotations": {"vsock-sidecar.io/config": "web"},
        },
        "spec": spec,
    })
}

fn one_container() -> Value {
    pod(json!({"containers": [{"name": "qemu", "image": "qemu"}]}))
}

/// The pod with the sidecar. Looks at it again on the way: nothing is left to do.
#[track_caller]
fn injected(pod: &Value) -> Value {
    let (after, _) = injected_with_warnings(pod);
    after
}

#[track_caller]
fn injected_with_warnings(pod: &Value) -> (Value, Vec<String>) {
    match inject(pod, &settings()) {
        Ok(Outcome::Injected { patched, warnings }) => {
            let after = apply(pod, &json!(patched.operations()));
            assert_eq!(&after, patched.document());
            assert_eq!(inject(&after, &settings()), Ok(Outcome::Unchanged));
            (after, warnings)
        }
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn refused(pod: &Value) -> Refusal {
    match inject(pod, &settings()) {
        Err(refusal) => refusal,
        other => panic!("{other:?}"),
    }
}

/// Names of the pod's init containers, in their order.
fn init_names(pod: &Value) -> Vec<&str> {
    let containers = pod["spec"]["initContainers"].as_array().unwrap();
    containers
        .iter()
        .map(|container| container["name"].as_str().unwrap())
        .collect()
}

fn mounts_of<'a>(pod: &'a Value, container: &str) -> Vec<(&'a str, &'a str)> {
    let containers = pod["spec"]["containers"].as_array().unwrap();
    let container = containers
        .iter()
        .find(|candidate| candidate["name"] == container)
        .unwrap();
    container["volumeMounts"]
        .as_array()
        .map(|mounts| {
            let text = |mount: &'a Value, key: &str| mount[key].as_str().unwrap();
            mounts
                .iter()
                .map(|mount| (text(mount, "name"), text(mount, "mountPath")))
                .collect()
        })
        .unwrap_or_default()
}

const SOCKET: (&str, &str) = ("vsock-sidecar-socket", "/run/vsock-sidecar");

#[test]
fn lists_that_are_missing_or_null_or_empty_are_made() {
    for empty in [None, Some(Value::Null), Some(json!([]))] {
        let mut pod = one_container();
        if let Some(empty) = &empty {
            pod["spec"]["initContainers"] = empty.clone();
            pod["spec"]["volumes"] = empty.clone();
            pod["spec"]["containers"][0]["volumeMounts"] = empty.clone();
        }
        let after = injected(&pod);
        assert_eq!(init_names(&after), ["vsock-sidecar"], "{empty:?}");
        assert_eq!(after["spec"]["volumes"].as_array().unwrap().len(), 3, "{empty:?}");
        assert_eq!(mounts_of(&after, "qemu"), [SOCKET], "{empty:?}");
    }
}

#[test]
fn the_sidecar_comes_before_other_init_containers_and_native_sidecars() {
    let mut pod = one_container();
    pod["spec"]["initContainers"] =
        json!([{"name": "istio-proxy", "restartPolicy": "Always"}, {"name": "download"}]);
    assert_eq!(
        init_names(&injected(&pod)),
        ["vsock-sidecar", "istio-proxy", "download"]
    );
}

#[test]
fn the_vmm_is_compute_or_the_first_or_whom_the_annotation_names() {
    for (names, annotation, vmm) in [
        (vec!["qemu", "logs"], None, "qemu"),
        (vec!["logs", "compute"], None, "compute"),
        (vec!["compute", "logs", "vmm"], Some("vmm"), "vmm"),
    ] {
        let containers: Vec<Value> = names.iter().map(|name| json!({"name": name})).collect();
        let mut pod = pod(json!({"containers": containers}));
        if let Some(name) = annotation {
            pod["metadata"]["annotations"]["vsock-sidecar.io/vmm-container"] = json!(name);
        }
        let after = injected(&pod);
        for name in names {
            let expected: &[_] = if name == vmm { &[SOCKET] } else { &[] };
            assert_eq!(mounts_of(&after, name), expected, "{name} of {vmm}");
        }
    }
}

/// The socket is for its owner and group, so that the sidecar has to be the VMM's user wherever that is known.
#[test]
fn the_sidecar_is_the_vmms_user_but_never_root() {
    for (of_pod, of_vmm, expected) in [
        (json!(null), json!(null), json!(65532)),
        (json!(0), json!(null), json!(65532)),
        (json!(null), json!(0), json!(65532)),
        (json!(107), json!(null), json!(null)),
        (json!(107), json!(107), json!(null)),
        (json!(107), json!(0), json!(null)),
        (json!(107), json!(1000), json!(1000)),
        (json!(null), json!(1000), json!(1000)),
    ] {
        let mut pod = one_container();
        pod["spec"]["securityContext"] = json!({"runAsUser": of_pod});
        pod["spec"]["containers"][0]["securityContext"] = json!({"runAsUser": of_vmm});
        let after = injected(&pod);
        let user = &after["spec"]["initContainers"][0]["securityContext"]["runAsUser"];
        assert_eq!(user, &expected, "pod {of_pod}, VMM {of_vmm}");
    }
}

/// A container without limits would make it Burstable, and the kubelet would take the VM's own CPUs away.
#[test]
fn a_guaranteed_pod_stays_guaranteed() {
    let exactly = json!({"cpu": "4", "memory": "8Gi"});
    let mut pod = one_container();
    pod["spec"]["containers"][0]["resources"] = json!({"limits": exactly, "requests": exactly});
    let (after, warnings) = injected_with_warnings(&pod);
    let resources = &after["spec"]["initContainers"][0]["resources"];
    assert_eq!(resources["limits"], resources["requests"]);
    assert!(warnings[0].contains("Guaranteed"), "{warnings:?}");

    pod["spec"]["containers"][0]["resources"]["requests"]["cpu"] = json!("2");
    let (after, warnings) = injected_with_warnings(&pod);
    assert_eq!(
        after["spec"]["initContainers"][0]["resources"].get("limits"),
        None
    );
    assert_eq!(warnings, Vec::<String>::new());
}

#[test]
fn a_mount_that_is_there_already_is_enough() {
    let mut pod = one_container();
    pod["spec"]["volumes"] = json!([{"name": "vsock-sidecar-socket", "emptyDir": {"medium": "Memory"}}]);
    pod["spec"]["containers"][0]["volumeMounts"] =
        json!([{"name": "vsock-sidecar-socket", "mountPath": "/run/vsock-sidecar/"}]);
    let after = injected(&pod);
    assert_eq!(mounts_of(&after, "qemu").len(), 1);
    assert_eq!(after["spec"]["volumes"].as_array().unwrap().len(), 3);
}

/// Somebody's tool wrote half of what we write, or a manifest was copied from a running pod and cut down.
#[test]
fn a_half_injected_pod_is_completed() {
    let whole = injected(&one_container());
    for (pointer, key) in [
        ("/spec", "volumes"),
        ("/spec", "initContainers"),
        ("/spec/containers/0", "volumeMounts"),
        ("/metadata/annotations", "vsock-sidecar.io/version"),
    ] {
        let mut half = whole.clone();
        let parent = half.pointer_mut(pointer).unwrap().as_object_mut().unwrap();
        assert!(parent.remove(key).is_some(), "{key}");
        assert_eq!(injected(&half), whole, "without {key}");
    }
}

/// Webhooks that rewrite images or add variables come after us; the API server asks us again, and we must not undo their work.
#[test]
fn what_others_changed_of_our_container_stays() {
    let mut pod = injected(&one_container());
    let container = &mut pod["spec"]["initContainers"][0];
    container["image"] = json!("mirror.example/vsock-sidecar@sha256:0");
    container["env"]
        .as_array_mut()
        .unwrap()
        .push(json!({"name": "HTTP_PROXY", "value": "x"}));
    container["imagePullPolicy"] = json!("Always");
    assert_eq!(inject(&pod, &settings()), Ok(Outcome::Unchanged));
    // A mesh that also wants to be first.
    let others = json!({"name": "istio-init"});
    pod["spec"]["initContainers"]
        .as_array_mut()
        .unwrap()
        .insert(0, others);
    assert_eq!(inject(&pod, &settings()), Ok(Outcome::Unchanged));
}

#[test]
fn other_values_of_the_label_inject_nothing_and_say_so() {
    for (value, warns) in [
        (json!("false"), false),
        (json!("True"), true),
        (json!("yes"), true),
        (json!(true), true),
    ] {
        let mut pod = one_container();
        pod["metadata"]["labels"]["vsock-sidecar.io/inject"] = value.clone();
        let Ok(Outcome::NotSelected { warning }) = inject(&pod, &settings()) else {
            panic!("{value}");
        };
        assert_eq!(warning.is_some(), warns, "{value}: {warning:?}");
    }
    assert_eq!(
        inject(&json!({"spec": 3}), &settings()),
        Ok(Outcome::NotSelected { warning: None })
    );
}

/// One row a mistake: where the pod differs from a good one, and the words that have to be in the message: what, where, what to do.
#[test]
fn a_pod_that_asks_and_cannot_have_it_is_refused_with_what_to_do() {
    let rows: [(&str, Value, &[&str]); 22] = [
        (
            "/metadata/annotations",
            json!(null),
            &["annotation vsock-sidecar.io/config", "ConfigMap", "config.yaml"],
        ),
        (
            "/metadata/annotations/vsock-sidecar.io~1config",
            json!("Web"),
            &["`Web`", "lower case"],
        ),
        (
            "/metadata/annotations/vsock-sidecar.io~1config",
            json!("shop/web"),
            &["`shop/web`", "without a namespace"],
        ),
        (
            "/metadata/annotations/vsock-sidecar.io~1config",
            json!(""),
            &["``"],
        ),
        (
            "/metadata/annotations/vsock-sidecar.io~1config",
            json!("a..b"),
            &["`a..b`"],
        ),
        (
            "/metadata/annotations/vsock-sidecar.io~1config",
            json!("\u{1b}[2J"),
            &["\\u{1b}"],
        ),
        (
            "/metadata/annotations/vsock-sidecar.io~1vmm-container",
            json!("vm"),
            &["`vm`", "only qemu", "compute"],
        ),
        (
            "/spec/containers/0/name",
            json!("vsock-sidecar"),
            &["spec.containers[0]", "rename it"],
        ),
        (
            "/spec/initContainers",
            json!([{"name": "x"}, {"name": "vsock-sidecar"}]),
            &["spec.initContainers[1]", "remove the label"],
        ),
        (
            "/spec/volumes",
            json!([{"name": "vsock-sidecar-config", "configMap": {"name": "other"}}]),
            &["spec.volumes[0]", "ConfigMap web"],
        ),
        (
            "/spec/volumes",
            json!([{"name": "vsock-sidecar-socket", "hostPath": {"path": "/run"}}]),
            &["spec.volumes[0]", "emptyDir"],
        ),
        (
            "/spec/volumes",
            json!([{"name": "vsock-sidecar-admin", "configMap": {}}]),
            &["vsock-sidecar-admin", "emptyDir"],
        ),
        (
            "/spec/containers/0/volumeMounts",
            json!([{"name": "disk", "mountPath": "/run/vsock-sidecar"}]),
            &["volumeMounts[0]", "`disk`", "elsewhere"],
        ),
        // QEMU would look for the socket in a directory that nobody else has.
        (
            "/spec/containers/0/volumeMounts",
            json!([{"name": "vsock-sidecar-socket", "mountPath": "/run/vsock-sidecar", "subPath": "vm"}]),
            &["volumeMounts[0]", "subPath", "all of it"],
        ),
        (
            "/spec/containers/0/volumeMounts",
            json!([{"name": "vsock-sidecar-socket", "mountPath": "/run/vsock-sidecar", "subPathExpr": "$(POD)"}]),
            &["volumeMounts[0]", "all of it"],
        ),
        (
            "/spec/os",
            json!({"name": "windows"}),
            &["spec.os.name", "Windows"],
        ),
        (
            "/spec/nodeSelector",
            json!({"kubernetes.io/os": "windows"}),
            &["nodeSelector", "Windows"],
        ),
        (
            "/metadata/labels/kubevirt.io",
            json!("virt-launcher"),
            &["kubevirt-plugin-sockets", "feature gate Plugins"],
        ),
        (
            "/spec/containers",
            json!([]),
            &["spec.containers", "at least one"],
        ),
        (
            "/spec/containers",
            json!({"name": "qemu"}),
            &["spec.containers", "list of maps"],
        ),
        (
            "/spec/volumes",
            json!(["disk"]),
            &["spec.volumes", "list of maps"],
        ),
        ("/spec", json!(null), &["spec is not a map"]),
    ];
    for (pointer, value, words) in rows {
        let mut pod = one_container();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        let key = key.replace("~1", "/");
        pod.pointer_mut(parent).unwrap()[key.as_str()] = value.clone();
        let refusal = refused(&pod);
        let message = refusal.to_string();
        for word in words {
            assert!(
                message.contains(word),
                "{pointer} = {value}: {word:?} is not in {message}"
            );
        }
        assert!(
            !message.contains(['\n', '\u{1b}']) && message.len() < 500,
            "{message}"
        );
        let malformed = matches!(refusal, Refusal::Malformed { .. });
        assert_eq!(refusal.code(), if malformed { 400 } else { 422 });
    }
}

#[test]
fn a_marked_container_without_its_parts_is_refused() {
    let whole = injected(&one_container());
    let mut part = whole["spec"]["initContainers"][0]["volumeMounts"].clone();
    part[0]["subPath"] = json!("config.yaml");
    for (key, value, word) in [
        ("restartPolicy", json!(null), "restartPolicy: Always"),
        ("volumeMounts", json!([]), "vsock-sidecar-config"),
        // A mount by subPath never sees another configuration.
        (
            "volumeMounts",
            part,
            "vsock-sidecar-config at /etc/vsock-sidecar without a subPath",
        ),
        // Without it the VMM starts before the socket is there.
        ("startupProbe", json!(null), "startupProbe"),
    ] {
        let mut pod = whole.clone();
        pod["spec"]["initContainers"][0][key] = value;
        let message = refused(&pod).to_string();
        assert!(
            message.contains(word) && message.contains("remove it"),
            "{message}"
        );
    }
}

#[test]
fn a_launcher_that_does_not_mount_the_plugins_volume_is_refused() {
    let mut pod = one_container();
    pod["metadata"]["labels"]["kubevirt.io"] = json!("virt-launcher");
    pod["spec"]["volumes"] = json!([{"name": "kubevirt-plugin-sockets", "emptyDir": {}}]);
    let message = refused(&pod).to_string();
    assert!(
        message.contains("spec.containers[0]") && message.contains("/var/run/kubevirt-plugin"),
        "{message}"
    );
}

/// JSON pointers of every value of a document.
fn pointers(value: &Value, at: &str, all: &mut Vec<String>) {
    let inner: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields
            .iter()
            .map(|(key, value)| (key.replace('~', "~0").replace('/', "~1"), value))
            .collect(),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(index, value)| (index.to_string(), value))
            .collect(),
        _ => Vec::new(),
    };
    for (key, value) in inner {
        let pointer = format!("{at}/{key}");
        pointers(value, &pointer, all);
        all.push(pointer);
    }
}

/// What is said ends in logs and terminals.
#[track_caller]
fn keeps_its_shape(message: &str) {
    let harmless = !message.chars().any(char::is_control);
    assert!(harmless && message.len() < 1200, "{message}");
}

/// Each value of two pods, before and after injection, becomes one of every kind. Whatever it is: a reason, or a pod that stays as
/// it is when it is looked at again.
#[test]
fn no_value_of_a_pod_is_taken_on_trust() {
    let mut tried = 0;
    let long = json!("\u{1b}[2J\n".repeat(1000));
    for name in ["qemu-pod", "kubevirt-pod"] {
        let before = request(name)["request"]["object"].clone();
        let after = injected(&before);
        for pod in [before, after] {
            let mut places = Vec::new();
            pointers(&pod, "", &mut places);
            for place in places {
                for value in [
                    json!(null),
                    json!(true),
                    json!(-1),
                    json!("x"),
                    json!([]),
                    json!([null]),
                    json!([{}]),
                    json!({}),
                    json!({"name": []}),
                    long.clone(),
                ] {
                    let mut odd = pod.clone();
                    *odd.pointer_mut(&place).unwrap() = value.clone();
                    match inject(&odd, &settings()) {
                        Ok(Outcome::Injected { patched, .. }) => {
                            let again = apply(&odd, &json!(patched.operations()));
                            assert_eq!(&again, patched.document(), "{place} = {value}");
                            assert_eq!(
                                inject(&again, &settings()),
                                Ok(Outcome::Unchanged),
                                "{place} = {value}"
                            );
                        }
                        Ok(Outcome::NotSelected { warning }) => {
                            keeps_its_shape(&warning.unwrap_or_default());
                        }
                        Ok(Outcome::Unchanged) => {}
                        Err(refusal) => keeps_its_shape(&refusal.to_string()),
                    }
                    tried += 1;
                }
            }
        }
    }
    assert!(tried > 5000, "{tried}");
}
