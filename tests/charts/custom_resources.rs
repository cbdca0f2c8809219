//! Kinds that Kubernetes itself does not know, held to small schemas of our own: those of the Prometheus Operator, and KubeVirt's Plugin.
//! cert-manager's are held to the few fields that matter here.

use std::fs;

use serde_json::{Value, json};

use super::tools::{chart_with_files, documents, here, object, objects, python, success, template};

fn judge(object: &Value, schema: &str) {
    let text = fs::read_to_string(here().join("custom_resources").join(schema)).expect("a schema");
    let schema: Value = serde_json::from_str(&text).expect("JSON");
    let validator = jsonschema::draft202012::new(&schema).expect("a schema");
    if let Err(error) = validator.validate(object) {
        panic!(
            "{} {}: {}: {error}",
            object["kind"],
            object["metadata"]["name"],
            error.instance_path()
        );
    }
}

#[test]
fn pod_monitors_select_injected_pods_and_the_webhooks_own() {
    let objects = objects("everything");
    let sidecars = object(&objects, "PodMonitor", "web-vsock");
    judge(sidecars, "podmonitor.json");
    assert_eq!(
        sidecars["spec"]["selector"]["matchLabels"],
        json!({"vsock-sidecar.io/injected": "true"})
    );
    let webhook = object(&objects, "PodMonitor", "-webhook");
    judge(webhook, "podmonitor.json");
    let deployment = object(&objects, "Deployment", "-webhook");
    assert_eq!(webhook["spec"]["selector"], deployment["spec"]["selector"]);
}

#[test]
fn rules_are_those_of_all_files_with_their_templates_untouched() {
    let objects = objects("everything");
    let rule = object(&objects, "PrometheusRule", "web-vsock");
    judge(rule, "prometheusrule.json");
    let groups = rule["spec"]["groups"].as_array().expect("groups");
    let mut expected = Vec::new();
    for entry in fs::read_dir(chart_with_files().join("rules")).expect("rules/") {
        let text = fs::read_to_string(entry.expect("an entry").path()).expect("a file of rules");
        let file: Value = serde_saphyr::from_str(&text).expect("YAML");
        expected.extend(
            file["groups"]
                .as_array()
                .expect("groups")
                .iter()
                .map(|group| group["name"].clone()),
        );
    }
    let mut names: Vec<Value> = groups.iter().map(|group| group["name"].clone()).collect();
    names.sort_by_key(Value::to_string);
    expected.sort_by_key(Value::to_string);
    assert_eq!(names, expected);

    let of_test = groups
        .iter()
        .find(|group| group["name"] == "test-rules")
        .expect("the file of the test");
    let alert = &of_test["rules"][0];
    assert_eq!(
        alert["annotations"]["summary"],
        "{{ $labels.guest }} of pod {{ $labels.pod }}"
    );
    assert_eq!(
        alert["labels"],
        json!({"severity": "warning", "team": "virtualisation"}),
        "labels are added, not replaced"
    );
    let runbook = &alert["annotations"]["runbook_url"];
    assert_eq!(
        runbook,
        "https://git.example.org/vsock-sidecar/docs/alerts.md#testalert"
    );
    assert_eq!(
        of_test["rules"][1]["labels"],
        Value::Null,
        "a recorded series gets no label of alerts"
    );
}

#[test]
fn each_dashboard_is_a_config_map_with_the_file_as_it_is() {
    let objects = objects("everything");
    let files = fs::read_dir(chart_with_files().join("dashboards")).expect("dashboards/");
    let mut count = 0;
    for entry in files {
        let path = entry.expect("an entry").path();
        let text = fs::read_to_string(&path).expect("a dashboard");
        let found = objects.iter().any(|object| {
            let matches = object["metadata"]["labels"]["grafana_dashboard"] == "1"
                && object["data"]
                    .as_object()
                    .is_some_and(|data| data.values().any(|data| data == text.trim()));
            assert!(!matches || object["metadata"]["annotations"]["grafana_folder"] == "Virtual machines");
            matches
        });
        assert!(found, "{}", path.display());
        count += 1;
    }
    assert!(count >= 1);
}

#[test]
fn the_kubevirt_plugin_shares_memory_and_appends_to_qemus_arguments() {
    let objects = objects("kubevirt");
    let plugin = object(&objects, "Plugin", "vsock-sidecar");
    judge(plugin, "plugin.json");
    assert_eq!(
        plugin["metadata"]["name"], "vsock-sidecar",
        "the directory of its sockets has this name"
    );
    let expression = plugin["spec"]["domainHooks"][0]["cel"]["expression"]
        .as_str()
        .expect("an expression");
    let device = [
        r#"Type: "memfd""#,
        r#"Mode: "shared""#,
        "has(domainSpec.QEMUCommandline) ? domainSpec.QEMUCommandline.Args : []",
        "socket,id=vsocksidecar0,path=/var/run/kubevirt-plugin/vsock-sidecar/vsock.sock",
        "vhost-user-vsock-pci-non-transitional,id=vsocksidecar0-dev,chardev=vsocksidecar0",
    ];
    for part in device {
        assert!(expression.contains(part), "{part} in {expression}");
    }
    // QEMU does not start with it.
    assert!(!expression.contains("reconnect"));
    // The webhook is no policy for KubeVirt to look for.
    assert_eq!(plugin["spec"]["mutatingAdmissionPolicies"], Value::Null);
}

/// What an implementation of CEL makes of an expression, for each context.
fn evaluated(expression: &Value, contexts: &[Value]) -> Vec<Value> {
    let expressions: Vec<Value> = contexts
        .iter()
        .map(|context| json!({"expression": expression, "context": context}))
        .collect();
    let script = here().join("cel.py").display().to_string();
    let output = python(&[&script], &json!({"expressions": expressions}).to_string());
    serde_json::from_str(&success(output, "cel.py")).expect("JSON")
}

#[test]
fn the_kubevirt_plugin_keeps_arguments_that_are_there_and_adds_its_own_once() {
    let objects = objects("kubevirt");
    let spec = &object(&objects, "Plugin", "vsock-sidecar")["spec"];
    let expression = &spec["domainHooks"][0]["cel"]["expression"];
    let domain = |args: &Value| json!({"domainSpec": {"QEMUCommandline": {"Args": args}}});
    let ignition = json!([{"Value": "-fw_cfg"}, {"Value": "name=opt/com.coreos/config,file=/x"}]);
    let first = evaluated(expression, &[json!({"domainSpec": {}}), domain(&ignition)]);
    let args = |edited: &Value| {
        edited["QEMUCommandline"]["Args"]
            .as_array()
            .expect("arguments")
            .clone()
    };
    let own = args(&first[0]);
    let words: Vec<&str> = own.iter().filter_map(|arg| arg["Value"].as_str()).collect();
    assert_eq!(words.len(), 4, "{words:?}");
    assert_eq!((words[0], words[2]), ("-chardev", "-device"));
    assert_eq!(first[0]["MemoryBacking"]["MemorySource"]["Type"], "memfd");
    assert_eq!(first[0]["MemoryBacking"]["MemoryAccess"]["Mode"], "shared");
    let both: Vec<Value> = ignition
        .as_array()
        .into_iter()
        .flatten()
        .chain(&own)
        .cloned()
        .collect();
    assert_eq!(args(&first[1]), both);
    // KubeVirt may ask again.
    let again = evaluated(expression, &[domain(&json!(both))]);
    assert_eq!(args(&again[0]), both);

    let vmi = |labels: Value| json!({"vmi": {"Labels": labels}});
    let asks = vmi(json!({"vsock-sidecar.io/inject": "true"}));
    let asks_not = vmi(json!({"vsock-sidecar.io/inject": "false"}));
    let condition = evaluated(&spec["condition"], &[asks, asks_not, vmi(json!({"app": "web"}))]);
    assert_eq!(condition, [json!(true), json!(false), json!(false)]);
}

#[test]
fn the_kubevirt_plugin_names_the_policy_that_adds_its_container() {
    let objects = objects("kubevirt-policy");
    let plugin = object(&objects, "Plugin", "vsock-sidecar");
    judge(plugin, "plugin.json");
    let policy = object(&objects, "MutatingAdmissionPolicy", "-injector");
    let names = json!([{"name": policy["metadata"]["name"]}]);
    assert_eq!(plugin["spec"]["mutatingAdmissionPolicies"], names);
}

#[test]
fn cert_manager_is_asked_for_the_names_that_the_api_server_calls() {
    let objects = objects("cert-manager");
    let certificate = object(&objects, "Certificate", "-webhook");
    let webhook = object(&objects, "MutatingWebhookConfiguration", "-injector");
    let service = &webhook["webhooks"][0]["clientConfig"]["service"];
    let host = format!(
        "{}.{}.svc",
        service["name"].as_str().expect("a name"),
        service["namespace"].as_str().expect("a namespace")
    );
    assert_eq!(certificate["spec"]["dnsNames"][0], host);
    let from = &webhook["metadata"]["annotations"]["cert-manager.io/inject-ca-from"];
    assert_eq!(
        from,
        &json!(format!(
            "vms/{}",
            certificate["metadata"]["name"].as_str().expect("a name")
        ))
    );
    let deployment = object(&objects, "Deployment", "-webhook");
    let volumes = deployment["spec"]["template"]["spec"]["volumes"]
        .as_array()
        .expect("volumes");
    assert!(
        volumes
            .iter()
            .any(|volume| volume["secret"]["secretName"] == certificate["spec"]["secretName"])
    );
}

/// A certificate that signed itself would be its own caBundle, and at each renewal the API server would refuse the old one that pods go on
/// showing until their volume changes.
#[test]
fn the_charts_own_authority_outlives_the_certificates_that_it_signs() {
    let args = [
        "--set",
        "injection.mode=webhook",
        "--set",
        "injection.webhook.certificate.source=cert-manager",
    ];
    let objects = documents(&success(
        template(&chart_with_files(), None, &args),
        "cert-manager",
    ));
    let certificate = object(&objects, "Certificate", "-webhook");
    let issuer = object(&objects, "Issuer", "-webhook");
    assert_eq!(
        certificate["spec"]["issuerRef"],
        json!({"name": issuer["metadata"]["name"], "kind": "Issuer"})
    );
    let authority = object(&objects, "Certificate", "-ca");
    assert_eq!(
        issuer["spec"]["ca"]["secretName"],
        authority["spec"]["secretName"]
    );
    assert_eq!(authority["spec"]["isCA"], true);
    assert_eq!(authority["spec"]["duration"], "87600h");
    let first = object(&objects, "Issuer", "-self-signed");
    assert_eq!(authority["spec"]["issuerRef"]["name"], first["metadata"]["name"]);
    assert_eq!(first["spec"], json!({"selfSigned": {}}));
}
