//! The MutatingAdmissionPolicy, evaluated on pods by an implementation of CEL: it does what the library chart does by hand, and what
//! the webhook does.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::{Map, Value, json};

use super::library::include;
use super::pods::assert_restricted;
use super::tools::{
    chart, chart_with_files, documents, here, object, python, root, success, template, vsock_sidecar,
};

/// Both policies of a release that injects by policy.
fn policies() -> (Value, Value) {
    let file = chart().join("ci/policy-values.yaml");
    let objects = documents(&success(
        template(&chart_with_files(), Some(&file), &[]),
        "policy",
    ));
    let of_kind = |kind| object(&objects, kind, "-injector").clone();
    (
        of_kind("MutatingAdmissionPolicy"),
        of_kind("ValidatingAdmissionPolicy"),
    )
}

/// What becomes of pods.
fn admitted(pods: &Map<String, Value>) -> Value {
    let (mutating, validating) = policies();
    let task = json!({"mutating": mutating, "validating": validating, "pods": pods});
    let script = here().join("cel.py").display().to_string();
    serde_json::from_str(&success(python(&[&script], &task.to_string()), "cel.py")).expect("JSON")
}

/// A pod with QEMU as a user writes it, and the API server has filled in what it fills in.
fn qemu_pod() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "vm",
            "labels": {"vsock-sidecar.io/inject": "true"},
            "annotations": {"vsock-sidecar.io/config": "vm-vsock"},
        },
        "spec": {"containers": [{"name": "qemu", "image": "registry.example/qemu:1", "resources": {}}]},
    })
}

/// The pod of a VM as KubeVirt makes it from 1.9 with its Plugins turned on, as far as it matters here.
fn kubevirt_pod() -> Value {
    let mut pod = qemu_pod();
    pod["metadata"]["labels"]["kubevirt.io"] = json!("virt-launcher");
    pod["spec"] = json!({
        "securityContext": {"runAsUser": 107, "runAsGroup": 107, "runAsNonRoot": true, "fsGroup": 107},
        "initContainers": [{"name": "guest-console-log", "image": "virt-launcher", "restartPolicy": "Always", "resources": {}}],
        "containers": [{
            "name": "compute",
            "image": "virt-launcher",
            "resources": {"requests": {"cpu": "100m"}},
            "securityContext": {"runAsUser": 107},
            "volumeMounts": [{"name": "kubevirt-plugin-sockets", "mountPath": "/var/run/kubevirt-plugin"}],
        }],
        "volumes": [{"name": "kubevirt-plugin-sockets", "emptyDir": {}}],
    });
    pod
}

/// `base` with the values at some pointers replaced; `null` takes a member out.
fn with(mut base: Value, changes: &[(&str, Value)]) -> Value {
    for (pointer, value) in changes {
        let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
        let key = key.replace("~1", "/");
        let parent = base
            .pointer_mut(parent)
            .unwrap_or_else(|| panic!("{pointer}"))
            .as_object_mut()
            .expect("a mapping");
        if value.is_null() {
            parent.shift_remove(&key);
        } else {
            parent.insert(key, value.clone());
        }
    }
    base
}

fn annotation(name: &str) -> String {
    format!("/metadata/annotations/vsock-sidecar.io~1{name}")
}

/// The pods of these tests.
fn pods() -> Map<String, Value> {
    let second = json!([{"name": "log", "image": "log:1", "resources": {}}, {"name": "vmm", "image": "vmm:1", "resources": {}}]);
    let exact = json!({"limits": {"cpu": "2", "memory": "4Gi"}, "requests": {"cpu": "2", "memory": "4Gi"}});
    let sidecar = json!([{"name": "vsock-sidecar", "image": "mine:1", "resources": {}}]);
    let foreign_mount = json!([{"name": "scratch", "mountPath": "/run/vsock-sidecar/"}]);
    let part = json!([{"name": "vsock-sidecar-socket", "mountPath": "/run/vsock-sidecar", "subPath": "vm"}]);
    // Marked as injected, and with all volumes; `mounts` and `probe` of the sidecar.
    let marked = |base: Value, mounts: &Value, probe: Value| {
        let sidecar = json!({
            "name": "vsock-sidecar",
            "image": "mine:1",
            "restartPolicy": "Always",
            "volumeMounts": mounts,
        });
        let sidecar = with(sidecar, &[("/startupProbe", probe)]);
        let mut volumes = base["spec"]["volumes"].as_array().cloned().unwrap_or_default();
        volumes.extend([
            json!({"name": "vsock-sidecar-config", "configMap": {"name": "vm-vsock"}}),
            json!({"name": "vsock-sidecar-socket", "emptyDir": {}}),
            json!({"name": "vsock-sidecar-admin", "emptyDir": {}}),
        ]);
        let mut pod = with(
            base,
            &[
                ("/metadata/labels/vsock-sidecar.io~1injected", json!("true")),
                ("/spec/initContainers", json!([sidecar])),
                ("/spec/volumes", json!(volumes)),
            ],
        );
        if pod["metadata"]["labels"]["kubevirt.io"].is_null() {
            pod["spec"]["containers"][0]["volumeMounts"] = json!([mounts[1]]);
        }
        pod
    };
    let probe = json!({"exec": {"command": ["/vsock-sidecar", "probe", "startup"]}});
    let mounts = json!([
        {"name": "vsock-sidecar-config", "mountPath": "/etc/vsock-sidecar"},
        {"name": "vsock-sidecar-socket", "mountPath": "/run/vsock-sidecar"},
        {"name": "vsock-sidecar-admin", "mountPath": "/run/vsock-sidecar-admin"},
    ]);
    let mut config_by_part = mounts.clone();
    config_by_part[0]["subPath"] = json!("config.yaml");
    let mut of_plugin = mounts.clone();
    of_plugin[1] =
        json!({"name": "kubevirt-plugin-sockets", "mountPath": "/var/run/kubevirt-plugin/vsock-sidecar"});
    let pods = [
        ("qemu", qemu_pod()),
        ("kubevirt", kubevirt_pod()),
        (
            "not asked for",
            with(qemu_pod(), &[("/metadata/labels", json!({"app": "web"}))]),
        ),
        (
            "named vmm",
            with(
                qemu_pod(),
                &[
                    (&annotation("vmm-container"), json!("vmm")),
                    ("/spec/containers", second.clone()),
                ],
            ),
        ),
        (
            "guaranteed",
            with(qemu_pod(), &[("/spec/containers/0/resources", exact.clone())]),
        ),
        (
            "guaranteed but for an init container",
            with(
                qemu_pod(),
                &[
                    ("/spec/containers/0/resources", exact),
                    (
                        "/spec/initContainers",
                        json!([{"name": "prepare", "image": "prepare:1", "resources": {}}]),
                    ),
                ],
            ),
        ),
        (
            "user of the vmm",
            with(
                qemu_pod(),
                &[("/spec/containers/0/securityContext", json!({"runAsUser": 1000}))],
            ),
        ),
        (
            "user of the pod",
            with(
                qemu_pod(),
                &[("/spec/securityContext", json!({"runAsUser": 1000}))],
            ),
        ),
        (
            "root",
            with(qemu_pod(), &[("/spec/securityContext", json!({"runAsUser": 0}))]),
        ),
        (
            "volume is there",
            with(
                qemu_pod(),
                &[(
                    "/spec/volumes",
                    json!([{"name": "vsock-sidecar-socket", "emptyDir": {"medium": "Memory"}}]),
                )],
            ),
        ),
        (
            "no annotations",
            with(qemu_pod(), &[("/metadata/annotations", Value::Null)]),
        ),
        (
            "no config",
            with(qemu_pod(), &[("/metadata/annotations", json!({"a": "b"}))]),
        ),
        (
            "bad config",
            with(qemu_pod(), &[(&annotation("config"), json!("shop/vm"))]),
        ),
        (
            "no such vmm",
            with(qemu_pod(), &[(&annotation("vmm-container"), json!("qemu2"))]),
        ),
        (
            "name taken",
            with(qemu_pod(), &[("/spec/containers", sidecar.clone())]),
        ),
        (
            "init name taken",
            with(qemu_pod(), &[("/spec/initContainers", sidecar.clone())]),
        ),
        (
            "half",
            with(
                qemu_pod(),
                &[
                    ("/spec/initContainers", sidecar),
                    ("/metadata/labels/vsock-sidecar.io~1injected", json!("true")),
                ],
            ),
        ),
        (
            "volume taken",
            with(
                qemu_pod(),
                &[(
                    "/spec/volumes",
                    json!([{"name": "vsock-sidecar-admin", "hostPath": {"path": "/"}}]),
                )],
            ),
        ),
        (
            "mount taken",
            with(
                qemu_pod(),
                &[
                    ("/spec/volumes", json!([{"name": "scratch", "emptyDir": {}}])),
                    ("/spec/containers/0/volumeMounts", foreign_mount),
                ],
            ),
        ),
        (
            "mount of a part",
            with(
                qemu_pod(),
                &[
                    (
                        "/spec/volumes",
                        json!([{"name": "vsock-sidecar-socket", "emptyDir": {}}]),
                    ),
                    ("/spec/containers/0/volumeMounts", part),
                ],
            ),
        ),
        ("without a probe", marked(qemu_pod(), &mounts, Value::Null)),
        (
            "configuration by subPath",
            marked(qemu_pod(), &config_by_part, probe.clone()),
        ),
        (
            "plugin without subPath",
            marked(kubevirt_pod(), &of_plugin, probe),
        ),
        (
            "windows",
            with(qemu_pod(), &[("/spec/os", json!({"name": "windows"}))]),
        ),
        (
            "windows by node",
            with(
                qemu_pod(),
                &[("/spec/nodeSelector", json!({"kubernetes.io/os": "windows"}))],
            ),
        ),
        (
            "kubevirt without plugins",
            with(kubevirt_pod(), &[("/spec/volumes", json!([]))]),
        ),
        (
            "kubevirt elsewhere",
            with(
                kubevirt_pod(),
                &[("/spec/containers/0/volumeMounts", Value::Null)],
            ),
        ),
    ];
    pods.into_iter()
        .map(|(name, pod)| (name.to_owned(), pod))
        .collect()
}

/// All of them, admitted at once: one start of Python.
fn all() -> &'static Value {
    static ALL: OnceLock<Value> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut pods = pods();
        // What has been through once, again.
        let first = admitted(&pods);
        for name in ["qemu", "kubevirt"] {
            pods.insert(format!("{name} again"), first[name]["pod"].clone());
        }
        admitted(&pods)
    })
}

fn injected(name: &str) -> &'static Value {
    let answer = &all()[name];
    assert_eq!(answer["matched"], true, "{name}");
    assert_eq!(answer["denied"], Value::Null, "{name}");
    &answer["pod"]
}

#[test]
fn the_policy_puts_in_what_the_library_chart_does() {
    let own = "{configMap: vm-vsock}";
    let pod = injected("qemu");
    assert_eq!(pod["spec"]["initContainers"], json!([include("container", own)]));
    assert_eq!(pod["spec"]["volumes"], include("volumes", own));
    assert_eq!(
        pod["spec"]["containers"][0]["volumeMounts"],
        include("vmmVolumeMounts", own)
    );
    assert_eq!(
        pod["metadata"]["labels"]["vsock-sidecar.io/injected"],
        include("podLabels", own)["vsock-sidecar.io/injected"]
    );
    assert_eq!(
        pod["metadata"]["annotations"]["vsock-sidecar.io/version"],
        include("podAnnotations", own)["vsock-sidecar.io/version"]
    );
    assert_restricted("policy", &pod["spec"], &pod["spec"]["initContainers"][0]);
}

#[test]
fn in_kubevirts_pods_the_socket_is_in_kubevirts_volume_and_compute_stays_first() {
    let own = "{configMap: vm-vsock, kubevirt: true}";
    let pod = injected("kubevirt");
    assert_eq!(pod["spec"]["initContainers"][0], include("container", own));
    assert_eq!(pod["spec"]["initContainers"][1]["name"], "guest-console-log");
    assert_eq!(pod["spec"]["containers"], kubevirt_pod()["spec"]["containers"]);
    let mut volumes = kubevirt_pod()["spec"]["volumes"]
        .as_array()
        .expect("volumes")
        .clone();
    volumes.extend(
        include("volumes", own)
            .as_array()
            .expect("volumes")
            .iter()
            .cloned(),
    );
    assert_eq!(pod["spec"]["volumes"], json!(volumes));
}

#[test]
fn a_pod_that_has_the_sidecar_is_left_as_it_is_and_let_in() {
    for name in ["qemu", "kubevirt"] {
        let again = &all()[format!("{name} again").as_str()];
        assert_eq!(again["matched"], false, "{name}");
        assert_eq!(again["pod"], *injected(name));
        assert_eq!(again["denied"], Value::Null, "{name}");
    }
}

#[test]
fn a_pod_that_does_not_ask_is_not_looked_at() {
    let answer = &all()["not asked for"];
    assert_eq!(
        (&answer["matched"], &answer["denied"]),
        (&json!(false), &Value::Null)
    );
    assert_eq!(answer["pod"]["spec"], qemu_pod()["spec"]);
}

#[test]
fn the_sidecar_fits_itself_to_the_pod() {
    let pod = injected("named vmm");
    assert_eq!(pod["spec"]["containers"][0]["volumeMounts"], Value::Null);
    assert_eq!(
        pod["spec"]["containers"][1]["volumeMounts"][0]["name"],
        "vsock-sidecar-socket"
    );

    let resources = |name: &str| injected(name)["spec"]["initContainers"][0]["resources"].clone();
    let exactly = json!({"cpu": "200m", "memory": "256Mi"});
    assert_eq!(
        resources("guaranteed"),
        json!({"requests": exactly, "limits": exactly})
    );
    assert_eq!(
        resources("guaranteed but for an init container")["limits"],
        Value::Null
    );

    let user =
        |name: &str| injected(name)["spec"]["initContainers"][0]["securityContext"]["runAsUser"].clone();
    assert_eq!(
        user("user of the vmm"),
        1000,
        "the socket is for its owner and group"
    );
    assert_eq!(user("user of the pod"), Value::Null);
    assert_eq!(
        user("root"),
        65532,
        "runAsNonRoot would not start as the pod's root"
    );

    let volumes = injected("volume is there")["spec"]["volumes"]
        .as_array()
        .expect("volumes")
        .clone();
    let sockets: Vec<&Value> = volumes
        .iter()
        .filter(|volume| volume["name"] == "vsock-sidecar-socket")
        .collect();
    assert_eq!(
        sockets,
        [&json!({"name": "vsock-sidecar-socket", "emptyDir": {"medium": "Memory"}})]
    );
}

#[test]
fn what_asks_and_cannot_have_it_is_refused_with_what_to_do() {
    let table = [
        ("no annotations", "set it to the name of the ConfigMap"),
        ("no config", "set it to the name of the ConfigMap"),
        ("bad config", "set it to the name of the ConfigMap"),
        ("no such vmm", "name the one that runs the VMM"),
        ("name taken", "rename it"),
        ("init name taken", "was not put there by the injector"),
        ("half", "remove what there is of it"),
        ("volume taken", "is not what the injector would have put there"),
        ("mount taken", "move it elsewhere"),
        ("mount of a part", "mount all of it"),
        ("without a probe", "remove what there is of it"),
        ("configuration by subPath", "remove what there is of it"),
        ("plugin without subPath", "remove what there is of it"),
        ("windows", "remove the label"),
        ("windows by node", "remove the label"),
        ("kubevirt without plugins", "feature gate Plugins"),
        ("kubevirt elsewhere", "KubeVirt's own container"),
    ];
    for (name, words) in table {
        let denied = all()[name]["denied"]
            .as_str()
            .unwrap_or_else(|| panic!("{name} is let in"));
        assert!(denied.contains(words), "{name}: {denied}");
    }
}

/// If the binding of the mutating policy is missing, pods do not come in without a sidecar.
#[test]
fn without_the_mutating_policy_the_pod_is_refused() {
    let (_, validating) = policies();
    let nothing = json!({"spec": {"matchConstraints": {"objectSelector": {"matchLabels": {"never": "there"}}}, "mutations": []}});
    let task = json!({"mutating": nothing, "validating": validating, "pods": {"qemu": qemu_pod()}});
    let script = here().join("cel.py").display().to_string();
    let answer: Value =
        serde_json::from_str(&success(python(&[&script], &task.to_string()), "cel.py")).expect("JSON");
    let denied = answer["qemu"]["denied"].as_str().expect("a message");
    assert!(
        denied.contains("binding of the MutatingAdmissionPolicy"),
        "{denied}"
    );
}

/// Pods as the API server sent them to the webhook, and what the webhook made of them: the two ways must not part.
#[test]
fn the_policy_does_to_recorded_pods_what_the_webhook_does() {
    let webhook = root().join("tests/webhook");
    let mut pods = Map::new();
    let mut expected = Map::new();
    for entry in fs::read_dir(webhook.join("golden")).into_iter().flatten() {
        let path = entry.expect("an entry").path();
        let name = path
            .file_stem()
            .and_then(|name| name.to_str())
            .expect("a name")
            .to_owned();
        let read = |path: &Path| -> Value {
            serde_json::from_str(&fs::read_to_string(path).expect("a file")).expect("JSON")
        };
        let review = read(&webhook.join("requests").join(format!("{name}.json")));
        pods.insert(name.clone(), review["request"]["object"].clone());
        expected.insert(name, read(&path));
    }
    assert!(!pods.is_empty(), "tests/webhook/golden has the webhook's answers");
    let answers = admitted(&pods);
    for (name, mut expected) in expected {
        let mut pod = answers[name.as_str()]["pod"].clone();
        // The release's values say these two.
        for sidecar in [&mut pod, &mut expected].map(|pod| &mut pod["spec"]["initContainers"][0]) {
            let sidecar = sidecar.as_object_mut().expect("the sidecar");
            sidecar.shift_remove("image");
            sidecar.shift_remove("imagePullPolicy");
        }
        assert_eq!(pod, expected, "{name}");
        assert_eq!(answers[name.as_str()]["denied"], Value::Null, "{name}");
    }
}

/// `inject` is the webhook's mutation for people without a cluster, so that both can be asked about the same pods.
#[test]
fn the_policy_and_the_webhook_agree_on_every_pod() {
    let image = format!("vsock-sidecar:{}", env!("CARGO_PKG_VERSION"));
    for (name, pod) in pods() {
        let answer = &all()[name.as_str()];
        let args = [
            "inject",
            "-",
            "--image",
            &image,
            "--image-pull-policy",
            "IfNotPresent",
        ];
        let output = vsock_sidecar(&args, &pod.to_string());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if answer["matched"] == true && answer["denied"].is_null() {
            let injected = documents(&success(output, &name));
            assert_eq!(answer["pod"], injected[0], "{name}");
        } else {
            assert!(
                !output.status.success(),
                "{name}: the policy says {}, the webhook {said}",
                answer["denied"]
            );
        }
    }
}
