//! What a guest is booted from, prepared once; panics with what to do when that is not possible.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

pub use vsock_sidecar::demo::vm::assets::Assets;
use vsock_sidecar::demo::vm::assets::Source;
use vsock_sidecar::demo::vm::cpio::Archive;

/// The kernels that the tests ask for.
const VERSIONS: [&str; 2] = ["6.1", "6.12"];

/// Kernels and guest program, fetched and built once.
pub fn assets(version: &str) -> Assets {
    static PREPARED: OnceLock<Result<(Source, PathBuf), String>> = OnceLock::new();
    let (source, init) = match PREPARED.get_or_init(prepare) {
        Ok(prepared) => prepared,
        Err(why) => panic!("the real guest cannot be prepared: {why}"),
    };
    let assets = source.assets(version, init).unwrap_or_else(|e| panic!("{e}"));
    // Elsewhere than on Debian the script may have had to take the distribution's kernel. That is a test worth having,
    // but never in place of the ones that decide.
    let release = &assets.release;
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
    assets
}

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
pub fn vsock_test(cache: &Path) -> (PathBuf, String) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm/fetch-vsock-test.sh");
    let mut command = Command::new("sh");
    command.arg(&script).arg(cache).arg("6.12").stdin(Stdio::null());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", script.display());
    let dir = cache.join("vsock-test");
    let release = fs::read_to_string(dir.join("release")).unwrap();
    (dir, release.trim().to_owned())
}

fn prepare() -> Result<(Source, PathBuf), String> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("tmp is below target");
    let source = Source::find(Some(target))
        .map_err(|e| e.to_string())?
        .may_install();
    source
        .fetch_kernels(&VERSIONS, &mut || true)
        .map_err(|e| e.to_string())?;
    let init = source.build_init(&mut || true).map_err(|e| e.to_string())?;
    Ok((source, init))
}
