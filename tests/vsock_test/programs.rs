//! Linux's test programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The directory of Linux's own vsock tests and the package that they are from, fetched and built by
/// `fetch-vsock-test.sh`.
pub fn fetch(cache: &Path, version: &str) -> (PathBuf, String) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm/fetch-vsock-test.sh");
    let mut command = Command::new("sh");
    command.arg(&script).arg(cache).arg(version).stdin(Stdio::null());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", script.display());
    let dir = cache.join("vsock-test");
    let release = fs::read_to_string(dir.join("release")).unwrap();
    (dir, release.trim().to_owned())
}
