//! Every file of ci/ with every Kubernetes, judged by Helm, Kubernetes' schemas and yamllint.

use std::fs;

use serde_json::{Value, json};

use super::tools::{
    chart, chart_with_files, documents, helm, here, name_of, object, python, root, success, template,
    values_files,
};

/// The oldest that has native sidecars, the one where they are no longer a beta, and the newest that the schemas know.
const VERSIONS: [&str; 3] = ["1.29", "1.33", "1.37"];

#[test]
fn helm_finds_nothing_to_say_against_the_charts() {
    for path in [chart(), root().join("charts/vsock-sidecar-lib")] {
        let path = path.display().to_string();
        success(helm(&["lint", "--strict", "--quiet", &path]), &path);
    }
    for values in values_files() {
        let (chart, values) = (
            chart_with_files().display().to_string(),
            values.display().to_string(),
        );
        let args = [
            "lint",
            "--strict",
            "--quiet",
            &chart,
            "--values",
            &values,
            "--kube-version",
            "1.37.0",
        ];
        success(helm(&args), &values);
    }
}

#[test]
fn kubernetes_knows_every_field_of_every_form_in_each_version() {
    let mut manifests = Vec::new();
    for values in values_files() {
        for version in VERSIONS {
            let name = name_of(&values);
            let output = template(&chart_with_files(), Some(&values), &["--kube-version", version]);
            if name.ends_with("policy") && version == "1.29" {
                let error = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(
                    error.contains("serves no MutatingAdmissionPolicy") && error.contains("webhook"),
                    "{error}"
                );
                continue;
            }
            let text = success(output, &format!("{name}, Kubernetes {version}"));
            manifests.push(json!({"name": name, "version": version, "text": text}));
        }
    }
    let script = here().join("validate.py").display().to_string();
    let output = python(&[&script], &json!(manifests).to_string());
    let verdict: Value = serde_json::from_str(&success(output, "validate.py")).expect("JSON");
    let problems: Vec<&str> = verdict["problems"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert!(verdict["judged"].as_u64() > Some(150), "{verdict}");
    // What no schema of Kubernetes' knows is judged by custom_resources.rs.
    assert_eq!(
        verdict["unknown"],
        json!([
            "cert-manager.io/v1/Certificate",
            "monitoring.coreos.com/v1/PodMonitor",
            "monitoring.coreos.com/v1/PrometheusRule",
            "plugin.kubevirt.io/v1alpha1/Plugin"
        ])
    );
}

/// Releases, namespaces and names that YAML takes for numbers, and a user of OpenShift's, which Go writes with an exponent.
#[test]
fn names_stay_text_and_large_users_stay_whole_numbers() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("values.yaml");
    let values = "\
fullnameOverride: vm
nameOverride: '123'
configMap: {name: '1e3'}
commonLabels: {team: '12'}
injection:
  mode: webhook
  webhook:
    priorityClassName: '12'
    certificate: {source: secret, secretName: '0x10', caBundle: '-----BEGIN CERTIFICATE----- -----END CERTIFICATE-----'}
metrics: {podMonitor: {enabled: true, namespaces: ['1']}, webhookPodMonitor: {enabled: true}, prometheusRule: {enabled: true}}
networkPolicy: {enabled: true}
sampleVM: {enabled: true, image: q, runAsUser: 1000680000}
";
    fs::write(&file, values).expect("a file");
    let (chart, values) = (
        chart_with_files().display().to_string(),
        file.display().to_string(),
    );
    for release in ["456", "1e3", "on"] {
        let args = [
            "template",
            release,
            &chart,
            "--namespace",
            "789",
            "--values",
            &values,
            "--kube-version",
            "1.37.0",
        ];
        let text = success(helm(&args), release);
        let script = here().join("validate.py").display().to_string();
        let manifests = json!([{"name": release, "version": "1.37", "text": text}]);
        let output = python(&[&script], &manifests.to_string());
        let verdict: Value = serde_json::from_str(&success(output, "validate.py")).expect("JSON");
        assert_eq!(verdict["problems"], json!([]));
        let objects = documents(&text);
        let pod = object(&objects, "Pod", "-sample-vm");
        assert_eq!(pod["metadata"]["labels"]["app.kubernetes.io/instance"], release);
        assert_eq!(pod["metadata"]["namespace"], "789");
        assert_eq!(pod["spec"]["securityContext"]["runAsUser"], 1_000_680_000);
        let names = |object: &Value, name: &str| object["metadata"]["name"] == name;
        assert!(objects.iter().any(|object| names(object, "1e3")), "the ConfigMap");
        assert_eq!(pod["spec"]["volumes"][0]["configMap"]["name"], "1e3");
    }
}

#[test]
fn the_policy_has_the_newest_version_that_the_cluster_serves() {
    let file = chart().join("ci/policy-values.yaml");
    let group = "admissionregistration.k8s.io";
    let rendered = |args: &[&str]| success(template(&chart_with_files(), Some(&file), args), "policy");
    let uses = |text: &str, version: &str| {
        let line = format!("apiVersion: {group}/{version}\nkind: MutatingAdmissionPolicy\n");
        assert!(text.contains(&line), "{version}");
    };
    // Without a cluster, by the version of Kubernetes.
    for (kubernetes, version) in [("1.32.0", "v1alpha1"), ("1.34.1", "v1beta1"), ("1.36.0", "v1")] {
        uses(&rendered(&["--kube-version", kubernetes]), version);
    }
    // A cluster says what it serves, whatever its version.
    let kind = format!("{group}/v1beta1/MutatingAdmissionPolicy");
    uses(
        &rendered(&[
            "--kube-version",
            "1.36.0",
            "--api-versions",
            &kind,
            "--api-versions",
            "v1/Pod",
        ]),
        "v1beta1",
    );
    // 1.34 serves it only where an administrator has turned it on.
    let output = template(
        &chart_with_files(),
        Some(&file),
        &["--kube-version", "1.34.0", "--api-versions", "v1/Pod"],
    );
    assert!(!output.status.success());
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        error.contains("feature gate MutatingAdmissionPolicy") && error.contains("injection.mode to webhook"),
        "{error}"
    );
}

#[test]
fn the_notes_say_the_next_commands() {
    let notes = |values: &str| {
        let file = chart()
            .join(format!("ci/{values}-values.yaml"))
            .display()
            .to_string();
        let chart = chart_with_files().display().to_string();
        let args = [
            "install",
            "web",
            &chart,
            "--namespace",
            "vms",
            "--dry-run=client",
            "--values",
            &file,
        ];
        let text = success(helm(&args), values);
        text.split_once("NOTES:").expect("notes").1.to_owned()
    };
    let none = notes("none");
    assert!(none.contains("helm test web --namespace vms"), "{none}");
    assert!(
        none.contains("kubectl --namespace vms exec web-vsock-sidecar-sample-vm --container vsock-sidecar"),
        "{none}"
    );
    let webhook = notes("webhook");
    assert!(
        webhook.contains("rollout status deployment/web-vsock-sidecar-webhook"),
        "{webhook}"
    );
    assert!(
        webhook.contains("memory-backend-memfd"),
        "shared memory is not forgotten: {webhook}"
    );
    let kubevirt = notes("kubevirt");
    assert!(kubevirt.contains("evictionStrategy"), "{kubevirt}");
}
