//! The library chart, used as its README says: by a chart of one's own, and template by template.

use std::fs;
use std::process::Output;
use std::sync::OnceLock;

use serde_json::{Value, json};

use super::pods::assert_restricted;
use super::tools::{copy_tree, documents, helm, here, object, root, success};

/// `charts/` and the chart of the tests beside each other as in the repository, with the dependency built.
fn fixture() -> String {
    static COPY: OnceLock<tempfile::TempDir> = OnceLock::new();
    let copy = COPY.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        copy_tree(&root().join("charts"), &dir.path().join("charts"));
        let chart = dir.path().join("tests/charts/fixture-vm");
        copy_tree(&here().join("fixture-vm"), &chart);
        let path = chart.display().to_string();
        success(helm(&["dependency", "build", &path]), "dependency build");
        dir
    });
    copy.path().join("tests/charts/fixture-vm").display().to_string()
}

fn render(args: &[&str]) -> Output {
    let fixture = fixture();
    let mut all = vec![
        "template",
        "shop",
        fixture.as_str(),
        "--namespace",
        "shop",
        "--kube-version",
        "1.37.0",
    ];
    all.extend(args);
    helm(&all)
}

/// What a template of the library makes of settings in YAML, by way of a ConfigMap that the chart of the tests has for that.
pub fn include(template: &str, settings: &str) -> Value {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let values = dir.path().join("values.yaml");
    let indented = settings.replace('\n', "\n    ");
    fs::write(
        &values,
        format!("try:\n  template: {template}\n  settings:\n    {indented}\n"),
    )
    .expect("a file");
    let output = render(&[
        "--values",
        &values.display().to_string(),
        "--show-only",
        "templates/try.yaml",
    ]);
    let objects = documents(&success(output, template));
    let text = objects[0]["data"]["result"].as_str().expect("a result");
    serde_saphyr::from_str(text).unwrap_or_else(|_| json!(text))
}

fn refused(template: &str, settings: &str) -> String {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let values = dir.path().join("values.yaml");
    fs::write(
        &values,
        format!("try:\n  template: {template}\n  settings: {settings}\n"),
    )
    .expect("a file");
    let output = render(&[
        "--values",
        &values.display().to_string(),
        "--show-only",
        "templates/try.yaml",
    ]);
    assert!(!output.status.success(), "{settings} is taken");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_chart_of_ones_own_has_the_sidecar_by_five_lines() {
    let path = fixture();
    success(helm(&["lint", "--strict", "--quiet", &path]), "lint");
    let objects = documents(&success(render(&[]), "the chart of the tests"));
    let pod = object(&objects, "Pod", "shop-vm");
    assert_eq!(
        pod["metadata"]["labels"]["vsock-sidecar.io/injected"], "true",
        "the PodMonitor finds it"
    );
    let spec = &pod["spec"];
    let sidecar = &spec["initContainers"][0];
    assert_eq!(
        (&sidecar["name"], &sidecar["restartPolicy"]),
        (&json!("vsock-sidecar"), &json!("Always"))
    );
    assert_restricted("fixture", spec, sidecar);
    let vmm = &spec["containers"][0];
    let mount = vmm["volumeMounts"]
        .as_array()
        .expect("mounts")
        .iter()
        .find(|mount| mount["name"] == "vsock-sidecar-socket");
    assert_eq!(
        mount.expect("the socket's volume")["mountPath"],
        "/run/vsock-sidecar"
    );
    let args: Vec<&str> = vmm["args"]
        .as_array()
        .expect("arguments")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    assert!(
        args.windows(2).any(|two| two
            == [
                "-chardev",
                "socket,id=vsocksidecar0,path=/run/vsock-sidecar/vsock.sock"
            ]),
        "{args:?}"
    );
    assert!(
        args.contains(&"memory-backend-memfd,id=vsocksidecar0-mem,size=2G,share=on"),
        "{args:?}"
    );
    assert!(
        spec["volumes"]
            .as_array()
            .is_some_and(|volumes| volumes.len() == 4),
        "three of ours beside its own"
    );
}

#[test]
fn settings_change_what_they_say() {
    let digest = format!("sha256:{}", "0".repeat(64));
    let text = format!(
        "{{configMap: c, image: {{repository: r.example/v, digest: '{digest}'}}, runAsUser: null, livenessProbe: {{enabled: false}}}}"
    );
    let container = include("container", &text);
    assert_eq!(container["image"], format!("r.example/v@{digest}"));
    assert_eq!(
        container["securityContext"]["runAsUser"],
        Value::Null,
        "null leaves it to the pod"
    );
    assert_eq!(container["livenessProbe"], Value::Null);
    assert_eq!(container["readinessProbe"]["periodSeconds"], 10);

    let text = "{configMap: c, resources: {limits: {memory: 1Gi}}, startupProbe: {failureThreshold: 300}, socketName: web.sock}";
    let container = include("container", text);
    assert_eq!(
        container["resources"],
        json!({"limits": {"memory": "1Gi"}}),
        "resources are replaced as a whole"
    );
    assert_eq!(container["startupProbe"]["failureThreshold"], 300);
    assert_eq!(container["startupProbe"]["periodSeconds"], 1);
    assert_eq!(container["securityContext"]["runAsUser"], 65532);
    assert_eq!(include("socket", text), "/run/vsock-sidecar/web.sock");

    let text = "{configMap: c, env: [{name: A, value: b}], volumeMounts: [{name: app, mountPath: /run/app}]}";
    let container = include("container", text);
    assert_eq!(container["env"][1], json!({"name": "A", "value": "b"}));
    assert_eq!(
        container["volumeMounts"][3],
        json!({"name": "app", "mountPath": "/run/app"})
    );
}

#[test]
fn arguments_of_the_vmm_name_the_socket_and_share_memory() {
    let qemu = include("qemuArgs", "{memory: 4G, settings: {socketName: web.sock}}");
    assert_eq!(
        qemu,
        json!([
            "-m",
            "4G",
            "-object",
            "memory-backend-memfd,id=vsocksidecar0-mem,size=4G,share=on",
            "-machine",
            "memory-backend=vsocksidecar0-mem",
            "-chardev",
            "socket,id=vsocksidecar0,path=/run/vsock-sidecar/web.sock",
            "-device",
            "vhost-user-vsock-pci-non-transitional,id=vsocksidecar0-dev,chardev=vsocksidecar0"
        ])
    );
    let cloud_hypervisor = include("cloudHypervisorArgs", "{memory: 4G, settings: {}}");
    assert_eq!(
        cloud_hypervisor,
        json!([
            "--memory",
            "size=4G,shared=on",
            "--generic-vhost-user",
            "socket=/run/vsock-sidecar/vsock.sock,device_type=vsock,queue_sizes=[128,128,128]"
        ])
    );
}

#[test]
fn a_wrong_setting_is_refused_with_what_to_do() {
    let table = [
        ("container", "{}", "give `configMap`"),
        ("volumes", "{}", "give `configMap`"),
        (
            "container",
            "{configMap: c, imagee: x}",
            "unknown setting `imagee`; there are: configMap",
        ),
        (
            "container",
            "{configMap: c, image: {name: x}}",
            "unknown setting `image.name`",
        ),
        (
            "container",
            "{configMap: c, image: vsock-sidecar:1}",
            "the setting `image` is a mapping",
        ),
        ("container", "{configMap: c, runAsUser: 0}", "is root"),
        (
            "container",
            "{configMap: c, socketName: /run/x.sock}",
            "without a directory",
        ),
        ("container", "just text", "take one mapping of settings"),
        ("qemuArgs", "{memory: lots}", "such as 512M or 4G"),
        ("qemuArgs", "{mem: 4G}", "takes (dict"),
        ("cloudHypervisorArgs", "{settings: {}}", "such as 512M or 4G"),
    ];
    for (template, settings, words) in table {
        let error = refused(template, settings);
        assert!(error.contains(words), "{template} {settings}: {error}");
    }
}
