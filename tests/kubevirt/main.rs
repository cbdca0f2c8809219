//! KubeVirt: domains before and after, held against libvirt's own schema; the hooks' server as virt-launcher uses it; and a domain
//! that libvirt starts with the sidecar's device.
//!
//! libvirt is installed by `setup.sh` here. A developer who has no use for it sets `VSOCK_TEST_NO_LIBVIRT=1`, which CI refuses.

mod domains;
mod garbage;
mod hook;
mod libvirt;
mod support;
// Made for several tests, each of which uses a part.
#[allow(dead_code)]
#[path = "../vm/mod.rs"]
mod vm;
