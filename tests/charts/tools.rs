//! Helm and Python's tools, and what they make of the charts.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

/// Where everything of the repository is.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The chart as it is in the repository.
pub fn chart() -> PathBuf {
    root().join("charts/vsock-sidecar")
}

/// This target's own files.
pub fn here() -> PathBuf {
    root().join("tests/charts")
}

/// Whether generated files are written rather than compared.
pub fn is_update() -> bool {
    std::env::var_os("UPDATE_CHARTS").is_some()
}

/// Compares a generated file with what is in the repository, or writes it.
pub fn hold(path: &Path, made: &str) {
    let there = fs::read_to_string(path).unwrap_or_default();
    if there == made {
        return;
    }
    assert!(
        is_update(),
        "{} is not what it is made of; run: UPDATE_CHARTS=1 cargo test --test charts",
        path.display()
    );
    fs::write(path, made).expect("the repository can be written to");
}

/// A tool of `tests/kubernetes/tools.sh`.
fn tool(path: &str) -> PathBuf {
    let tool = root().join("target/kubernetes-tools").join(path);
    assert!(
        tool.exists(),
        "{} is missing; install it with: sh tests/kubernetes/tools.sh",
        tool.display()
    );
    tool
}

/// Helm, in a home of its own: neither the user's settings nor a cluster of theirs are any business of the tests.
pub fn helm(args: &[&str]) -> Output {
    static HOME: OnceLock<tempfile::TempDir> = OnceLock::new();
    let home = HOME.get_or_init(|| tempfile::tempdir().expect("a temporary directory"));
    Command::new(tool("helm"))
        .args(args)
        .current_dir(root())
        .env("HOME", home.path())
        .env("XDG_CACHE_HOME", home.path().join("cache"))
        .env("XDG_CONFIG_HOME", home.path().join("config"))
        .env("XDG_DATA_HOME", home.path().join("data"))
        .env("KUBECONFIG", "/nonexistent")
        .stdin(Stdio::null())
        .output()
        .expect("helm runs")
}

/// Standard output of a run that has to succeed.
pub fn success(output: Output, what: &str) -> String {
    assert!(
        output.status.success(),
        "{what}: {}\n{}",
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout)
    );
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// A program of the Python environment, with `input` as its standard input.
pub fn python(args: &[&str], input: &str) -> Output {
    let mut child = Command::new(tool("venv/bin/python"))
        .args(args)
        .current_dir(root())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("Python runs");
    let mut stdin = child.stdin.take().expect("a pipe");
    let input = input.to_owned();
    // By a thread: the child may fill its own pipes before it has read all of ours.
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().expect("Python ends");
    let _ = writer.join();
    output
}

/// The real binary.
pub fn vsock_sidecar(args: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
    child.wait_with_output().expect("the binary ends")
}

/// The charts in a directory of their own, with a file of rules and a dashboard beside those that are there: what the chart loads must be
/// all there is, and these tests must not hang on it.
pub fn chart_with_files() -> PathBuf {
    static COPY: OnceLock<tempfile::TempDir> = OnceLock::new();
    let copy = COPY.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        copy_tree(&root().join("charts"), &dir.path().join("charts"));
        let chart = dir.path().join("charts/vsock-sidecar");
        for (kind, file) in [
            ("rules", "test-rules.yaml"),
            ("dashboards", "test_dashboard.json"),
        ] {
            fs::create_dir_all(chart.join(kind)).expect("a directory");
            fs::copy(here().join("files").join(file), chart.join(kind).join(file)).expect("a file");
        }
        dir
    });
    copy.path().join("charts/vsock-sidecar")
}

/// Copies a tree, symbolic links as what they lead to.
pub fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory");
    for entry in fs::read_dir(from).expect("a directory to read") {
        let entry = entry.expect("an entry");
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if source.is_dir() {
            copy_tree(&source, &target);
        } else {
            fs::copy(&source, &target).expect("a file");
        }
    }
}

/// All files of `ci/`.
pub fn values_files() -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(chart().join("ci"))
        .expect("ci/")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    assert!(files.len() >= 7, "{files:?}");
    files
}

/// The name of a file without what every file of `ci/` ends in.
pub fn name_of(values: &Path) -> String {
    let name = values.file_name().and_then(|name| name.to_str()).expect("a name");
    name.trim_end_matches("-values.yaml").to_owned()
}

/// What `helm template` says, with a file of values and more arguments.
pub fn template(chart: &Path, values: Option<&Path>, args: &[&str]) -> Output {
    let chart = chart.display().to_string();
    let values = values.map(|values| values.display().to_string());
    let mut all = vec!["template", "web", chart.as_str(), "--namespace", "vms"];
    if let Some(values) = &values {
        all.extend(["--values", values.as_str()]);
    }
    if !args.contains(&"--kube-version") {
        all.extend(["--kube-version", "1.37.0"]);
    }
    all.extend(args);
    helm(&all)
}

/// What is rendered of a file of `ci/`.
pub fn objects(values: &str) -> Vec<Value> {
    let file = chart().join(format!("ci/{values}-values.yaml"));
    documents(&success(template(&chart_with_files(), Some(&file), &[]), values))
}

/// The documents of a YAML stream that are not empty.
pub fn documents(text: &str) -> Vec<Value> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).expect("YAML");
    documents
        .into_iter()
        .filter(|document| !document.is_null())
        .collect()
}

/// The only object of a kind and, if given, a name that ends so.
pub fn object<'a>(objects: &'a [Value], kind: &str, ending: &str) -> &'a Value {
    let mut found = objects.iter().filter(|object| {
        object["kind"] == kind
            && object["metadata"]["name"]
                .as_str()
                .is_some_and(|name| name.ends_with(ending))
    });
    let first = found.next().unwrap_or_else(|| panic!("a {kind} …{ending}"));
    assert!(found.next().is_none(), "two {kind} …{ending}");
    first
}
