//! What is true of every pod that the charts make: restricted Pod Security for our containers, the native sidecar first, and a configuration
//! that the real binary accepts.

use std::fs;

use serde_json::{Value, json};

use super::tools::{
    chart_with_files, documents, name_of, objects, success, template, values_files, vsock_sidecar,
};

/// The specs of all pods among some objects, each with the name of what makes it.
pub fn pod_specs(objects: &[Value]) -> Vec<(String, &Value)> {
    let spec_of = |object: &'_ Value| match object["kind"].as_str() {
        Some("Pod") => Some("/spec"),
        Some("Deployment") => Some("/spec/template/spec"),
        _ => None,
    };
    objects
        .iter()
        .filter_map(|object| {
            let spec = object.pointer(spec_of(object)?)?;
            Some((object["metadata"]["name"].as_str()?.to_owned(), spec))
        })
        .collect()
}

/// What the restricted Pod Security Standard asks of a container, and a read-only root besides.
pub fn assert_restricted(what: &str, pod: &Value, container: &Value) {
    let context = &container["securityContext"];
    assert_eq!(context["allowPrivilegeEscalation"], false, "{what}");
    assert_eq!(context["capabilities"], json!({"drop": ["ALL"]}), "{what}");
    assert_eq!(context["readOnlyRootFilesystem"], true, "{what}");
    assert_eq!(context["runAsNonRoot"], true, "{what}");
    assert_eq!(
        context["seccompProfile"],
        json!({"type": "RuntimeDefault"}),
        "{what}"
    );
    assert!(
        context["privileged"].is_null() || context["privileged"] == false,
        "{what}"
    );
    let user = [&context["runAsUser"], &pod["securityContext"]["runAsUser"]]
        .into_iter()
        .find_map(Value::as_u64);
    assert!(user != Some(0), "{what} runs as root");
    for key in ["hostNetwork", "hostPID", "hostIPC"] {
        assert!(pod[key].is_null(), "{what}: {key}");
    }
    for port in container["ports"].as_array().into_iter().flatten() {
        assert!(port["hostPort"].is_null(), "{what}");
    }
    for volume in pod["volumes"].as_array().into_iter().flatten() {
        let kinds: Vec<&String> = volume
            .as_object()
            .expect("a volume")
            .keys()
            .filter(|key| *key != "name")
            .collect();
        assert!(
            ["configMap", "emptyDir", "secret"].contains(&kinds[0].as_str()),
            "{what}: {volume}"
        );
    }
}

/// Helm makes pods before policies and webhooks: a sample that asked to be injected would at first install run without a sidecar, and end.
#[test]
fn the_sample_needs_nobody_who_injects() {
    let mut seen = 0;
    for values in values_files() {
        let objects = objects(&name_of(&values));
        let samples = objects.iter().filter(|object| {
            object["kind"] == "Pod"
                && object["metadata"]["labels"]["app.kubernetes.io/component"] == "sample-vm"
        });
        for sample in samples {
            let name = name_of(&values);
            assert_eq!(
                sample["metadata"]["labels"]["vsock-sidecar.io/inject"],
                Value::Null,
                "{name}"
            );
            assert_eq!(
                sample["spec"]["initContainers"][0]["name"], "vsock-sidecar",
                "{name}"
            );
            assert!(sample["spec"]["terminationGracePeriodSeconds"].is_u64(), "{name}");
            seen += 1;
        }
    }
    assert!(seen >= 3, "{seen} samples");
}

/// Whether a container is of our image.
fn is_ours(container: &Value) -> bool {
    container["image"]
        .as_str()
        .is_some_and(|image| image.contains("vsock-sidecar"))
}

#[test]
fn our_containers_pass_the_restricted_pod_security_standard() {
    let mut seen = 0;
    for values in values_files() {
        let objects = objects(&name_of(&values));
        for (name, pod) in pod_specs(&objects) {
            let lists = [&pod["initContainers"], &pod["containers"]];
            for container in lists
                .into_iter()
                .filter_map(Value::as_array)
                .flatten()
                .filter(|container| is_ours(container))
            {
                assert_restricted(
                    &format!("{}: {name}/{}", name_of(&values), container["name"]),
                    pod,
                    container,
                );
                seen += 1;
            }
        }
    }
    assert!(seen >= 12, "{seen} containers");
}

#[test]
fn a_sidecar_in_a_manifest_is_the_first_init_container_and_has_its_volumes() {
    let mut seen = 0;
    for values in values_files() {
        let objects = objects(&name_of(&values));
        for (name, pod) in pod_specs(&objects)
            .into_iter()
            .filter(|(_, pod)| pod["initContainers"].is_array())
        {
            let sidecar = &pod["initContainers"][0];
            assert_eq!(sidecar["name"], "vsock-sidecar", "{name}");
            assert_eq!(sidecar["restartPolicy"], "Always", "{name}");
            for (probe, what) in [
                ("startupProbe", "startup"),
                ("readinessProbe", "ready"),
                ("livenessProbe", "live"),
            ] {
                assert_eq!(
                    sidecar[probe]["exec"]["command"],
                    json!(["/vsock-sidecar", "probe", what]),
                    "{name}"
                );
            }
            assert_eq!(sidecar["ports"][0]["name"], "vsock-metrics", "{name}");
            let volumes: Vec<&Value> = pod["volumes"]
                .as_array()
                .expect("volumes")
                .iter()
                .map(|volume| &volume["name"])
                .collect();
            let containers = pod["containers"]
                .as_array()
                .expect("containers")
                .iter()
                .chain([sidecar]);
            for mount in containers
                .filter_map(|container| container["volumeMounts"].as_array())
                .flatten()
            {
                assert!(
                    volumes.contains(&&mount["name"]),
                    "{name} has no volume {}",
                    mount["name"]
                );
                assert!(
                    mount["name"] != "vsock-sidecar-config" || mount["subPath"].is_null(),
                    "a subPath never changes"
                );
            }
            seen += 1;
        }
    }
    assert!(seen >= 5, "{seen} pods");
}

#[test]
fn the_binary_accepts_each_configuration_that_the_chart_renders() {
    let mut files: Vec<Option<_>> = values_files().into_iter().map(Some).collect();
    files.push(None);
    let mut checked = 0;
    for file in files {
        let name = file.as_deref().map_or("defaults".to_owned(), name_of);
        let objects = documents(&success(
            template(&chart_with_files(), file.as_deref(), &[]),
            &name,
        ));
        for text in objects
            .iter()
            .filter_map(|object| object["data"]["config.yaml"].as_str())
        {
            let (_dir, moved) = with_directories(text);
            let output = vsock_sidecar(&["check", "-"], &moved);
            success(output, &format!("{name}: {text}"));
            checked += 1;
        }
    }
    assert!(checked >= 6, "{checked}");
}

/// A configuration with the directories of the pod somewhere else, where they exist.
fn with_directories(text: &str) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for path in [
        "run/vsock-sidecar",
        "run/vsock-sidecar-admin",
        "var/run/kubevirt-plugin/vsock-sidecar",
    ] {
        fs::create_dir_all(dir.path().join(path)).expect("a directory");
    }
    let here = dir.path().display();
    let moved = text
        .replace("/var/run/", "@var@")
        .replace("/run/", &format!("{here}/run/"))
        .replace("@var@", &format!("{here}/var/run/"));
    (dir, moved)
}

#[test]
fn every_pod_that_asks_to_be_injected_names_a_config_map_of_the_release() {
    for values in values_files() {
        let objects = objects(&name_of(&values));
        for object in objects.iter().filter(|object| object["kind"] == "Pod") {
            if object["metadata"]["labels"]["vsock-sidecar.io/inject"] == "true" {
                let config = &object["metadata"]["annotations"]["vsock-sidecar.io/config"];
                let there = objects
                    .iter()
                    .any(|other| other["kind"] == "ConfigMap" && other["metadata"]["name"] == *config);
                assert!(there, "{}: {config}", name_of(&values));
                assert!(
                    object["spec"]["initContainers"].is_null(),
                    "by one way or the other"
                );
            }
        }
    }
}
