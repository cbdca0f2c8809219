//! KubeVirt: how a virtual machine that KubeVirt describes gets our device.
//!
//! # Theory of operation
//!
//! KubeVirt makes a libvirt domain of a VirtualMachineInstance in the container `compute`, and knows no vhost-user vsock. Three of
//! its interfaces let somebody change the domain first, and all of them end in [`define`]:
//!
//! | interface | KubeVirt | who calls | here |
//! |---|---|---|---|
//! | a command in the image of `sidecar-shim` | up to 1.9 and later (deprecated) | the shim: `onDefineDomain --vmi JSON --domain XML` | `vsock-sidecar kubevirt on-define-domain`, and the program by that name |
//! | hook sidecar | the same | virt-launcher, gRPC `kubevirt.hooks.v1alpha3.Callbacks` | [`Hook`] |
//! | plugin with a sidecar | from 1.9 | virt-launcher, gRPC `kubevirt.hooks.plugins.v1alpha1.DomainHookService` | [`Hook`] |
//!
//! A plugin with an expression in CEL needs no code of ours (docs/kubevirt.md).
//!
//! # Order
//!
//! QEMU ends at once if nobody listens on the vhost-user socket. A hook sidecar is a plain container and nothing orders it before
//! `compute`, but virt-launcher waits for as many hook sockets as there are hook sidecars before it defines the domain, and takes
//! every file in the directory for one. So [`Hook::serve`] is called after the vhost-user socket listens, and its file does not
//! exist before.
//!
//! # Invariants
//!
//! 1. [`define`] is a function: the same domain, VMI and device give the same answer, and its own output comes back unchanged.
//! 2. What a hook is sent is bounded (see [`hook`]); what it means ends in an error of that call and never in the end of the
//!    process.
//! 3. A hook changes nothing in the sidecar but that Shutdown begins the drain.

pub mod domain;
pub mod hook;
mod place;
mod vmi;

pub use hook::{HookError, HookHandle};
pub use place::{Hook, PlaceError, make_user_directory};
pub use vmi::{Vmi, VmiError, Warning};

use domain::{Device, DeviceError, DomainError};

/// Where the socket is if nobody says otherwise: the directory of the Plugin `vsock-sidecar`, which is the same in both
/// containers.
pub const DEFAULT_SOCKET: &str = "/var/run/kubevirt-plugin/vsock-sidecar/vsock.sock";

/// Why a domain was not given the device.
#[derive(Debug, thiserror::Error)]
pub enum DefineError {
    /// The VirtualMachineInstance will not do.
    #[error(transparent)]
    Vmi(#[from] VmiError),
    /// What it says about the device will not do.
    #[error("annotation of the VirtualMachineInstance: {0}")]
    Device(#[from] DeviceError),
    /// The domain will not do.
    #[error(transparent)]
    Domain(#[from] DomainError),
}

impl DefineError {
    /// Whether the request could not be read; else it was read and is refused.
    pub fn is_unreadable(&self) -> bool {
        match self {
            DefineError::Vmi(VmiError::Malformed { .. } | VmiError::TooLong { .. }) => true,
            DefineError::Domain(error) => !matches!(error, DomainError::Conflict(_)),
            DefineError::Vmi(VmiError::AutoattachVsock) | DefineError::Device(_) => false,
        }
    }
}

/// A domain with the device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Defined {
    /// The domain, XML.
    pub domain: String,
    /// Whether it was another one before.
    pub changed: bool,
    /// `namespace/name` of the VMI, as far as it is known.
    pub name: String,
    /// What the operator should know.
    pub warnings: Vec<Warning>,
}

/// Gives the domain `xml` of the VMI `json` the device; an empty `json` is no VMI, and nothing is asked of it.
pub fn define(xml: &[u8], json: &[u8], device: &Device) -> Result<Defined, DefineError> {
    let vmi = match json.is_empty() {
        true => Vmi::default(),
        false => Vmi::parse(json)?,
    };
    let device = vmi.place(device.clone())?;
    let edited = domain::edit(xml, &device)?;
    let changed = matches!(edited, std::borrow::Cow::Owned(_));
    Ok(Defined {
        domain: edited.into_owned(),
        changed,
        name: vmi.name,
        warnings: vmi.warnings,
    })
}
