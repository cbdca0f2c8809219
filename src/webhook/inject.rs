//! The mutation: a pod goes in, a patch or a refusal comes out. No I/O, no clock, no state.
//!
//! Invariants:
//! 1. A pod without the label is not touched.
//! 2. What was patched, and looked at again, is not patched again; so it does not matter how often the API server asks, or
//!    whether a MutatingAdmissionPolicy was there before.
//! 3. A pod with the label leaves with a whole sidecar or not at all: a VMM without it ends on the missing socket, and a guest
//!    without vsock is found late.
//! 4. The VMM's container keeps its place: KubeVirt takes `containers[0]` for compute.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};

use super::container::{
    self, ADMIN_VOLUME, CONFIG_ANNOTATION, CONFIG_VOLUME, INJECT_LABEL, INJECTED_LABEL, KUBEVIRT_DIRECTORY,
    KUBEVIRT_VOLUME, NAME, Needs, SOCKET_DIRECTORY, SOCKET_VOLUME, Sockets, USER, VERSION_ANNOTATION,
    VMM_ANNOTATION,
};
use super::patch::Patched;
use super::patch::Step::{Index, Key};
use super::refusal::{Refusal, shown};
use super::settings::Settings;

/// What becomes of a pod that is let in.
#[derive(Clone, PartialEq, Debug)]
pub enum Outcome {
    /// It does not ask for the sidecar.
    NotSelected {
        /// What the user may have meant.
        warning: Option<String>,
    },
    /// It has the sidecar already.
    Unchanged,
    /// It gets the sidecar.
    Injected {
        /// The pod with it, and what was done.
        patched: Box<Patched>,
        /// What the user should know.
        warnings: Vec<String>,
    },
}

/// Puts the sidecar into a pod that asks for it.
///
/// # Errors
/// If the pod asks for it and cannot have it.
pub fn inject(pod: &Value, settings: &Settings) -> Result<Outcome, Refusal> {
    let metadata = map(pod.get("metadata"), "metadata")?;
    let labels = map(metadata.get("labels"), "metadata.labels")?;
    match labels.get(INJECT_LABEL) {
        Some(Value::String(value)) if value == "true" => {}
        other => {
            let warning = other.filter(|value| *value != "false").map(|value| {
                let value = shown(&value.to_string());
                format!("label {INJECT_LABEL} is {value}, and only \"true\" asks for the sidecar: the pod has none")
            });
            return Ok(Outcome::NotSelected { warning });
        }
    }
    let pod_view = View::of(pod, metadata)?;
    let mut patched = Patched::new(pod.clone());
    let mut warnings = Vec::new();
    pod_view.check()?;

    add_volumes(&mut patched, &pod_view)?;
    add_container(&mut patched, &pod_view, settings, &mut warnings)?;
    add_vmm_mount(&mut patched, &pod_view)?;
    if labels.get(INJECTED_LABEL) != Some(&json!("true")) {
        patched.set(&[Key("metadata"), Key("labels")], INJECTED_LABEL, json!("true"))?;
    }
    if !pod_view.annotations.contains_key(VERSION_ANNOTATION) {
        let version = json!(env!("CARGO_PKG_VERSION"));
        patched.set(
            &[Key("metadata"), Key("annotations")],
            VERSION_ANNOTATION,
            version,
        )?;
    }
    if patched.operations().is_empty() {
        return Ok(Outcome::Unchanged);
    }
    Ok(Outcome::Injected {
        patched: Box::new(patched),
        warnings,
    })
}

/// A pod's parts, of the kinds that they have to be of.
struct View<'a> {
    annotations: &'a Map<String, Value>,
    spec: &'a Value,
    containers: &'a [Value],
    init_containers: &'a [Value],
    volumes: &'a [Value],
    config_map: &'a str,
    /// Index in `containers`.
    vmm: usize,
    sockets: Sockets,
    is_kubevirt: bool,
    /// Whether the pod says that an injector has been here.
    is_marked: bool,
}

impl<'a> View<'a> {
    fn of(pod: &'a Value, metadata: &'a Map<String, Value>) -> Result<View<'a>, Refusal> {
        let labels = map(metadata.get("labels"), "metadata.labels")?;
        let annotations = map(metadata.get("annotations"), "metadata.annotations")?;
        let spec = pod
            .get("spec")
            .filter(|spec| spec.is_object())
            .ok_or(Refusal::Malformed {
                field: "spec".to_owned(),
                expected: "a map",
            })?;
        let (containers, init_containers, volumes) = (
            objects(spec, "containers")?,
            objects(spec, "initContainers")?,
            objects(spec, "volumes")?,
        );
        let is_kubevirt = labels.get("kubevirt.io") == Some(&json!("virt-launcher"));
        Ok(View {
            annotations,
            spec,
            containers,
            init_containers,
            volumes,
            config_map: config_map(annotations)?,
            vmm: vmm_container(annotations, containers)?,
            sockets: match is_kubevirt {
                true => Sockets::KubevirtPlugin,
                false => Sockets::Own,
            },
            is_kubevirt,
            is_marked: labels.get(INJECTED_LABEL) == Some(&json!("true")),
        })
    }

    /// What is looked at before anything is changed.
    fn check(&self) -> Result<(), Refusal> {
        let windows = json!("windows");
        if self.spec.pointer("/os/name") == Some(&windows) {
            return Err(Refusal::Windows {
                field: "spec.os.name",
            });
        }
        if self.spec.pointer("/nodeSelector/kubernetes.io~1os") == Some(&windows) {
            return Err(Refusal::Windows {
                field: "spec.nodeSelector[kubernetes.io/os]",
            });
        }
        if let Some(index) = position(self.containers, NAME) {
            return Err(Refusal::ContainerTaken {
                field: format!("spec.containers[{index}]"),
            });
        }
        if self.is_kubevirt {
            if position(self.volumes, KUBEVIRT_VOLUME).is_none() {
                return Err(Refusal::KubevirtWithoutPlugins);
            }
            let mounts = objects_at(
                self.vmm()?,
                "volumeMounts",
                &format!("{}.volumeMounts", self.vmm_field()),
            )?;
            if !mounts
                .iter()
                .any(|mount| is_mount(mount, KUBEVIRT_VOLUME, KUBEVIRT_DIRECTORY, None))
            {
                return Err(Refusal::KubevirtNotMounted {
                    field: self.vmm_field(),
                });
            }
        }
        Ok(())
    }

    fn vmm(&self) -> Result<&'a Value, Refusal> {
        self.containers.get(self.vmm).ok_or(Refusal::Malformed {
            field: "spec.containers".to_owned(),
            expected: "a list of at least one container",
        })
    }

    fn vmm_field(&self) -> String {
        format!("spec.containers[{}]", self.vmm)
    }

    /// The user to run as. That of the VMM, since the socket is for its owner and group only; but never root, and where
    /// nobody says who the VMM is, that of our image. `None` where the pod says the same.
    fn user(&self) -> Option<i64> {
        let user_of = |of: &Value| of.pointer("/securityContext/runAsUser").and_then(Value::as_i64);
        let pod = user_of(self.spec).filter(|user| *user != 0);
        let vmm = self.containers.get(self.vmm).and_then(user_of);
        match (vmm.filter(|user| *user != 0), pod) {
            (Some(vmm), Some(pod)) if vmm == pod => None,
            (Some(vmm), _) => Some(vmm),
            (None, Some(_)) => None,
            (None, None) => Some(USER),
        }
    }

    /// Whether the pod is of the QoS class Guaranteed without us: each container has limits of CPU and memory, and requests
    /// that are the same or missing, which means the same (`pkg/apis/core/v1/helper/qos/qos.go` of Kubernetes).
    fn is_guaranteed(&self) -> bool {
        let exact = |container: &Value| {
            ["cpu", "memory"].iter().all(|kind| {
                let at = |of: &str| container.pointer(&format!("/resources/{of}/{kind}"));
                at("limits").is_some_and(|limit| at("requests").is_none_or(|request| request == limit))
            })
        };
        self.containers.iter().chain(self.init_containers).all(exact)
    }
}

fn add_volumes(patched: &mut Patched, pod: &View<'_>) -> Result<(), Refusal> {
    let mut wanted = vec![(CONFIG_VOLUME, container::config_volume(pod.config_map))];
    if pod.sockets == Sockets::Own {
        wanted.push((SOCKET_VOLUME, container::directory_volume(SOCKET_VOLUME)));
    }
    wanted.push((ADMIN_VOLUME, container::directory_volume(ADMIN_VOLUME)));
    for (name, volume) in wanted {
        let mut volumes = pod.volumes.iter().enumerate();
        let Some((index, there)) = volumes.find(|(_, volume)| name_of(volume) == Some(name)) else {
            patched.insert(&[Key("spec")], "volumes", None, volume)?;
            continue;
        };
        let (fits, wanted) = match volume.pointer("/configMap/name") {
            Some(config_map) => (
                there.pointer("/configMap/name") == Some(config_map),
                format!(
                    "the ConfigMap {} of annotation {CONFIG_ANNOTATION}",
                    pod.config_map
                ),
            ),
            // Of any medium and size.
            None => (
                there.get("emptyDir").is_some_and(Value::is_object),
                "an emptyDir".to_owned(),
            ),
        };
        if !fits {
            let field = format!("spec.volumes[{index}]");
            return Err(Refusal::VolumeTaken { field, name, wanted });
        }
    }
    Ok(())
}

/// First of the init containers: it runs before any other of them could need the guest, and above all before the VMM.
fn add_container(
    patched: &mut Patched,
    pod: &View<'_>,
    settings: &Settings,
    warnings: &mut Vec<String>,
) -> Result<(), Refusal> {
    if let Some(index) = position(pod.init_containers, NAME) {
        let field = format!("spec.initContainers[{index}]");
        return match (pod.is_marked, pod.init_containers.get(index)) {
            (true, Some(there)) => check_container(there, pod.sockets, field),
            _ => Err(Refusal::ContainerTaken { field }),
        };
    }
    let needs = Needs {
        sockets: pod.sockets,
        user: pod.user(),
        guaranteed: pod.is_guaranteed(),
    };
    if needs.guaranteed {
        warnings.push(format!(
            "the pod is of the QoS class Guaranteed, so its container {NAME} has limits, too: memory of the guest that it \
             touches first counts to them (docs/webhook.md)"
        ));
    }
    let container = container::container(settings, &needs);
    Ok(patched.insert(&[Key("spec")], "initContainers", Some(0), container)?)
}

/// A container that is there is left as it is, since others may have changed it with good reason (the image's registry, say);
/// but the parts without which nothing works have to be there.
fn check_container(container: &Value, sockets: Sockets, field: String) -> Result<(), Refusal> {
    let broken = |lacks: String| {
        Err(Refusal::ContainerBroken {
            field: field.clone(),
            lacks,
        })
    };
    if container.get("restartPolicy") != Some(&json!("Always")) {
        return broken("restartPolicy: Always".to_owned());
    }
    // Whichever: without one the VMM starts at once, and finds no socket.
    if !container.get("startupProbe").is_some_and(Value::is_object) {
        return broken("startupProbe".to_owned());
    }
    let mounts = objects_at(container, "volumeMounts", &format!("{field}.volumeMounts"))?;
    let wanted = [
        (CONFIG_VOLUME, container::CONFIG_DIRECTORY.to_owned(), None),
        (sockets.volume(), sockets.directory(), sockets.sub_path()),
        (ADMIN_VOLUME, container::ADMIN_DIRECTORY.to_owned(), None),
    ];
    for (volume, path, sub_path) in wanted {
        if !mounts
            .iter()
            .any(|mount| is_mount(mount, volume, &path, sub_path))
        {
            let part = sub_path.map_or(" without a subPath".to_owned(), |part| {
                format!(" with subPath {part}")
            });
            return broken(format!("mount of {volume} at {path}{part}"));
        }
    }
    Ok(())
}

fn add_vmm_mount(patched: &mut Patched, pod: &View<'_>) -> Result<(), Refusal> {
    if pod.sockets == Sockets::KubevirtPlugin {
        return Ok(());
    }
    let field = format!("{}.volumeMounts", pod.vmm_field());
    let mounts = objects_at(pod.vmm()?, "volumeMounts", &field)?;
    for (index, mount) in mounts.iter().enumerate() {
        let at = mount.get("mountPath").and_then(Value::as_str).unwrap_or_default();
        if !same_path(at, SOCKET_DIRECTORY) {
            continue;
        }
        let volume = mount.get("name").and_then(Value::as_str).unwrap_or_default();
        let field = format!("{field}[{index}]");
        return match volume {
            _ if is_mount(mount, SOCKET_VOLUME, SOCKET_DIRECTORY, None) => Ok(()),
            SOCKET_VOLUME => Err(Refusal::MountOfPart {
                field,
                path: SOCKET_DIRECTORY,
            }),
            other => Err(Refusal::MountTaken {
                field,
                path: SOCKET_DIRECTORY,
                volume: other.to_owned(),
            }),
        };
    }
    let way = [Key("spec"), Key("containers"), Index(pod.vmm)];
    Ok(patched.insert(&way, "volumeMounts", None, container::vmm_mount())?)
}

fn config_map(annotations: &Map<String, Value>) -> Result<&str, Refusal> {
    let name = annotations
        .get(CONFIG_ANNOTATION)
        .and_then(Value::as_str)
        .ok_or(Refusal::NoConfig)?;
    match is_dns_subdomain(name) {
        true => Ok(name),
        false => Err(Refusal::BadConfigName {
            name: name.to_owned(),
        }),
    }
}

fn vmm_container(annotations: &Map<String, Value>, containers: &[Value]) -> Result<usize, Refusal> {
    if containers.is_empty() {
        return Err(Refusal::Malformed {
            field: "spec.containers".to_owned(),
            expected: "a list of at least one container",
        });
    }
    match annotations.get(VMM_ANNOTATION) {
        None => Ok(position(containers, "compute").unwrap_or(0)),
        Some(name) => {
            let name = name.as_str().unwrap_or_default();
            position(containers, name).ok_or_else(|| {
                let known: Vec<&str> = containers.iter().filter_map(name_of).collect();
                Refusal::NoSuchContainer {
                    name: name.to_owned(),
                    known: known.join(", "),
                }
            })
        }
    }
}

/// A DNS subdomain as names of ConfigMaps are (RFC 1123, and `IsDNS1123Subdomain` of Kubernetes).
fn is_dns_subdomain(name: &str) -> bool {
    let letter = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let label = |label: &str| {
        let bytes = label.as_bytes();
        bytes.first().copied().is_some_and(letter)
            && bytes.last().copied().is_some_and(letter)
            && bytes.iter().all(|c| letter(*c) || *c == b'-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// Whether a mount is that of a volume at a path: of this part of the volume, or of all of it.
fn is_mount(mount: &Value, volume: &str, path: &str, sub_path: Option<&str>) -> bool {
    let text = |key: &str| {
        mount
            .get(key)
            .and_then(Value::as_str)
            .filter(|text| !text.is_empty())
    };
    name_of(mount) == Some(volume)
        && text("mountPath").is_some_and(|at| same_path(at, path))
        && text("subPath") == sub_path
        && text("subPathExpr").is_none()
}

fn same_path(one: &str, other: &str) -> bool {
    let parts = |path: &str| -> Vec<String> {
        let parts = path.split('/').filter(|part| !part.is_empty() && *part != ".");
        parts.map(str::to_owned).collect()
    };
    parts(one) == parts(other)
}

fn name_of(object: &Value) -> Option<&str> {
    object.get("name").and_then(Value::as_str)
}

fn position(objects: &[Value], name: &str) -> Option<usize> {
    objects.iter().position(|object| name_of(object) == Some(name))
}

/// A missing map is an empty one, as in the API.
fn map<'a>(value: Option<&'a Value>, field: &str) -> Result<&'a Map<String, Value>, Refusal> {
    static EMPTY: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
    match value {
        None | Some(Value::Null) => Ok(&EMPTY),
        Some(Value::Object(object)) => Ok(object),
        Some(_) => Err(Refusal::Malformed {
            field: field.to_owned(),
            expected: "a map",
        }),
    }
}

fn objects<'a>(spec: &'a Value, key: &str) -> Result<&'a [Value], Refusal> {
    objects_at(spec, key, &format!("spec.{key}"))
}

/// A list of maps; a missing one is empty.
fn objects_at<'a>(parent: &'a Value, key: &str, field: &str) -> Result<&'a [Value], Refusal> {
    let malformed = || Refusal::Malformed {
        field: field.to_owned(),
        expected: "a list of maps",
    };
    match parent.get(key) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(list)) if list.iter().all(Value::is_object) => Ok(list),
        Some(_) => Err(malformed()),
    }
}
