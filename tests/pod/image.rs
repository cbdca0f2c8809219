//! The image, built as it is for users, of a debug build; `VSOCK_SIDECAR_STATIC` names another static program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use serde_json::Value;

use crate::tools::{IMAGE_TOOLS, root, run, success, target};

/// The image in a store of its own.
pub struct Image {
    store: tempfile::TempDir,
    /// What it says of how it is run: `config` of the OCI image.
    pub config: Value,
}

impl Image {
    /// The one that all tests share while any of them has it. Not a static, whose directory nobody would remove.
    pub fn shared() -> Arc<Image> {
        static IMAGE: Mutex<Weak<Image>> = Mutex::new(Weak::new());
        let mut shared = IMAGE.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let image = Arc::new(Image::build());
            *shared = Arc::downgrade(&image);
            image
        })
    }

    fn build() -> Image {
        let mut image = Image {
            store: tempfile::tempdir().unwrap(),
            config: Value::Null,
        };
        let mut script = Command::new("deploy/build-image.sh");
        script.arg("--binary").arg(program()).args(["--tag", TAG]);
        script.env("BUILDAH_ARGUMENTS", image.storage().join(" "));
        success(run(&mut script, IMAGE_TOOLS));
        let about: Value =
            serde_json::from_str(&image.buildah(&["inspect", "--type", "image", TAG])).unwrap();
        image.config = about["OCIv1"]["config"].clone();
        image
    }

    fn storage(&self) -> [String; 4] {
        let place = |name: &str| self.store.path().join(name).display().to_string();
        ["--root".into(), place("root"), "--runroot".into(), place("run")]
    }

    fn buildah(&self, arguments: &[&str]) -> String {
        let mut buildah = Command::new("buildah");
        buildah
            .args(["--storage-driver", "vfs"])
            .args(self.storage())
            .args(arguments);
        let output = run(&mut buildah, IMAGE_TOOLS);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// A root file system of its own, since runtimes make the places in it that they mount something at.
    pub fn mount(&self) -> PathBuf {
        let container = self.buildah(&["from", TAG]);
        let root: PathBuf = self.buildah(&["mount", &container]).into();
        assert!(fs::exists(root.join("vsock-sidecar")).unwrap());
        root
    }
}

/// What the image is called here.
const TAG: &str = "localhost/vsock-sidecar:pod";

/// The same program as tests/deploy has, so that it is built once.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(given) = std::env::var_os("VSOCK_SIDECAR_STATIC") {
            return given.into();
        }
        let output = Command::new("deploy/build-static.sh")
            .arg("debug")
            .current_dir(root())
            .env("CARGO_TARGET_DIR", target())
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .env("CARGO_PROFILE_DEV_STRIP", "symbols")
            .env("SBOM", "none")
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap().trim().into()
    })
}
