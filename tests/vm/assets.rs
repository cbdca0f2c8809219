//! What a guest is booted from, prepared once; panics with what to do when that is not possible.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

pub use vsock_sidecar::demo::vm::assets::Assets;
use vsock_sidecar::demo::vm::assets::Source;

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
