//! What a guest is booted from: a kernel, its modules and our init program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::cpio::Archive;

/// The kernels that the tests ask for.
const VERSIONS: [&str; 2] = ["6.1", "6.12"];
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A kernel and the initramfs that goes with it.
#[derive(Clone, Debug)]
pub struct Assets {
    /// The kernel's release, as `uname -r` tells it.
    pub release: String,
    /// `vmlinux`, an ELF file.
    pub kernel: PathBuf,
    /// An uncompressed cpio archive: `/init` and `/modules`.
    pub initramfs: Vec<u8>,
}

/// Kernels and guest program, fetched and built once; panics with what to do when that is not possible.
pub fn assets(version: &str) -> Assets {
    static PREPARED: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let init = match PREPARED.get_or_init(|| fetch_kernels().and_then(|()| build_init())) {
        Ok(init) => fs::read(init).unwrap(),
        Err(why) => panic!("the real guest cannot be prepared: {why}"),
    };
    let dir = directory().join(version);
    let release = fs::read_to_string(dir.join("release")).unwrap().trim().to_owned();
    // Elsewhere than on Debian the script may have had to take the distribution's kernel. That is a test worth having,
    // but never in place of the ones that decide.
    let substitute = !release.starts_with(&format!("{version}."));
    assert!(
        !substitute || std::env::var_os("CI").is_none(),
        "Linux {version} is wanted, {release} was found"
    );
    if substitute {
        super::lab::tell(&format!(
            "Linux {version} is not to be had here: {release} takes its place"
        ));
    }
    Assets {
        release,
        kernel: dir.join("vmlinux"),
        initramfs: initramfs(&init, &dir.join("modules")),
    }
}

/// `vm` below cargo's target directory: kernels, the guest program's own target directory.
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("tmp is below target")
        .join("vm")
}

fn initramfs(init: &[u8], modules: &Path) -> Vec<u8> {
    let mut archive = Archive::default();
    for name in ["dev", "proc", "sys", "modules"] {
        archive.directory(name);
    }
    archive.file("init", 0o755, init);
    for entry in fs::read_dir(modules).unwrap().map(Result::unwrap) {
        let name = format!("modules/{}", entry.file_name().to_string_lossy());
        archive.file(&name, 0o644, &fs::read(entry.path()).unwrap());
    }
    archive.finish()
}

fn fetch_kernels() -> Result<(), String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm/fetch-kernels.sh");
    let mut command = Command::new("sh");
    command.arg(script).arg(directory()).args(VERSIONS);
    succeed(&mut command)
}

/// Builds the guest's program. Static, because the guest has no libraries; the target is named even where it is the host's
/// own, because only then do flags for it stay away from build scripts and procedural macros.
fn build_init() -> Result<PathBuf, String> {
    let target_dir = directory().join("guest");
    let mut command = Command::new(env!("CARGO"));
    command.args([
        "build",
        "--quiet",
        "--release",
        "--locked",
        "--target",
        TARGET,
        "--manifest-path",
    ]);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/Cargo.toml"));
    command.arg("--target-dir").arg(&target_dir);
    // What was set for this package (coverage, sanitizers, a linker) is not for the guest.
    for (name, _) in std::env::vars() {
        if name.starts_with("CARGO_") && name != "CARGO_HOME" && !name.starts_with("CARGO_NET") {
            command.env_remove(name);
        }
    }
    command
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER");
    command.env("RUSTFLAGS", "-C target-feature=+crt-static");
    succeed(&mut command)?;
    Ok(target_dir.join(TARGET).join("release/vsock-test-guest"))
}

fn succeed(command: &mut Command) -> Result<(), String> {
    let output = command
        .output()
        .map_err(|e| format!("cannot run {command:?}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{command:?} ended with {}:\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    ))
}
