//! The image: laid out, built twice, and run by a container runtime with nothing allowed. What is tested is everything around the program.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::built::{Image, Runc, program};
use crate::support::until;
use crate::tools::{IMAGE_TOOLS, root, run, success, text};

/// A container that runs the image as a pod would have it. Dropping it ends it.
struct Container(Runc);

impl Container {
    /// As user `id` of group `id`, with a root that cannot be written to, no capability and no way to get one.
    fn start(id: u32, arguments: &[&str], mounts: Value, seccomp: Option<Value>) -> Container {
        let image = Image::shared();
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
        Container(Runc::start(image, &config))
    }

    /// Runs the program once more in it.
    fn execute(&self, arguments: &[&str]) -> Output {
        let command = [&["/vsock-sidecar"], arguments].concat();
        self.0.command(&["exec"], &command)
    }

    /// What it said, once it has ended well.
    #[track_caller]
    fn ends_well(mut self) -> String {
        until("the container ends", || {
            self.0.child.try_wait().unwrap().is_some()
        });
        let status = self.0.child.wait().unwrap();
        assert!(status.success(), "{status}\n{}", self.0.output());
        self.0.output()
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
    let image = Image::shared();
    let config = &image.config;
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
    assert_eq!(again.digest, Image::shared().digest);
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
            success(container.execute(&["probe", kind]));
        }
        let state = container.execute(&["state", "--json"]);
        let said = String::from_utf8_lossy(&state.stdout).into_owned();
        assert!(
            state.status.success(),
            "{}{said}{}",
            String::from_utf8_lossy(&state.stderr),
            container.0.output()
        );
        let state: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(state["guests"][0]["name"], "vm");
        assert_eq!(state["confinement"]["seccomp"]["state"], "active", "{state:#}");

        success(container.0.command(&["kill"], &["TERM"]));
        let log = container.ends_well();
        assert!(log.contains("drained"), "{log}");
        assert!(!log.contains("\"level\":\"ERROR\""), "{log}");
        let left: Vec<_> = fs::read_dir(&sockets).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
