//! Programs, files and YAML.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// Where everything of the repository is.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Cargo's target directory.
pub fn target() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap()
}

/// A file of the repository.
#[track_caller]
pub fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The program under test.
pub fn sidecar() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"))
}

/// A program that has to be there.
#[track_caller]
pub fn run(command: &mut Command, install: &str) -> Output {
    let program = command.get_program().to_string_lossy().into_owned();
    command
        .current_dir(root())
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program}: {error}; install it with: {install}"))
}

/// How most of them are had.
pub const IMAGE_TOOLS: &str = "sh tests/kubernetes/image-tools.sh";

/// Both streams of a run that has to succeed.
#[track_caller]
pub fn success(output: Output) -> String {
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{}: {said}", output.status);
    said
}

/// Documents of a YAML text.
#[track_caller]
pub fn documents(yaml: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(yaml).unwrap_or_else(|error| panic!("{error}\n{yaml}"))
}

/// The only document of a YAML file of the repository.
#[track_caller]
pub fn document(path: &str) -> Value {
    serde_saphyr::from_str(&text(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Files below a directory of the repository that end with `end`, by their path in it; links are not followed.
pub fn files(directory: &str, end: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut directories = vec![PathBuf::from(directory)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(root().join(&directory)).unwrap().flatten() {
            let path = directory.join(entry.file_name());
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                directories.push(path);
            } else if kind.is_file() && entry.file_name().to_string_lossy().ends_with(end) {
                found.push(path.display().to_string());
            }
        }
    }
    found.sort();
    found
}

/// The elements of a list, none if it is missing.
pub fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The element of a list whose key `name` is this.
#[track_caller]
pub fn named<'a>(value: &'a Value, name: &str) -> &'a Value {
    list(value)
        .iter()
        .find(|element| element["name"] == name)
        .unwrap_or_else(|| panic!("no {name} in {value:#}"))
}
