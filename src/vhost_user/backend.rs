//! The device as the crate asks for it: features, configuration space, memory.

use std::io;
use std::sync::{Arc, Mutex, OnceLock};

use tracing::{debug, info};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::VhostUserBackend;
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;

use crate::device::Command;
use crate::guest::{GuestRam, Memory};

use super::features::{
    Features, VHOST_F_LOG_ALL, VIRTIO_F_ACCESS_PLATFORM, offered_features, offered_protocol_features,
    socket_types,
};
use super::link::{DeviceLink, lock};
use super::negotiation::{MAX_QUEUE_SIZE, QUEUES};
use super::vring::Vring;
use super::{AccessPlatform, Mode};

/// The dirty bitmap of [`Memory`], however that is called.
pub(super) type Bitmap = <Memory as BitmapOf>::Bitmap;

/// Names the bitmap of a memory type, so that [`Memory`] alone decides.
pub(super) trait BitmapOf {
    /// The bitmap.
    type Bitmap;
}

impl<B> BitmapOf for GuestMemoryMmap<B> {
    type Bitmap = B;
}

/// One session's backend.
pub(super) struct Backend {
    cid: u64,
    mode: Mode,
    policy: AccessPlatform,
    link: Arc<DeviceLink>,
    /// Set once the crate has made them, before it serves a request.
    vrings: OnceLock<Vec<Vring>>,
    /// Virtio features last acknowledged.
    acked: Mutex<u64>,
    /// The memory that the device has, to switch its log.
    ram: Mutex<Option<GuestRam>>,
    /// The channel for requests of ours. Kept only so that it stays open: a VMM may take its end for ours.
    channel: Mutex<Option<vhost::vhost_user::Backend>>,
}

impl Backend {
    pub(super) fn new(cid: u32, mode: Mode, policy: AccessPlatform, link: Arc<DeviceLink>) -> Backend {
        Backend {
            cid: cid.into(),
            mode,
            policy,
            link,
            vrings: OnceLock::new(),
            acked: Mutex::new(0),
            ram: Mutex::new(None),
            channel: Mutex::new(None),
        }
    }

    /// Tells the backend its vrings.
    pub(super) fn adopt(&self, vrings: Vec<Vring>) {
        // A backend is adopted once, by the session that made it.
        let _ = self.vrings.set(vrings);
    }

    /// Follows VHOST_F_LOG_ALL. The crate takes it for nothing but a bit, and would log for ever (see the TODO at
    /// `set_log_base` in vhost-user-backend's handler.rs).
    fn log_writes(&self, enabled: bool) {
        debug!(guest = %self.link.guest, enabled, "dirty log");
        if let Some(ram) = &*lock(&self.ram) {
            ram.set_dirty_log_enabled(enabled);
        }
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = Bitmap;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE.into()
    }

    /// None: the crate starts no worker threads, and the device thread waits for kicks.
    fn queues_per_thread(&self) -> Vec<u64> {
        Vec::new()
    }

    fn features(&self) -> u64 {
        self.link.enter();
        offered_features(self.policy)
    }

    fn acked_features(&self, features: u64) {
        let before = std::mem::replace(&mut *lock(&self.acked), features);
        if before != features {
            let (guest, bits) = (&self.link.guest, Features::virtio(features));
            match before {
                0 if self.link.watch.is_assumed() => {
                    info!(%guest, features = %bits, "the VMM goes on with an earlier session: features assumed");
                }
                _ => info!(%guest, features = %bits, "features agreed"),
            }
        }
        if (before | features) & VIRTIO_F_ACCESS_PLATFORM != 0 {
            // What was mapped for another driver, or another kind of address, is void. An error has raised the alarm.
            let _ = self
                .link
                .call("forget translations", |done| Command::FlushIotlb { done });
        }
        if socket_types(before) != socket_types(features) {
            let (stream, seqpacket) = socket_types(features);
            // An error has raised the alarm.
            let _ = self.link.call("set the socket types", |done| Command::SetTypes {
                stream,
                seqpacket,
                done,
            });
        }
        if (before ^ features) & VHOST_F_LOG_ALL != 0 {
            self.log_writes(features & VHOST_F_LOG_ALL != 0);
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.link.enter();
        VhostUserProtocolFeatures::from_bits_truncate(offered_protocol_features(self.mode))
    }

    /// Each vring is told by the crate as well, and knows what to do with it.
    fn set_event_idx(&self, _enabled: bool) {}

    /// `struct virtio_vsock_config`: guest_cid, le64. Reads beyond it give zeroes, of the length that was asked for:
    /// an answer of any other length is an error to the front-end, and Cloud Hypervisor panics on it.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.link.enter();
        let space = self.cid.to_le_bytes();
        // The crate has checked that offset + size is within 4096; the bound here is for whoever calls otherwise.
        let (offset, size) = (offset as usize, (size as usize).min(4096));
        (offset..offset.saturating_add(size))
            .map(|at| space.get(at).copied().unwrap_or(0))
            .collect()
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<Memory>) -> io::Result<()> {
        self.link.enter();
        let memory = memory.memory().into_inner();
        check_files(&memory)?;
        let ram = GuestRam::new(memory);
        let given = ram.clone();
        self.link
            .call("change the guest memory", |done| Command::SetMemory {
                ram: Some(given),
                done,
            })
            .map_err(io::Error::other)?;
        // Replaces what may be the last reference to the memory before it, which is unmapped here and now.
        *lock(&self.ram) = Some(ram);
        Ok(())
    }

    /// RESET_DEVICE: the crate has disabled the rings, which has stopped them.
    fn reset_device(&self) {
        self.link.enter();
        for vring in self.vrings.get().into_iter().flatten() {
            vring.reset();
        }
        *lock(&self.acked) = 0;
        debug!(guest = %self.link.guest, "device reset by the VMM");
    }

    /// GET_VRING_BASE. The ring was stopped when it became not ready; what is left is to fail if that went wrong,
    /// rather than to answer with a base that is not true.
    fn stop_vring(&self, _queue_index: u32) -> io::Result<()> {
        match self.link.failure() {
            None => Ok(()),
            Some(failure) => Err(io::Error::other(failure.detail)),
        }
    }

    fn set_backend_req_fd(&self, backend: vhost::vhost_user::Backend) {
        self.link.enter();
        *lock(&self.channel) = Some(backend);
    }

    /// Never called: there are no worker threads.
    fn handle_event(&self, _: u16, _: EventSet, _: &[Vring], _: usize) -> io::Result<()> {
        Ok(())
    }
}

/// Refuses regions that end beyond their file: mapping them succeeds, and touching them is a SIGBUS.
fn check_files(memory: &Memory) -> io::Result<()> {
    for region in memory.iter() {
        let Some(file) = region.file_offset() else {
            continue;
        };
        let metadata = file.file().metadata()?;
        let end = file.start().saturating_add(region.len());
        // Devices have no length, and decide themselves what can be mapped.
        if metadata.is_file() && end > metadata.len() {
            return Err(io::Error::other(format!(
                "the region at {:#x} ends at byte {end} of its file, which has {}",
                region.start_addr().0,
                metadata.len()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::testing;

    #[test]
    fn configuration_space_answers_every_read() {
        let (link, _device) = testing::link();
        let backend = Backend::new(0x0102_0304, Mode::Server, AccessPlatform::Auto, Arc::new(link));
        assert_eq!(backend.get_config(0, 8), [4, 3, 2, 1, 0, 0, 0, 0]);
        assert_eq!(backend.get_config(2, 4), [2, 1, 0, 0]);
        assert_eq!(backend.get_config(4, 8), [0; 8]);
        assert_eq!(backend.get_config(256, 3), [0; 3]);
        assert_eq!(backend.get_config(u32::MAX, 2), [0; 2]);
        assert_eq!(backend.get_config(0, 0), [0u8; 0]);
        assert_eq!(backend.get_config(0, u32::MAX).len(), 4096);
    }
}
