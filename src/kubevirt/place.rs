//! Where a hook listens, and which path QEMU has for our socket.
//!
//! The sidecar and `compute` share a volume. To a plugin its path is the same in both. A legacy hook sidecar has only its own part
//! of the volume, at `/var/run/kubevirt-hooks`, while `compute` has the whole of it there, so that what is
//! `/var/run/kubevirt-hooks/userdata/vsock.sock` to us is `/var/run/kubevirt-hooks/hook-sidecar-0/userdata/vsock.sock` to QEMU. The name
//! in between comes in the environment variable `CONTAINER_NAME`; KubeVirt without it has one directory for all.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::domain::{Device, DeviceError};
use crate::config::{Guest, VhostUserMode};

/// Directory of legacy hooks, `/var/run/kubevirt-hooks`: virt-launcher dials every file in it.
const LEGACY: &str = "kubevirt-hooks";
/// Directory in it for everything else; virt-launcher dials no directory.
const USER_DIRECTORY: &str = "userdata";

/// Why there can be no hook.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Not one guest.
    #[error(
        "--kubevirt-hook is for one guest, the pod's virtual machine, and the configuration has {guests}: \
         leave one in it"
    )]
    Guests {
        /// How many there are.
        guests: usize,
    },
    /// The sidecar would connect to the VMM.
    #[error(
        "guest {guest}: vhostUser.mode is client, and the QEMU that KubeVirt starts connects to the sidecar: use server"
    )]
    Client {
        /// The guest.
        guest: String,
    },
    /// The hook is not in a directory.
    #[error("--kubevirt-hook {hook} is no absolute path of a socket in a directory", hook = hook.display())]
    NoDirectory {
        /// The hook's socket.
        hook: PathBuf,
    },
    /// The socket is where QEMU does not see it.
    #[error(
        "guest {guest}: vhostUser.socket {socket} is outside of {directory}, the directory that KubeVirt shares with QEMU: \
         choose a path in there, or say what the path is to QEMU with --kubevirt-socket",
        socket = socket.display(), directory = directory.display()
    )]
    Outside {
        /// The guest.
        guest: String,
        /// The vhost-user socket.
        socket: PathBuf,
        /// The hook's directory.
        directory: PathBuf,
    },
    /// virt-launcher would speak gRPC to it.
    #[error(
        "guest {guest}: vhostUser.socket {socket} is beside the hook's socket, where KubeVirt takes every file for a hook: \
         use {example}",
        socket = socket.display(), example = example.display()
    )]
    Dialled {
        /// The guest.
        guest: String,
        /// The vhost-user socket.
        socket: PathBuf,
        /// A path that will do.
        example: PathBuf,
    },
    /// The directory for the socket cannot be made.
    #[error("cannot make the directory {directory} for the vhost-user socket: {source}", directory = directory.display())]
    UserDirectory {
        /// The directory.
        directory: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// QEMU cannot be told of the socket.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A hook that is to be served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hook {
    /// Its socket.
    pub socket: PathBuf,
    /// What domains get.
    pub device: Device,
}

impl Hook {
    /// The hook at `socket` for the only one of `guests`. QEMU connects to `qemu_socket`, or if that is not given to the guest's
    /// own socket, under the name that it has in the container `compute`; `container` is `CONTAINER_NAME`.
    pub fn new(
        socket: &Path,
        guests: &[Guest],
        qemu_socket: Option<&Path>,
        container: Option<&OsStr>,
    ) -> Result<Hook, PlaceError> {
        let [guest] = guests else {
            return Err(PlaceError::Guests { guests: guests.len() });
        };
        if guest.vhost_user.mode != VhostUserMode::Server {
            return Err(PlaceError::Client {
                guest: guest.name.clone(),
            });
        }
        let path = path_in_compute(socket, guest, qemu_socket, container)?;
        Ok(Hook {
            socket: socket.to_owned(),
            device: Device::at(&path)?,
        })
    }
}

fn path_in_compute(
    hook: &Path,
    guest: &Guest,
    qemu_socket: Option<&Path>,
    container: Option<&OsStr>,
) -> Result<PathBuf, PlaceError> {
    let ours = &guest.vhost_user.socket;
    let directory = directory_of(hook)?;
    let is_legacy = is_legacy(directory);
    if is_legacy && ours.parent() == Some(directory) {
        return Err(PlaceError::Dialled {
            guest: guest.name.clone(),
            socket: ours.clone(),
            example: directory.join(USER_DIRECTORY).join("vsock.sock"),
        });
    }
    if let Some(path) = qemu_socket {
        return Ok(path.to_owned());
    }
    let Ok(inside) = ours.strip_prefix(directory) else {
        return Err(PlaceError::Outside {
            guest: guest.name.clone(),
            socket: ours.clone(),
            directory: directory.to_owned(),
        });
    };
    Ok(match container.filter(|name| is_legacy && !name.is_empty()) {
        Some(container) => directory.join(container).join(inside),
        None => ours.clone(),
    })
}

/// Makes the directory `userdata` beside a legacy hook, if there is none: the volume is empty when the container starts, and the
/// image has no shell to make one. Others' directories are left alone.
pub fn make_user_directory(hook: &Path) -> Result<(), PlaceError> {
    let directory = directory_of(hook)?;
    if !is_legacy(directory) {
        return Ok(());
    }
    let directory = directory.join(USER_DIRECTORY);
    let made = match DirBuilder::new().mode(0o770).create(&directory) {
        // What the umask took away, since `compute` may run as another user of the same group. The set-group-ID bit of a volume
        // with an fsGroup has come by itself and stays.
        Ok(()) => fs::metadata(&directory).and_then(|made| {
            let mode = made.permissions().mode() | 0o770;
            fs::set_permissions(&directory, Permissions::from_mode(mode))
        }),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    };
    made.map_err(|source| PlaceError::UserDirectory { directory, source })
}

fn directory_of(hook: &Path) -> Result<&Path, PlaceError> {
    hook.parent()
        .filter(|directory| hook.is_absolute() && !directory.as_os_str().is_empty())
        .ok_or_else(|| PlaceError::NoDirectory {
            hook: hook.to_owned(),
        })
}

fn is_legacy(directory: &Path) -> bool {
    directory.file_name() == Some(OsStr::new(LEGACY))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    const LEGACY_HOOK: &str = "/var/run/kubevirt-hooks/vsock-sidecar.sock";
    const PLUGIN_HOOK: &str = "/var/run/kubevirt-plugin/vsock-sidecar/hook.sock";

    fn guests(sockets: &[&str]) -> Vec<Guest> {
        let guests: String = (3..)
            .zip(sockets)
            .map(|(cid, socket)| format!("- {{name: g{cid}, cid: {cid}, vhostUser: {{socket: {socket}}}}}\n"))
            .collect();
        config::parse(&format!("guests:\n{guests}"), "test")
            .unwrap()
            .0
            .guests
    }

    fn path(hook: &str, socket: &str, container: Option<&str>) -> Result<String, String> {
        Hook::new(
            Path::new(hook),
            &guests(&[socket]),
            None,
            container.map(OsStr::new),
        )
        .map(|hook| hook.device.socket().to_owned())
        .map_err(|error| error.to_string())
    }

    #[test]
    fn a_legacy_hook_names_the_socket_as_compute_sees_it() {
        let ours = "/var/run/kubevirt-hooks/userdata/vsock.sock";
        let theirs = "/var/run/kubevirt-hooks/hook-sidecar-0/userdata/vsock.sock";
        assert_eq!(path(LEGACY_HOOK, ours, Some("hook-sidecar-0")).unwrap(), theirs);
        // Before KubeVirt gave each sidecar a part of the volume.
        assert_eq!(path(LEGACY_HOOK, ours, None).unwrap(), ours);
        assert_eq!(path(LEGACY_HOOK, ours, Some("")).unwrap(), ours);
    }

    #[test]
    fn a_plugins_socket_has_one_name() {
        let ours = "/var/run/kubevirt-plugin/vsock-sidecar/vsock.sock";
        assert_eq!(path(PLUGIN_HOOK, ours, Some("anything")).unwrap(), ours);
        assert_eq!(ours, super::super::DEFAULT_SOCKET);
    }

    #[test]
    fn a_socket_that_qemu_cannot_see_or_kubevirt_would_dial_is_refused() {
        let outside = path(LEGACY_HOOK, "/run/vsock-sidecar/vsock.sock", None).unwrap_err();
        assert!(outside.contains("--kubevirt-socket"), "{outside}");
        let dialled = path(LEGACY_HOOK, "/var/run/kubevirt-hooks/vsock.sock", None).unwrap_err();
        assert!(dialled.contains("/userdata/vsock.sock"), "{dialled}");
    }

    #[test]
    fn an_operator_who_knows_better_is_believed() {
        let guests = guests(&["/run/vsock-sidecar/vsock.sock"]);
        let given = Some(Path::new("/shared/vsock.sock"));
        let hook = Hook::new(Path::new(LEGACY_HOOK), &guests, given, None).unwrap();
        assert_eq!(hook.device.socket(), "/shared/vsock.sock");
        let relative = Some(Path::new("vsock.sock"));
        Hook::new(Path::new(LEGACY_HOOK), &guests, relative, None).unwrap_err();
    }

    #[test]
    fn a_pod_has_one_virtual_machine() {
        let sockets = [
            "/var/run/kubevirt-hooks/userdata/a",
            "/var/run/kubevirt-hooks/userdata/b",
        ];
        let error = Hook::new(Path::new(LEGACY_HOOK), &guests(&sockets), None, None).unwrap_err();
        assert!(error.to_string().contains("the configuration has 2"), "{error}");
    }

    #[test]
    fn the_directory_for_the_socket_is_made_once_and_only_for_legacy_hooks() {
        let dir = tempfile::tempdir().unwrap();
        let hooks = dir.path().join(LEGACY);
        fs::create_dir(&hooks).unwrap();
        fs::set_permissions(&hooks, Permissions::from_mode(0o2770)).unwrap();
        for _ in 0..2 {
            make_user_directory(&hooks.join("h.sock")).unwrap();
            let mode = fs::metadata(hooks.join(USER_DIRECTORY))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o7777, 0o2770);
        }
        make_user_directory(&dir.path().join("h.sock")).unwrap();
        assert!(!dir.path().join(USER_DIRECTORY).exists());
        make_user_directory(Path::new("h.sock")).unwrap_err();
    }
}
