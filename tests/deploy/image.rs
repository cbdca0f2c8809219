//! The image: laid out, built twice, and run by a container runtime with nothing allowed.
//!
//! By a debug build without symbols and without the list of crates that cargo-auditable puts in: what is tested is everything around
//! the program. `VSOCK_SIDECAR_STATIC` names a static program to test instead, such as the one of a release.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use serde_json::{Value, json};

use crate::support::until;
use crate::tools::{IMAGE_TOOLS, root, run, success, target, text};

/// What the image is called here.
const TAG: &str = "localhost/vsock-sidecar:test";

/// A static program.
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
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        String::from_utf8(output.stdout).unwrap().trim().into()
    })
}

/// The image in a store of its own.
struct Image {
    store: tempfile::TempDir,
    /// What `build-image.sh` printed.
    digest: String,
}

impl Image {
    fn buildah(&self, arguments: &[&str]) -> String {
        let store = self.store.path();
        let mut buildah = Command::new("buildah");
        buildah
            .args(["--storage-driver", "vfs", "--root"])
            .arg(store.join("root"))
            .arg("--runroot")
            .arg(store.join("run"))
            .args(arguments);
        let output = run(&mut buildah, IMAGE_TOOLS);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn build() -> Image {
        let store = tempfile::tempdir().unwrap();
        let mut script = Command::new("deploy/build-image.sh");
        let arguments = format!(
            "--root {} --runroot {}",
            store.path().join("root").display(),
            store.path().join("run").display()
        );
        script
            .arg("--binary")
            .arg(program())
            .args(["--tag", TAG])
            .env("BUILDAH_ARGUMENTS", arguments)
            .env("VSOCK_SIDECAR_REVISION", "0123456789ab");
        let output = run(&mut script, IMAGE_TOOLS);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let digest = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        Image { store, digest }
    }

    /// A root file system of its own, since runtimes make the places in it that they mount something at.
    fn mount(&self) -> PathBuf {
        let container = self.buildah(&["from", TAG]);
        self.buildah(&["mount", &container]).into()
    }
}

/// The one that all tests share while any of them has it. Not a static, whose directory nobody would remove.
fn image() -> Arc<Image> {
    static IMAGE: Mutex<Weak<Image>> = Mutex::new(Weak::new());
    let mut shared = IMAGE.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let image = Arc::new(Image::build());
        *shared = Arc::downgrade(&image);
        image
    })
}

/// A container that runs the image as a pod would have it. Dropping it ends it.
struct Container {
    directory: tempfile::TempDir,
    child: Child,
    name: String,
    /// Has its root.
    _image: Arc<Image>,
}

impl Container {
    /// As user `id` of group `id`, with a root that cannot be written to, no capability and no way to get one.
    fn start(id: u32, arguments: &[&str], mounts: Value, seccomp: Option<Value>) -> Container {
        let image = image();
        let directory = tempfile::tempdir().unwrap();
        let mut all_mounts = vec![json!({"destination": "/proc", "type": "proc", "source": "proc"})];
        all_mounts.extend(mounts.as_array().unwrap().iter().cloned());
        let none = json!([]);
        let mut config = json!({
            "ociVersion": "1.0.0",
            "process": {
                "terminal": false,
                "user": {"uid": id, "gid": id},
                "args": arguments,
                "env": ["VSOCK_SIDECAR_ADMIN=unix:///run/vsock-sidecar-admin/admin.sock"],
                "cwd": "/",
                "noNewPrivileges": true,
                "capabilities": {"bounding": none, "effective": none, "permitted": none, "inheritable": none, "ambient": none},
            },
            "root": {"path": image.mount(), "readonly": true},
            "mounts": all_mounts,
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}]},
        });
        if let Some(profile) = seccomp {
            config["linux"]["seccomp"] = profile;
        }
        fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
        let name = format!(
            "vsock-sidecar-test-{}-{id}-{}",
            std::process::id(),
            arguments.len()
        );
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
        Container {
            directory,
            child,
            name,
            _image: image,
        }
    }

    fn runc(&self, arguments: &[&str]) -> std::process::Output {
        let mut runc = Command::new("runc");
        runc.arg("--root")
            .arg(self.directory.path().join("state"))
            .args(arguments);
        run(&mut runc, IMAGE_TOOLS)
    }

    fn output(&self) -> String {
        let mut text = String::new();
        let mut file = fs::File::open(self.directory.path().join("output")).unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    /// What it said, once it has ended well.
    #[track_caller]
    fn ends_well(mut self) -> String {
        until("the container ends", || self.child.try_wait().unwrap().is_some());
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}\n{}", self.output());
        self.output()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if self.child.try_wait().ok().flatten().is_none() {
            self.runc(&["kill", &self.name, "KILL"]);
            let _ = self.child.wait();
        }
        self.runc(&["delete", "--force", &self.name]);
    }
}

/// A directory from outside at its place inside.
fn bind(from: &Path, to: &str, access: &str) -> Value {
    json!({"destination": to, "type": "bind", "source": from, "options": ["bind", access]})
}

/// `deploy/seccomp` as a runtime takes it.
fn seccomp() -> Value {
    serde_json::from_str(&text("deploy/seccomp/vsock-sidecar.json")).unwrap()
}

#[test]
fn the_two_dockerfiles_make_the_same_image_and_hadolint_has_no_complaint() {
    let from_source = text("deploy/Dockerfile");
    let prebuilt = text("deploy/Dockerfile.prebuilt");
    let last = |text: &str| text.split("\nFROM scratch\n").nth(1).unwrap().to_owned();
    let expected = last(&from_source).replace("COPY --from=builder /rootfs/ /", "COPY rootfs/ /");
    assert_eq!(last(&prebuilt), expected);
    let hadolint = root().join("target/image-tools/venv/bin/hadolint");
    let said = success(run(
        Command::new(hadolint).args(["deploy/Dockerfile", "deploy/Dockerfile.prebuilt"]),
        IMAGE_TOOLS,
    ));
    assert_eq!(said, "");
}

#[test]
fn a_dynamic_program_is_refused_where_it_would_start_nowhere() {
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new("deploy/make-rootfs.sh")
        .arg(env!("CARGO_BIN_EXE_vsock-sidecar"))
        .arg(directory.path().join("rootfs"))
        .current_dir(root())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("wants a dynamic loader"), "{said}");
    assert!(!directory.path().join("rootfs").exists());
}

#[test]
fn the_image_holds_the_program_and_a_name_for_its_user_and_says_how_it_is_run() {
    let image = image();
    let config: Value = serde_json::from_str(&image.buildah(&["inspect", "--type", "image", TAG])).unwrap();
    let config = &config["OCIv1"]["config"];
    assert_eq!(config["User"], "65532:65532", "runAsNonRoot wants a number");
    assert_eq!(config["Entrypoint"], json!(["/vsock-sidecar"]));
    assert_eq!(
        config["Cmd"],
        json!(["run", "--config", "/etc/vsock-sidecar/config.yaml"])
    );
    assert_eq!(config["StopSignal"], "SIGTERM");
    assert_eq!(config["ExposedPorts"], json!({"9464/tcp": {}}));
    assert_eq!(config["Volumes"], Value::Null);
    let label = |name: &str| config["Labels"][format!("org.opencontainers.image.{name}")].clone();
    assert_eq!(label("version"), env!("CARGO_PKG_VERSION"));
    assert_eq!(label("revision"), "0123456789ab");
    assert_eq!(label("licenses"), "Apache-2.0 OR MIT");

    let mut found = Vec::new();
    let mounted = image.mount();
    let mut directories = vec![mounted.clone()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap().flatten() {
            let path = entry.path();
            let inside = path.strip_prefix(&mounted).unwrap().display().to_string();
            let metadata = fs::symlink_metadata(&path).unwrap();
            assert_eq!(
                (metadata.uid(), metadata.gid(), metadata.mtime()),
                (0, 0, 0),
                "{inside}"
            );
            found.push(format!("{inside} {:o}", metadata.permissions().mode() & 0o7777));
            if metadata.is_dir() {
                directories.push(path);
            }
        }
    }
    found.sort();
    let expected = [
        "etc 755",
        "etc/group 644",
        "etc/passwd 644",
        "etc/vsock-sidecar 755",
        "licenses 755",
        "licenses/LICENSE-APACHE 644",
        "licenses/LICENSE-MIT 644",
        "run 755",
        "run/vsock-sidecar 1777",
        "run/vsock-sidecar-admin 1777",
        "tmp 1777",
        "vsock-sidecar 555",
    ];
    assert_eq!(found, expected);
}

/// Else the bytes would depend on where the source lies.
#[test]
fn the_program_names_no_place_of_the_machine_that_built_it() {
    let bytes = fs::read(program()).unwrap();
    let place = root().to_str().unwrap().as_bytes();
    assert!(!bytes.windows(place.len()).any(|window| window == place));
}

#[test]
fn building_it_again_gives_the_same_digest() {
    let again = Image::build();
    assert_eq!(again.digest, image().digest);
    assert!(again.digest.starts_with("sha256:"), "{}", again.digest);
}

/// 65532 is the image's own, 107 is KubeVirt's, and OpenShift takes one of a namespace's range.
#[test]
fn any_user_can_run_it_on_a_root_that_cannot_be_written_to() {
    for user in [65532, 107, 1_000_650_000] {
        let said = Container::start(user, &["/vsock-sidecar", "--version"], json!([]), None).ends_well();
        assert_eq!(said.trim(), concat!("vsock-sidecar ", env!("CARGO_PKG_VERSION")));
    }
}

/// The whole program inside, guest included. It wants a place for its sockets.
#[test]
fn the_demo_runs_in_it() {
    let place = json!([{"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "noexec", "mode=1777"]}]);
    let said = Container::start(65532, &["/vsock-sidecar", "demo"], place, None).ends_well();
    assert!(
        said.contains("Hello from a TCP service that knows nothing of vsock."),
        "{said}"
    );
    assert!(said.contains("standard   kept by the device"), "{said}");
}

/// As in a pod with `deploy/base`, its configuration and the seccomp profile of `deploy/seccomp`: it starts, is confined, answers its admin
/// socket to the same program executed beside it (as a probe is), and ends by SIGTERM.
#[test]
fn it_serves_under_its_seccomp_profile_and_answers_what_is_executed_beside_it() {
    for user in [65532, 107] {
        let volumes = tempfile::tempdir().unwrap();
        let volume = |name: &str, mode| {
            let path = volumes.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let (config, sockets, admin) = (
            volume("config", 0o755),
            volume("sockets", 0o777),
            volume("admin", 0o777),
        );
        // Its TCP port is this machine's, as the container has no network of its own.
        let base = text("deploy/base/config.yaml").replace("tcp://0.0.0.0:9464, ", "");
        fs::write(config.join("config.yaml"), base).unwrap();
        let mounts = json!([
            bind(&config, "/etc/vsock-sidecar", "ro"),
            bind(&sockets, "/run/vsock-sidecar", "rw"),
            bind(&admin, "/run/vsock-sidecar-admin", "rw"),
        ]);
        let command = [
            "/vsock-sidecar",
            "run",
            "--config",
            "/etc/vsock-sidecar/config.yaml",
        ];
        let container = Container::start(user, &command, mounts, Some(seccomp()));
        until("its sockets are there", || {
            sockets.join("vsock.sock").exists() && admin.join("admin.sock").exists()
        });
        let socket = fs::metadata(sockets.join("vsock.sock")).unwrap();
        assert_eq!(socket.permissions().mode() & 0o777, 0o660);
        assert_eq!((socket.uid(), socket.gid()), (user, user));

        for kind in ["startup", "ready", "live"] {
            success(container.runc(&["exec", &container.name, "/vsock-sidecar", "probe", kind]));
        }
        let state = container.runc(&["exec", &container.name, "/vsock-sidecar", "state", "--json"]);
        let said = String::from_utf8_lossy(&state.stdout).into_owned();
        assert!(
            state.status.success(),
            "{}{said}{}",
            String::from_utf8_lossy(&state.stderr),
            container.output()
        );
        let state: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(state["guests"][0]["name"], "vm");
        assert_eq!(state["confinement"]["seccomp"]["state"], "active", "{state:#}");

        success(container.runc(&["kill", &container.name, "TERM"]));
        let log = container.ends_well();
        assert!(log.contains("drained"), "{log}");
        assert!(!log.contains("\"level\":\"ERROR\""), "{log}");
        let left: Vec<_> = fs::read_dir(&sockets).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
