//! What a guest may have beside kernel and init: modules that most tests do not load, and programs.

use std::fs;
use std::path::{Path, PathBuf};

use vsock_sidecar::demo::vm::cpio::Archive;

use super::assets::Assets;

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
