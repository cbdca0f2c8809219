//! What the operator of the webhook decides for all pods: image and resources.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

/// Most bytes of a settings file.
const MAX_FILE: u64 = 64 * 1024;

/// What every injected container has.
#[derive(Clone, PartialEq, Debug)]
pub struct Settings {
    /// The image's reference.
    pub image: String,
    /// `None` leaves it to the cluster.
    pub image_pull_policy: Option<PullPolicy>,
    /// The container's `resources`.
    pub resources: Value,
    /// Requests and limits of the container in a pod of the QoS class Guaranteed.
    pub guaranteed_resources: Value,
}

/// When the kubelet pulls the image.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
pub enum PullPolicy {
    /// Each time that a container starts.
    Always,
    /// Where the node does not have it.
    IfNotPresent,
    /// It has to be on the node.
    Never,
}

impl PullPolicy {
    /// In the words of a pod.
    pub fn as_str(self) -> &'static str {
        match self {
            PullPolicy::Always => "Always",
            PullPolicy::IfNotPresent => "IfNotPresent",
            PullPolicy::Never => "Never",
        }
    }
}

/// Why the settings cannot be used. One line each.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// Cannot be read.
    #[error("cannot read the settings {}: {source}", file.display())]
    Unreadable {
        /// Which.
        file: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// Longer than any settings.
    #[error("the settings {} have more than {MAX_FILE} bytes", file.display())]
    TooLong {
        /// Which.
        file: PathBuf,
    },
    /// No settings.
    #[error("the settings {}: {problem}; the keys are imagePullPolicy, resources and guaranteedResources", file.display())]
    Bad {
        /// Which.
        file: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The image's reference cannot be one.
    #[error(
        "--image: {image:?} is no reference of an image; give registry/name:tag or registry/name@sha256:…"
    )]
    BadImage {
        /// As given.
        image: String,
    },
}

/// The file of `--config`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    image_pull_policy: Option<PullPolicy>,
    resources: Option<Value>,
    guaranteed_resources: Option<Value>,
}

impl Settings {
    /// The defaults, for an image.
    ///
    /// # Errors
    /// If `image` is empty or has blanks; the rest is the container runtime's to judge.
    pub fn new(image: &str) -> Result<Settings, SettingsError> {
        if image.is_empty() || image.chars().any(|c| !c.is_ascii_graphic()) {
            return Err(SettingsError::BadImage {
                image: image.to_owned(),
            });
        }
        Ok(Settings {
            image: image.to_owned(),
            image_pull_policy: None,
            // No limits: the kernel charges a page of guest memory to whoever touches it first, so that a limit could end the
            // sidecar, and with it the guest's vsock, for what the guest did.
            resources: json!({"requests": {"cpu": "50m", "memory": "64Mi"}}),
            guaranteed_resources: json!({"cpu": "200m", "memory": "256Mi"}),
        })
    }

    /// The same with what a file says instead.
    ///
    /// # Errors
    /// If it cannot be read or has other keys or kinds of values.
    pub fn with_file(mut self, file: &Path) -> Result<Settings, SettingsError> {
        let unreadable = |source| SettingsError::Unreadable {
            file: file.to_owned(),
            source,
        };
        if fs::metadata(file).map_err(unreadable)?.len() > MAX_FILE {
            return Err(SettingsError::TooLong {
                file: file.to_owned(),
            });
        }
        let text = fs::read_to_string(file).map_err(unreadable)?;
        let bad = |problem: String| SettingsError::Bad {
            file: file.to_owned(),
            problem,
        };
        if text.trim().is_empty() {
            return Ok(self);
        }
        let given: File = serde_saphyr::from_str(&text).map_err(|error| bad(error.to_string()))?;
        self.image_pull_policy = given.image_pull_policy.or(self.image_pull_policy);
        if let Some(resources) = given.resources {
            if !resources.is_object() {
                return Err(bad("resources is no map of requests and limits".to_owned()));
            }
            self.resources = resources;
        }
        if let Some(guaranteed) = given.guaranteed_resources {
            let complete = ["cpu", "memory"]
                .iter()
                .all(|kind| guaranteed.get(kind).is_some());
            if !complete {
                return Err(bad("guaranteedResources has to have cpu and memory".to_owned()));
            }
            self.guaranteed_resources = guaranteed;
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(text: &str) -> Result<Settings, SettingsError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("settings.yaml");
        fs::write(&file, text).unwrap();
        Settings::new("registry.example/vsock-sidecar:1")
            .unwrap()
            .with_file(&file)
    }

    #[test]
    fn a_file_says_what_differs_from_the_defaults() {
        let defaults = Settings::new("registry.example/vsock-sidecar:1").unwrap();
        assert_eq!(given("").unwrap(), defaults);
        assert_eq!(given("# nothing\n{}").unwrap(), defaults);
        let settings =
            given("imagePullPolicy: Always\nresources: {requests: {cpu: 1}, limits: {memory: 1Gi}}").unwrap();
        assert_eq!(settings.image_pull_policy, Some(PullPolicy::Always));
        assert_eq!(
            settings.resources,
            json!({"requests": {"cpu": 1}, "limits": {"memory": "1Gi"}})
        );
        assert_eq!(settings.guaranteed_resources, defaults.guaranteed_resources);
    }

    #[test]
    fn what_is_no_setting_is_refused_with_the_keys_there_are() {
        for (text, word) in [
            ("image: x", "image"),
            ("imagePullPolicy: Sometimes", "Sometimes"),
            ("resources: 3", "resources"),
            ("guaranteedResources: {cpu: 1}", "memory"),
            ("- a", "settings.yaml"),
        ] {
            let error = given(text).unwrap_err().to_string();
            assert!(
                error.contains(word) && error.contains("guaranteedResources"),
                "{error}"
            );
        }
    }

    #[test]
    fn an_image_is_one_word() {
        for image in ["", "a b", "a\n", "é"] {
            assert!(Settings::new(image).is_err(), "{image:?}");
        }
    }
}
