//! Facts about the build that `vsock_build_info` and `--version` show.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=VSOCK_SIDECAR_REVISION");
    println!("cargo::rerun-if-env-changed=RUSTC");
    set("VSOCK_SIDECAR_REVISION", revision());
    set("VSOCK_SIDECAR_RUSTC", rustc_version());
    set("VSOCK_SIDECAR_TARGET", std::env::var("TARGET").ok());
}

fn set(name: &str, value: Option<String>) {
    println!(
        "cargo::rustc-env={name}={}",
        value.as_deref().unwrap_or("unknown")
    );
}

/// The commit: said by whoever builds without a repository (an image build), else asked from git, else unknown.
fn revision() -> Option<String> {
    if let Ok(said) = std::env::var("VSOCK_SIDECAR_REVISION")
        && !said.trim().is_empty()
    {
        return Some(said.trim().to_owned());
    }
    // Not the repository that a vendored or installed copy of this package happens to lie in.
    let here = std::env::var("CARGO_MANIFEST_DIR").ok()?;
    let top = output("git", &["rev-parse", "--show-toplevel"])?;
    if Path::new(&top).canonicalize().ok()? != Path::new(&here).canonicalize().ok()? {
        return None;
    }
    // HEAD names a branch and stays the same at a commit; the log of HEAD grows with each one.
    for file in ["HEAD", "logs/HEAD"] {
        if let Some(path) = output("git", &["rev-parse", "--git-path", file])
            && Path::new(&path).exists()
        {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    output("git", &["rev-parse", "--short=12", "HEAD"])
}

/// `1.90.0` of `rustc 1.90.0 (1159e78c4 2025-09-14)`.
fn rustc_version() -> Option<String> {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    output(&rustc, &["--version"])?
        .split(' ')
        .nth(1)
        .map(str::to_owned)
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    if !output.status.success() {
        return None;
    }
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}
