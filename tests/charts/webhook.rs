//! The webhook as the chart runs it: the Deployment's arguments, the Secret that Helm made and the settings of the ConfigMap, given to the
//! real binary, and asked over TLS under the name and with the authority of the MutatingWebhookConfiguration.

use serde_json::{Map, Value, json};

use super::tools::{chart_with_files, documents, here, object, objects, python, success, template};

#[test]
fn the_webhook_starts_as_deployed_and_the_api_server_trusts_its_certificate() {
    let objects = objects("webhook");
    let deployment = object(&objects, "Deployment", "-webhook");
    let pod = &deployment["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let mounted = |volume: &str| {
        let mounts = container["volumeMounts"].as_array().expect("mounts");
        let mount = mounts
            .iter()
            .find(|mount| mount["name"] == volume)
            .expect("a mount");
        mount["mountPath"].as_str().expect("a path").to_owned()
    };
    let below = |directory: String, data: &Value| -> Map<String, Value> {
        let data = data.as_object().expect("data");
        data.iter()
            .map(|(name, content)| (format!("{directory}/{name}"), content.clone()))
            .collect()
    };
    let secret = object(&objects, "Secret", "-webhook-tls");
    let settings = object(&objects, "ConfigMap", "-webhook");
    let webhook =
        &object(&objects, "MutatingWebhookConfiguration", "-injector")["webhooks"][0]["clientConfig"];
    let service = &webhook["service"];
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let task = json!({
        "program": env!("CARGO_BIN_EXE_vsock-sidecar"),
        "args": container["args"],
        "files": below(mounted("config"), &settings["data"]),
        "secret": below(mounted("tls"), &secret["data"]),
        "host": format!("{}.{}.svc", text(&service["name"]), text(&service["namespace"])),
        "path": service["path"],
        "caBundle": webhook["caBundle"],
        "review": {
            "apiVersion": "admission.k8s.io/v1",
            "kind": "AdmissionReview",
            "request": {
                "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
                "kind": {"group": "", "version": "v1", "kind": "Pod"},
                "resource": {"group": "", "version": "v1", "resource": "pods"},
                "namespace": "shop",
                "operation": "CREATE",
                "userInfo": {},
                "object": {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {
                        "name": "vm",
                        "labels": {"vsock-sidecar.io/inject": "true"},
                        "annotations": {"vsock-sidecar.io/config": "vm-vsock"},
                    },
                    "spec": {"containers": [{"name": "qemu", "image": "qemu:1"}]},
                },
            },
        },
    });
    let script = here().join("webhook.py").display().to_string();
    let output = python(&[&script], &task.to_string());
    let answer: Value = serde_json::from_str(&success(output, "webhook.py")).expect("JSON");
    assert_eq!(answer["health"], 200, "{answer}");
    let response = &answer["answer"]["response"];
    assert_eq!(response["allowed"], true, "{answer}");
    assert_eq!(response["uid"], "705ab4f5-6393-11e8-b7cc-42010a800002");
    assert_eq!(response["patchType"], "JSONPatch");
}

/// Whoever knows where API servers are can keep everybody else out; Prometheus comes in all the same.
#[test]
fn reviews_are_for_whom_the_values_say_and_metrics_for_everybody() {
    let ingress = |args: &[&str]| {
        let mut all = vec!["--set", "injection.mode=webhook"];
        all.extend(args);
        let objects = documents(&success(template(&chart_with_files(), None, &all), "webhook"));
        object(&objects, "NetworkPolicy", "-webhook")["spec"]["ingress"].clone()
    };
    let port = |name: &str| json!([{"port": name, "protocol": "TCP"}]);
    assert_eq!(
        ingress(&[]),
        json!([{"ports": port("https")}, {"ports": port("vsock-metrics")}])
    );
    let from = "injection.webhook.networkPolicy.from[0].ipBlock.cidr=10.0.0.10/32";
    assert_eq!(
        ingress(&["--set", from]),
        json!([
            {"ports": port("https"), "from": [{"ipBlock": {"cidr": "10.0.0.10/32"}}]},
            {"ports": port("vsock-metrics")},
        ])
    );
}
