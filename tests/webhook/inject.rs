//! `vsock-sidecar inject`: manifests from a file and from standard input.

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::support::{IMAGE, expect, request};

fn inject(arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"))
        .args(["inject", "--image", IMAGE])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may end without having read all.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

#[test]
fn a_manifest_becomes_what_the_webhook_makes_of_it() {
    let pod = request("qemu-pod")["request"]["object"].to_string();
    let output = inject(&["-"], &pod);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let after: Value = serde_saphyr::from_str(&String::from_utf8(output.stdout).unwrap()).unwrap();
    expect("qemu-pod", &after);
}

#[test]
fn settings_come_from_a_file_and_the_command_line_goes_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let (manifest, settings) = (dir.path().join("pod.yaml"), dir.path().join("settings.yaml"));
    fs::write(&manifest, request("qemu-pod")["request"]["object"].to_string()).unwrap();
    fs::write(
        &settings,
        "imagePullPolicy: Never\nresources: {requests: {cpu: 1m}}\n",
    )
    .unwrap();
    let arguments = [
        "--config",
        settings.to_str().unwrap(),
        "--image-pull-policy",
        "Always",
        manifest.to_str().unwrap(),
    ];
    let output = inject(&arguments, "");
    let after: Value = serde_saphyr::from_str(&String::from_utf8(output.stdout).unwrap()).unwrap();
    let container = &after["spec"]["initContainers"][0];
    assert_eq!(container["imagePullPolicy"], "Always");
    assert_eq!(container["resources"]["requests"]["cpu"], "1m");
}

#[test]
fn what_cannot_be_injected_is_bad_usage_and_one_line() {
    let no_config = request("qemu-pod")["request"]["object"]
        .to_string()
        .replace("vsock-sidecar.io/config", "else");
    for (arguments, input, word) in [
        (&["-"][..], no_config.as_str(), "Pod vm-web"),
        (&["-"], "kind: Service", "no pod here asks"),
        (&["/nonexistent.yaml"], "", "/nonexistent.yaml"),
        (
            &["--config", "/nonexistent.yaml", "-"],
            "",
            "settings /nonexistent.yaml",
        ),
        (&["-"], "a: [", "line 1"),
    ] {
        let output = inject(arguments, input);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{said}");
        assert!(said.contains(word) && said.lines().count() == 1, "{said}");
        assert!(output.stdout.is_empty());
    }
}
