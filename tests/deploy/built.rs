//! The image, built as it is for users, and containers of it. Of a debug build without symbols and without the list of crates that
//! cargo-auditable puts in; `VSOCK_SIDECAR_STATIC` names another static program, such as the one of a release.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use serde_json::Value;

use crate::tools::{IMAGE_TOOLS, run, target};

/// What the image is called in its store.
pub const TAG: &str = "localhost/vsock-sidecar:test";

/// The image in a store of its own.
pub struct Image {
    store: tempfile::TempDir,
    /// What `build-image.sh` printed.
    pub digest: String,
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

    /// Another one of the same program.
    pub fn build() -> Image {
        let mut image = Image {
            store: tempfile::tempdir().unwrap(),
            digest: String::new(),
            config: Value::Null,
        };
        let mut script = Command::new("deploy/build-image.sh");
        script.arg("--binary").arg(program()).args(["--tag", TAG]);
        script
            .env("BUILDAH_ARGUMENTS", image.storage().join(" "))
            .env("VSOCK_SIDECAR_REVISION", "0123456789ab");
        image.digest = answer(&mut script);
        let about: Value =
            serde_json::from_str(&image.buildah(&["inspect", "--type", "image", TAG])).unwrap();
        image.config = about["OCIv1"]["config"].clone();
        image
    }

    fn storage(&self) -> [String; 4] {
        let place = |name: &str| self.store.path().join(name).display().to_string();
        ["--root".into(), place("root"), "--runroot".into(), place("run")]
    }

    /// What buildah says about it.
    pub fn buildah(&self, arguments: &[&str]) -> String {
        let mut buildah = Command::new("buildah");
        buildah
            .args(["--storage-driver", "vfs"])
            .args(self.storage())
            .args(arguments);
        answer(&mut buildah)
    }

    /// A root file system of its own, since runtimes make the places in it that they mount something at.
    pub fn mount(&self) -> PathBuf {
        let container = self.buildah(&["from", TAG]);
        let root: PathBuf = self.buildah(&["mount", &container]).into();
        assert!(fs::exists(root.join("vsock-sidecar")).unwrap());
        root
    }
}

/// A static program.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(given) = std::env::var_os("VSOCK_SIDECAR_STATIC") {
            return given.into();
        }
        let mut script = Command::new("deploy/build-static.sh");
        script
            .arg("debug")
            .env("CARGO_TARGET_DIR", target())
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .env("CARGO_PROFILE_DEV_STRIP", "symbols")
            .env("SBOM", "none");
        answer(&mut script).into()
    })
}

/// Standard output of a run that has to succeed.
#[track_caller]
fn answer(command: &mut Command) -> String {
    let output = run(command, IMAGE_TOOLS);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A container, by runc. Dropping it ends it.
pub struct Runc {
    directory: tempfile::TempDir,
    /// runc itself, which ends as what it runs does.
    pub child: Child,
    name: String,
    /// Has its root.
    _image: Arc<Image>,
}

impl Runc {
    /// Runs a container by the configuration of a runtime, which has its root from `image`.
    pub fn start(image: Arc<Image>, configuration: &Value) -> Runc {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("config.json"), configuration.to_string()).unwrap();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vsock-sidecar-test-{}-{number}", std::process::id());
        let output = fs::File::create(directory.path().join("output")).unwrap();
        let child = Command::new("runc")
            .arg("--root")
            .arg(directory.path().join("state"))
            .args(["run", "--bundle"])
            .arg(directory.path())
            .arg(&name)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run runc: {error}; install it with: {IMAGE_TOOLS}"));
        Runc {
            directory,
            child,
            name,
            _image: image,
        }
    }

    /// A command of runc about it: its words in front of the container's name, and those behind.
    pub fn command(&self, before: &[&str], behind: &[&str]) -> Output {
        let mut runc = Command::new("runc");
        runc.arg("--root")
            .arg(self.directory.path().join("state"))
            .args(before)
            .arg(&self.name)
            .args(behind);
        run(&mut runc, IMAGE_TOOLS)
    }

    /// Everything that it wrote.
    pub fn output(&self) -> String {
        let bytes = fs::read(self.directory.path().join("output")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Runc {
    fn drop(&mut self) {
        if self.child.try_wait().ok().flatten().is_none() {
            self.command(&["kill"], &["KILL"]);
            let _ = self.child.wait();
        }
        self.command(&["delete", "--force"], &[]);
        if std::thread::panicking() {
            eprintln!("--- the container said\n{}", self.output());
        }
    }
}
