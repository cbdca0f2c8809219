//! What becomes of recorded pods.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use vsock_sidecar::webhook::{Outcome, Settings, inject};

pub(crate) const IMAGE: &str = "registry.example/vsock-sidecar:0.1.0";

fn here(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/webhook")
        .join(name)
}

pub(crate) fn request(name: &str) -> Value {
    let text = fs::read_to_string(here(&format!("requests/{name}.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Applies a JSON patch by somebody else's hand.
pub(crate) fn apply(pod: &Value, operations: &Value) -> Value {
    let patch: json_patch::Patch = serde_json::from_value(operations.clone()).unwrap();
    let mut pod = pod.clone();
    json_patch::patch(&mut pod, &patch).unwrap();
    pod
}

/// Compares a pod with what is written down.
#[track_caller]
pub(crate) fn expect(name: &str, pod: &Value) {
    let file = here(&format!("golden/{name}.json"));
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(&file, format!("{pod:#}\n")).unwrap();
    }
    let expected = fs::read_to_string(&file).unwrap_or_default();
    assert_eq!(format!("{pod:#}\n"), expected, "{} differs", file.display());
}

fn settings() -> Settings {
    Settings::new(IMAGE).unwrap()
}

#[test]
fn recorded_pods_become_the_golden_ones_and_stay_so() {
    for name in ["qemu-pod", "kubevirt-pod"] {
        let pod = &request(name)["request"]["object"];
        let Outcome::Injected { patched, warnings } = inject(pod, &settings()).unwrap() else {
            panic!("{name} was not injected");
        };
        assert_eq!(warnings, Vec::<String>::new(), "{name}");
        let after = apply(pod, &json!(patched.operations()));
        assert_eq!(&after, patched.document(), "{name}");
        expect(name, &after);
        assert_eq!(inject(&after, &settings()), Ok(Outcome::Unchanged), "{name}");
    }
}

#[test]
fn a_pod_without_the_label_is_left_alone() {
    let pod = &request("plain-pod")["request"]["object"];
    assert_eq!(
        inject(pod, &settings()),
        Ok(Outcome::NotSelected { warning: None })
    );
}
