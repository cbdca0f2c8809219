//! Why a pod that asks for the sidecar is not let in. Each message names what, where, and what to do.

use super::container::{
    CONFIG_ANNOTATION, INJECT_LABEL, KUBEVIRT_DIRECTORY, KUBEVIRT_VOLUME, NAME, VMM_ANNOTATION,
};
use super::patch::DoesNotFit;
use crate::terminal::escaped;

/// Why a pod that asks for the sidecar cannot have it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// Nothing says what the sidecar is to do.
    #[error(
        "the pod asks for {NAME} (label {INJECT_LABEL}) and has no annotation {CONFIG_ANNOTATION}: set it to the name of the \
         ConfigMap whose key config.yaml is the sidecar's configuration"
    )]
    NoConfig,
    /// The annotation holds what no ConfigMap can be called.
    #[error(
        "annotation {CONFIG_ANNOTATION}: `{}` is no name of a ConfigMap: give a name of at most 253 lower case letters, digits, \
         `-` and `.`, without a namespace",
        shown(name)
    )]
    BadConfigName {
        /// As given.
        name: String,
    },
    /// The VMM's container is not there.
    #[error(
        "annotation {VMM_ANNOTATION}: spec.containers has no container `{}`, only {}: name the one that runs the VMM, or \
         leave the annotation out for `compute` or the first",
        shown(name),
        shown(known)
    )]
    NoSuchContainer {
        /// As given.
        name: String,
        /// Those that there are.
        known: String,
    },
    /// Somebody else's container has our name.
    #[error(
        "{field} is called {NAME} and was not put there by the injector: rename it, or, if it is the sidecar, remove the label \
         {INJECT_LABEL}, since a pod has one sidecar"
    )]
    ContainerTaken {
        /// Where in the pod.
        field: String,
    },
    /// Our container as somebody has changed it.
    #[error(
        "{field} is called {NAME}, the pod is marked as injected, and the container has no {lacks}: remove it from the manifest, \
         and the injector puts in a whole one"
    )]
    ContainerBroken {
        /// Where in the pod.
        field: String,
        /// What is missing.
        lacks: String,
    },
    /// Somebody else's volume has our name.
    #[error("{field} is called {name} and is not {wanted}: rename it, or make it that")]
    VolumeTaken {
        /// Where in the pod.
        field: String,
        /// The volume.
        name: &'static str,
        /// What the injector would have put there.
        wanted: String,
    },
    /// Something else is mounted where the VMM looks for the socket.
    #[error(
        "{field} mounts volume `{}` at {path}, where the VMM finds the sidecar's socket: mount it elsewhere",
        shown(volume)
    )]
    MountTaken {
        /// Where in the pod.
        field: String,
        /// The mount's path.
        path: &'static str,
        /// Whose.
        volume: String,
    },
    /// A part of our volume is mounted where the VMM looks for the socket, which is not in it.
    #[error(
        "{field} mounts a part of its volume at {path} (subPath), where the VMM finds the sidecar's socket: mount all of it"
    )]
    MountOfPart {
        /// Where in the pod.
        field: String,
        /// The mount's path.
        path: &'static str,
    },
    /// There is no Windows build, and no vhost-user.
    #[error(
        "{field} says that the pod runs on Windows, and vhost-user needs Linux: remove the label {INJECT_LABEL}"
    )]
    Windows {
        /// Where in the pod.
        field: &'static str,
    },
    /// KubeVirt that has no plugins, or has them off.
    #[error(
        "the pod is KubeVirt's virt-launcher and has no volume {KUBEVIRT_VOLUME}: turn on KubeVirt's feature gate Plugins \
         (from 1.9), or remove the label {INJECT_LABEL} from the VMI and use a hook sidecar"
    )]
    KubevirtWithoutPlugins,
    /// The sockets would be out of the VMM's sight.
    #[error(
        "{field} does not mount volume {KUBEVIRT_VOLUME} at {KUBEVIRT_DIRECTORY}: this is no pod as KubeVirt makes them from \
         1.9 with the feature gate Plugins; annotation {VMM_ANNOTATION} has to name KubeVirt's own container, if it is there"
    )]
    KubevirtNotMounted {
        /// Where in the pod.
        field: String,
    },
    /// No pod that an API server would have let in.
    #[error("{field} is not {expected}: correct the manifest")]
    Malformed {
        /// Where in the pod.
        field: String,
        /// What it has to be.
        expected: &'static str,
    },
}

impl Refusal {
    /// The HTTP status that the API server gives to who wanted to make the pod.
    pub fn code(&self) -> u16 {
        match self {
            Refusal::Malformed { .. } => 400,
            _ => 422,
        }
    }
}

impl From<DoesNotFit> for Refusal {
    fn from(misfit: DoesNotFit) -> Refusal {
        Refusal::Malformed {
            field: misfit.path,
            expected: "what a pod has there",
        }
    }
}

/// Most characters of a value that is repeated in a message.
const MAX_QUOTE: usize = 80;

/// A stranger's text in a message that ends in logs and terminals.
pub(super) fn shown(text: &str) -> String {
    let mut short: String = text.chars().take(MAX_QUOTE).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    escaped(&short)
}
