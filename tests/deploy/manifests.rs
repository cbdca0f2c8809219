//! `deploy/base`, its examples and KubeVirt's forms, as `kubectl kustomize` renders them.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::sidecar::assert_sidecar;
use crate::tools::{IMAGE_TOOLS, document, documents, files, list, named, root, run, sidecar, success, text};

/// Everything that `kubectl apply -k` takes.
const KUSTOMIZATIONS: [&str; 8] = [
    "deploy/base",
    "deploy/examples/cloud-hypervisor-pod",
    "deploy/examples/crosvm-pod",
    "deploy/examples/qemu-pod",
    "deploy/kubevirt/legacy",
    "deploy/kubevirt/plugin",
    "deploy/kubevirt/plugin-vmi",
    "deploy/monitoring",
];

fn kustomize(directory: &str) -> String {
    let fetched = root().join("target/image-tools/kubectl");
    let mut kubectl = match fetched.exists() {
        true => Command::new(fetched),
        false => Command::new("kubectl"),
    };
    success(run(kubectl.args(["kustomize", directory]), IMAGE_TOOLS))
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Vec<&'a Value> {
    documents
        .iter()
        .filter(|document| document["kind"] == kind)
        .collect()
}

#[track_caller]
fn only<'a>(documents: &'a [Value], kind: &str) -> &'a Value {
    let [one] = of_kind(documents, kind)[..] else {
        panic!("one {kind} expected")
    };
    one
}

/// The configuration in the only ConfigMap.
fn configuration(documents: &[Value]) -> Value {
    let text = only(documents, "ConfigMap")["data"]["config.yaml"]
        .as_str()
        .unwrap();
    serde_saphyr::from_str(text).unwrap()
}

#[test]
fn every_kustomization_is_tested() {
    let mut found: Vec<String> = files("deploy", "kustomization.yaml")
        .into_iter()
        .filter(|path| document(path)["kind"] == "Kustomization")
        .map(|path| path.trim_end_matches("/kustomization.yaml").to_owned())
        .collect();
    found.sort();
    assert_eq!(found, KUSTOMIZATIONS);
}

#[test]
fn a_pod_of_one_s_own_gets_a_whole_sidecar() {
    for vmm in ["qemu", "cloud-hypervisor", "crosvm"] {
        let documents = documents(&kustomize(&format!("deploy/examples/{vmm}-pod")));
        let pod = only(&documents, "Pod");
        let spec = &pod["spec"];
        let mount = json!({"name": "vsock-sidecar-socket", "mountPath": "/run/vsock-sidecar"});
        assert_sidecar(&spec["initContainers"][0], &mount);
        assert_eq!(pod["metadata"]["labels"]["vsock-sidecar.io/injected"], "true");
        assert_eq!(
            pod["metadata"]["annotations"]["vsock-sidecar.io/version"],
            env!("CARGO_PKG_VERSION")
        );
        // The VMM has the socket and not the admin server.
        let vmm = named(&spec["containers"], vmm);
        assert_eq!(named(&vmm["volumeMounts"], "vsock-sidecar-socket"), &mount);
        assert!(
            !list(&vmm["volumeMounts"])
                .iter()
                .any(|mount| mount["name"] == "vsock-sidecar-admin")
        );
        // Sockets are for owner and group, and the two may run as different users.
        assert!(spec["securityContext"]["fsGroup"].is_u64());
        assert_eq!(spec["automountServiceAccountToken"], false);

        let map = only(&documents, "ConfigMap")["metadata"]["name"].clone();
        let volume = named(&spec["volumes"], "vsock-sidecar-config");
        assert_eq!(volume["configMap"]["name"], map);
        let configuration = configuration(&documents);
        let socket = configuration["guests"][0]["vhostUser"]["socket"]
            .as_str()
            .unwrap();
        let arguments = vmm["args"].to_string();
        assert!(arguments.contains(socket), "{arguments} has no {socket}");
        assert!(arguments.contains("share=on") || arguments.contains("shared=on") || vmm["name"] == "crosvm");
        assert!(!arguments.contains("reconnect"), "QEMU does not start with it");
        let drain = configuration["drain"]["timeout"].as_str().unwrap();
        let drain: u64 = drain.trim_end_matches('s').parse().unwrap();
        assert!(drain < spec["terminationGracePeriodSeconds"].as_u64().unwrap());
    }
}

/// `check` wants the directories of sockets to be there, as `run` does, so they are made elsewhere and the configuration says so.
#[test]
fn the_program_takes_every_configuration() {
    let configurations = files("deploy", "config.yaml");
    assert!(configurations.len() >= 7, "{configurations:?}");
    for path in configurations {
        let elsewhere = tempfile::tempdir().unwrap();
        let directories = [
            "/run/vsock-sidecar-admin",
            "/run/vsock-sidecar",
            "/var/run/kubevirt-hooks/userdata",
            "/var/run/kubevirt-plugin/vsock-sidecar",
        ];
        for directory in directories {
            fs::create_dir_all(elsewhere.path().join(&directory[1..])).unwrap();
        }
        let here = elsewhere.path().display();
        let moved = text(&path)
            .replace("/var/run/kubevirt", &format!("{here}/@/run/kubevirt"))
            .replace("/run/vsock-sidecar", &format!("{here}/run/vsock-sidecar"))
            .replace("/@/", "/var/");
        let file = elsewhere.path().join("config.yaml");
        fs::write(&file, moved).unwrap();
        let output = sidecar().arg("check").arg(&file).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{path}: {said}");
        // A device without rules is what the base is.
        assert!(
            said.is_empty() || path == "deploy/base/config.yaml",
            "{path}: {said}"
        );
    }
}

#[test]
fn the_plugin_and_the_configuration_of_its_vm_mean_one_socket() {
    let documents = documents(&kustomize("deploy/kubevirt/plugin"));
    let plugin = only(&documents, "Plugin");
    let expression = plugin["spec"]["domainHooks"][0]["cel"]["expression"]
        .as_str()
        .unwrap();
    let configuration = document("deploy/kubevirt/plugin-vmi/config.yaml");
    let socket = configuration["guests"][0]["vhostUser"]["socket"]
        .as_str()
        .unwrap();
    assert!(expression.contains(&format!("path={socket}\"")));
    assert!(!expression.contains("reconnect"));
    let name = plugin["metadata"]["name"].as_str().unwrap();
    assert_eq!(
        socket,
        format!("/var/run/kubevirt-plugin/{name}/vsock.sock"),
        "KubeVirt's rule"
    );
    let policy = &only(&documents, "MutatingAdmissionPolicy")["metadata"]["name"];
    assert_eq!(plugin["spec"]["mutatingAdmissionPolicies"][0]["name"], *policy);
    assert_eq!(
        only(&documents, "MutatingAdmissionPolicyBinding")["spec"]["policyName"],
        *policy
    );
}

/// A condition that does not hold lets the pod in as it is, with a guest that has no vsock. What is missing (the annotation, KubeVirt's volume) is to
/// fail instead, in the expression or in what it makes.
#[test]
fn the_policy_leaves_alone_only_what_has_the_sidecar() {
    let policy = document("deploy/kubevirt/plugin/policy.yaml");
    let conditions = list(&policy["spec"]["matchConditions"]);
    let names: Vec<&Value> = conditions.iter().map(|condition| &condition["name"]).collect();
    assert_eq!(names, [&json!("no-sidecar-yet")]);
    assert_eq!(policy["spec"]["failurePolicy"], "Fail");
}

/// CEL's objects are YAML's mappings but for the names of their types.
#[test]
fn the_policy_adds_the_same_container_as_the_patch() {
    let policy = document("deploy/kubevirt/plugin/policy.yaml");
    let expression = policy["spec"]["mutations"][0]["jsonPatch"]["expression"]
        .as_str()
        .unwrap();
    let start = expression.find("value: Object.spec.initContainers{").unwrap();
    let mut rest = &expression[start + "value: ".len()..];
    let mut literal = String::new();
    let mut depth = 0usize;
    loop {
        if let Some(after) = rest.strip_prefix("Object.") {
            rest = after.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || c == '.');
        }
        let next = rest.chars().next().expect("the braces are closed");
        literal.push(next);
        rest = &rest[next.len_utf8()..];
        match next {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    let container: Value = serde_saphyr::from_str(&literal).unwrap_or_else(|e| panic!("{e}\n{literal}"));
    let mount = json!({
        "name": "kubevirt-plugin-sockets",
        "mountPath": "/var/run/kubevirt-plugin/vsock-sidecar",
        "subPath": "vsock-sidecar",
    });
    assert_sidecar(&container, &mount);

    let patch = document("deploy/base/sidecar/sidecar.yaml");
    let mut patched = patch["spec"]["initContainers"][0].clone();
    patched["image"] = container["image"].clone();
    patched["volumeMounts"][1] = mount;
    assert_eq!(container, patched);
}

#[test]
fn a_hook_sidecar_finds_its_configuration_where_kubevirt_puts_it() {
    let documents = documents(&kustomize("deploy/kubevirt/legacy"));
    let vmi = only(&documents, "VirtualMachineInstance");
    let annotation = vmi["metadata"]["annotations"]["hooks.kubevirt.io/hookSidecars"]
        .as_str()
        .unwrap();
    let hooks: Value = serde_json::from_str(annotation).unwrap();
    let hook = &hooks[0];
    assert_eq!(
        hook["image"],
        concat!("vsock-sidecar:", env!("CARGO_PKG_VERSION"))
    );
    let arguments: Vec<&str> = list(&hook["args"]).iter().filter_map(Value::as_str).collect();
    assert_eq!(
        arguments,
        [
            "run",
            "--config",
            "/etc/vsock-sidecar/config.yaml",
            "--kubevirt-hook",
            "/var/run/kubevirt-hooks/vsock-sidecar.sock"
        ]
    );
    let map = &hook["configMap"];
    assert_eq!(map["name"], only(&documents, "ConfigMap")["metadata"]["name"]);
    assert_eq!(map["hookPath"], arguments[2]);
    assert!(!only(&documents, "ConfigMap")["data"][map["key"].as_str().unwrap()].is_null());
    // virt-launcher dials every file in the hooks' own directory.
    let socket = configuration(&documents)["guests"][0]["vhostUser"]["socket"].clone();
    assert_eq!(socket, "/var/run/kubevirt-hooks/userdata/vsock.sock");
}

/// Ports of the pod that the guest gets are lost to the sidecar, and no list means all of them.
#[test]
fn kubevirt_s_examples_say_what_a_vm_with_this_device_must() {
    for form in ["legacy", "plugin-vmi"] {
        let documents = documents(&kustomize(&format!("deploy/kubevirt/{form}")));
        let spec = &only(&documents, "VirtualMachineInstance")["spec"];
        assert_eq!(spec["evictionStrategy"], "None", "QEMU does not migrate it");
        assert_eq!(spec["domain"]["devices"]["autoattachVSOCK"], Value::Null);
        let interface = &spec["domain"]["devices"]["interfaces"][0];
        let ports: Vec<u64> = list(&interface["ports"])
            .iter()
            .filter_map(|port| port["port"].as_u64())
            .collect();
        assert!(!ports.is_empty());
        let configuration = configuration(&documents);
        let mut ours = vec![9464];
        ours.extend(list(&configuration["guests"][0]["inbound"]).iter().map(|rule| {
            let listen = rule["listen"].as_str().unwrap();
            listen.rsplit(':').next().unwrap().parse::<u64>().unwrap()
        }));
        assert!(
            ours.iter().all(|port| !ports.contains(port)),
            "{ours:?} and {ports:?}"
        );
    }
}

/// kubernetes-validate has the API's schemas, and knows no kinds of KubeVirt and of the Prometheus operator.
#[test]
fn kubernetes_knows_every_field() {
    let validate = root().join("target/kubernetes-tools/venv/bin/kubernetes-validate");
    assert!(
        validate.exists(),
        "{} is missing; install it with: sh tests/kubernetes/tools.sh",
        validate.display()
    );
    let directory = tempfile::tempdir().unwrap();
    let rendered: BTreeMap<&str, std::path::PathBuf> = KUSTOMIZATIONS
        .iter()
        .map(|name| {
            let file = directory.path().join(name.replace('/', "-") + ".yaml");
            fs::write(&file, kustomize(name)).unwrap();
            (*name, file)
        })
        .collect();
    // Native sidecars are from 1.29, the policy is from 1.36.
    for (version, all) in [("1.29", false), ("1.33", false), ("1.37", true)] {
        let chosen = rendered
            .iter()
            .filter(|(name, _)| all || !name.ends_with("/plugin"))
            .map(|(_, file)| file);
        let mut command = Command::new(&validate);
        let said = success(run(
            command.args(["-k", version, "--strict"]).args(chosen),
            "sh tests/kubernetes/tools.sh",
        ));
        assert!(said.matches(" passed ").count() >= 8, "{version}: {said}");
    }
}

#[test]
fn every_version_is_this_one() {
    let version = env!("CARGO_PKG_VERSION");
    for path in files("deploy", ".yaml") {
        let text = text(&path);
        for (place, word) in text
            .match_indices("vsock-sidecar:")
            .chain(text.match_indices("newTag: "))
        {
            let rest = &text[place + word.len()..];
            let end = rest
                .find(|c: char| !(c.is_ascii_digit() || c == '.'))
                .unwrap_or(rest.len());
            let named = &rest[..end];
            assert!(named.is_empty() || named == version, "{path} has {named}");
        }
    }
    let dockerfile = text("deploy/Dockerfile");
    assert!(dockerfile.contains(&format!("ARG VERSION={version}\n")));
}
