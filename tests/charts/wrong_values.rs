//! Values that are wrong, and the words in which the user hears of it.

use std::fs;

use super::tools::{chart_with_files, template};

/// Values as a file, words of the message.
const TABLE: &[(&str, &[&str])] = &[
    // What the schema says.
    ("{imagee: {}}", &["imagee"]),
    ("{image: {repository: ''}}", &["image/repository"]),
    ("{image: {digest: 'sha256:12'}}", &["image/digest", "sha256"]),
    (
        "{image: {pullPolicy: Sometimes}}",
        &["image/pullPolicy", "IfNotPresent"],
    ),
    (
        "{injection: {mode: mutating}}",
        &["injection/mode", "policy", "webhook"],
    ),
    (
        "{injection: {webhook: {replicas: 0}}}",
        &["injection/webhook/replicas"],
    ),
    (
        "{injection: {webhook: {certificate: {source: letsencrypt}}}}",
        &["certificate/source", "cert-manager"],
    ),
    (
        "{injection: {namespaceSelector: {vms: 'true'}}}",
        &["injection/namespaceSelector", "vms"],
    ),
    (
        "{sidecar: {resources: {memory: 1Gi}}}",
        &["sidecar/resources", "memory"],
    ),
    (
        "{metrics: {podMonitor: {interval: 30}}}",
        &["metrics/podMonitor/interval"],
    ),
    ("{commonLabels: {team: 'a b'}}", &["commonLabels/team"]),
    ("{sampleVM: {memory: 1Gi}}", &["sampleVM/memory"]),
    (
        "{grafana: {dashboard: {enabled: true}}}",
        &["grafana", "dashboard"],
    ),
    // What the sidecar's own schema in it says.
    ("{config: {guest: []}}", &["config", "guest"]),
    ("{config: {guests: []}}", &["config/guests"]),
    (
        "{config: {guests: [{name: Web, cid: 3, vhostUser: {socket: /run/vsock-sidecar/a.sock}}]}}",
        &["config/guests/0/name"],
    ),
    (
        "{config: {guests: [{name: web, cid: 2, vhostUser: {socket: /run/vsock-sidecar/a.sock}}]}}",
        &["config/guests/0/cid"],
    ),
    ("{config: {drain: {timeout: 25}}}", &["config/drain/timeout"]),
    (
        "{config: {guests: [{name: web, cid: 3, vhostUser: {socket: /run/vsock-sidecar/a.sock}, outbound: [{port: 1, to: 'http://x'}]}]}}",
        &["outbound/0/to"],
    ),
    // What contradicts itself.
    (
        "{config: {admin: {listen: ['tcp://0.0.0.0:9464']}}}",
        &[
            "config.admin.listen",
            "unix:///run/vsock-sidecar-admin/admin.sock",
            "add it",
        ],
    ),
    (
        "{config: {admin: {listen: ['unix:///run/vsock-sidecar-admin/admin.sock']}}, metrics: {podMonitor: {enabled: true}}}",
        &["metrics.podMonitor.enabled", "add tcp://0.0.0.0:9464"],
    ),
    (
        "{config: {guests: [{name: web, cid: 3, vhostUser: {socket: /tmp/web.sock}}]}}",
        &["/tmp/web.sock", "put it into /run/vsock-sidecar/"],
    ),
    (
        "{kubevirt: {plugin: {enabled: true}}, injection: {mode: webhook}}",
        &[
            "kubevirt.plugin.enabled",
            "/var/run/kubevirt-plugin/vsock-sidecar/vsock.sock",
        ],
    ),
    (
        "{kubevirt: {plugin: {enabled: true}}, configMap: {create: false}}",
        &["set injection.mode to policy or webhook"],
    ),
    ("{sampleVM: {enabled: true}}", &["set sampleVM.image"]),
    (
        "{sampleVM: {enabled: true, image: q}, configMap: {create: false}}",
        &["sampleVM.enabled", "configMap.create"],
    ),
    (
        "{metrics: {webhookPodMonitor: {enabled: true}}}",
        &["metrics.webhookPodMonitor.enabled", "injection.mode to webhook"],
    ),
    (
        "{injection: {mode: webhook, webhook: {certificate: {source: secret}}}}",
        &["set secretName", "caBundle"],
    ),
    (
        "{injection: {mode: webhook, webhook: {replicas: 1}}}",
        &[
            "injection.webhook.replicas",
            "podDisruptionBudget.enabled to false",
        ],
    ),
    (
        "{fullnameOverride: 1vm, injection: {mode: webhook}}",
        &["1vm-webhook", "begins with a letter", "fullnameOverride"],
    ),
    // The webhook's pods would wait for the webhook.
    (
        "{commonLabels: {vsock-sidecar.io/inject: 'true'}}",
        &["commonLabels", "vsock-sidecar.io/inject", "remove it"],
    ),
    (
        "{injection: {webhook: {podLabels: {vsock-sidecar.io/injected: 'true'}}}}",
        &[
            "injection.webhook.podLabels",
            "vsock-sidecar.io/injected",
            "remove it",
        ],
    ),
    ("{extraObjects: [{kind: '{{ nothing }}'}]}", &["nothing"]),
];

#[test]
fn a_wrong_value_is_refused_and_named() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("values.yaml");
    let mut wrong = Vec::new();
    for (values, words) in TABLE {
        fs::write(&file, values).expect("a file");
        let output = template(&chart_with_files(), Some(&file), &[]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            wrong.push(format!("{values} is taken"));
        } else if let Some(word) = words.iter().find(|word| !error.contains(**word)) {
            wrong.push(format!("{values}: no `{word}` in: {error}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
