//! Versions, and names that people rely on.

use std::fs;

use serde_json::{Value, json};

use super::tools::{chart, name_of, object, objects, root, values_files};

fn chart_yaml(chart: &str) -> Value {
    let text = fs::read_to_string(root().join("charts").join(chart).join("Chart.yaml")).expect("Chart.yaml");
    serde_saphyr::from_str(&text).expect("YAML")
}

#[test]
fn the_charts_are_of_the_version_of_the_program() {
    let version = env!("CARGO_PKG_VERSION");
    for chart in ["vsock-sidecar", "vsock-sidecar-lib"] {
        let yaml = chart_yaml(chart);
        assert_eq!(yaml["version"], version, "{chart}");
        assert_eq!(yaml["appVersion"], version, "{chart}");
    }
    assert_eq!(chart_yaml("vsock-sidecar")["dependencies"][0]["version"], version);
    let settings = fs::read_to_string(root().join("charts/vsock-sidecar-lib/templates/_settings.tpl"))
        .expect("_settings.tpl");
    let define = format!("{{{{- define \"vsock-sidecar-lib.appVersion\" -}}}}\n{version}\n");
    assert!(
        settings.contains(&define),
        "vsock-sidecar-lib.appVersion is {version}"
    );
}

#[test]
fn a_clone_has_the_library_where_helm_looks_for_it() {
    let library = chart().join("charts/vsock-sidecar-lib");
    let real = fs::canonicalize(&library)
        .expect("charts/vsock-sidecar/charts/vsock-sidecar-lib leads to the library");
    assert_eq!(
        real,
        fs::canonicalize(root().join("charts/vsock-sidecar-lib")).expect("the library")
    );
}

#[test]
fn every_object_says_whose_it_is() {
    for values in values_files() {
        let name = name_of(&values);
        for object in objects(&name) {
            let labels = &object["metadata"]["labels"];
            // Extra objects are the user's own.
            if object["data"] == json!({"key": "value"}) {
                continue;
            }
            for label in [
                "name",
                "instance",
                "version",
                "managed-by",
                "component",
                "part-of",
            ] {
                let label = format!("app.kubernetes.io/{label}");
                assert!(
                    labels[label.as_str()].is_string(),
                    "{name}: {} {} has {label}",
                    object["kind"],
                    object["metadata"]["name"]
                );
            }
            if name == "everything" {
                assert_eq!(labels["team"], "virtualisation", "{}", object["kind"]);
                assert_eq!(
                    object["metadata"]["annotations"]["example.org/owner"], "platform",
                    "{}",
                    object["kind"]
                );
            }
        }
    }
}

#[test]
fn the_webhook_is_asked_about_opted_in_pods_of_other_namespaces_only_and_must_answer() {
    let objects = objects("webhook");
    let webhook = &object(
        &objects,
        "MutatingWebhookConfiguration",
        "web-vsock-sidecar-injector",
    )["webhooks"][0];
    assert_eq!(webhook["failurePolicy"], "Fail");
    assert_eq!(webhook["sideEffects"], "None");
    assert_eq!(webhook["reinvocationPolicy"], "IfNeeded");
    assert_eq!(
        webhook["objectSelector"],
        json!({"matchLabels": {"vsock-sidecar.io/inject": "true"}})
    );
    let not_in = json!([{"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["kube-system", "vms"]}]);
    assert_eq!(webhook["namespaceSelector"], json!({"matchExpressions": not_in}));
    assert_eq!(webhook["clientConfig"]["service"]["path"], "/mutate");
    let deployment = object(&objects, "Deployment", "-webhook");
    assert_eq!(deployment["spec"]["replicas"], 2);
    let pod = &deployment["spec"]["template"]["spec"];
    assert_eq!(pod["automountServiceAccountToken"], false);
    let secret = object(&objects, "Secret", "-webhook-tls");
    assert_eq!(
        webhook["clientConfig"]["caBundle"], secret["data"]["ca.crt"],
        "one authority, not two"
    );
}
