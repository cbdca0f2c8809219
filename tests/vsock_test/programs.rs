//! What the guests have beside kernel and init: Linux's test programs, and modules that no other test loads.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vsock_sidecar::demo::vm::cpio::Archive;

use crate::vm::assets::Assets;

/// Adds modules that `fetch-kernels.sh` keeps apart, loaded behind the others, and programs, which go to `/bin`.
pub fn add(assets: &mut Assets, modules: impl Fn(&str) -> bool, programs: &[PathBuf]) {
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    let mut archive = Archive::default();
    for entry in fs::read_dir(assets.kernel.with_file_name("extra")).unwrap() {
        let path = entry.unwrap().path();
        let name = name(&path);
        // `NN-NAME.ko`
        if modules(name[3..].trim_end_matches(".ko")) {
            let content = fs::read(&path).unwrap();
            archive.file(&format!("modules/{name}"), 0o644, &content).unwrap();
        }
    }
    archive.directory("bin");
    for path in programs {
        let content = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        archive
            .file(&format!("bin/{}", name(path)), 0o755, &content)
            .unwrap();
    }
    assets.initramfs.extend(archive.finish());
}

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
