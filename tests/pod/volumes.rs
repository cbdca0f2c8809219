//! The pod's volumes, as kubelet lays them out in its own directory and mounts them from there.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::tools::{list, named};

/// The volumes of a pod by their names.
pub struct Volumes(BTreeMap<String, PathBuf>);

impl Volumes {
    /// Makes them below `directory`. ConfigMaps are empty until [`publish`].
    pub fn make(directory: &Path, pod: &Value) -> Volumes {
        let group = pod["spec"]["securityContext"]["fsGroup"].as_u64().unwrap();
        let make = |volume: &Value| {
            let name = volume["name"].as_str().unwrap().to_owned();
            let path = directory.join(&name);
            fs::create_dir(&path).unwrap();
            if volume["emptyDir"].is_object() {
                // What kubelet makes of an emptyDir and fsGroup.
                chown(&path, None, Some(u32::try_from(group).unwrap())).expect("root, as containers want");
                fs::set_permissions(&path, fs::Permissions::from_mode(0o2777)).unwrap();
            } else {
                assert!(volume["configMap"].is_object(), "{volume}");
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            }
            (name, path)
        };
        Volumes(list(&pod["spec"]["volumes"]).iter().map(make).collect())
    }

    /// Where a volume is outside.
    pub fn path(&self, name: &str) -> &Path {
        self.0
            .get(name)
            .unwrap_or_else(|| panic!("the pod has no volume {name}"))
    }

    /// Where a container's mounts are inside and outside, and whether it may only read.
    pub fn mounts(&self, container: &Value) -> Vec<(String, PathBuf, bool)> {
        let mount = |mount: &Value| {
            assert!(mount["subPath"].is_null(), "never updated: {mount}");
            let inside = mount["mountPath"].as_str().unwrap().to_owned();
            let outside = self.path(mount["name"].as_str().unwrap()).to_owned();
            (inside, outside, mount["readOnly"] == true)
        };
        list(&container["volumeMounts"]).iter().map(mount).collect()
    }
}

/// Puts a version of a ConfigMap into its volume in the way of kubelet's atomic writer (`AtomicWriter.Write` in Kubernetes'
/// pkg/volume/util/atomic_writer.go): a new directory, the link `..data` replaced by rename, the directory before removed.
pub fn publish(volume: &Path, version: &str, config: &str) {
    let before = fs::read_link(volume.join("..data")).ok();
    let name = format!("..2026_01_01_00_00_00.{version}");
    let data = volume.join(&name);
    fs::create_dir(&data).unwrap();
    fs::set_permissions(&data, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(data.join("config.yaml"), config).unwrap();
    fs::set_permissions(data.join("config.yaml"), fs::Permissions::from_mode(0o644)).unwrap();
    symlink(&name, volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    match before {
        Some(before) => fs::remove_dir_all(volume.join(before)).unwrap(),
        None => symlink("..data/config.yaml", volume.join("config.yaml")).unwrap(),
    }
}

/// The element of a pod's list that is called so.
pub fn container<'a>(pod: &'a Value, kind: &str, name: &str) -> &'a Value {
    named(&pod["spec"][kind], name)
}
