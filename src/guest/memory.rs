//! Guest memory as the device sees it.

use std::sync::Arc;

use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::GuestMemoryMmap;

/// The guest memory of one memory table, dirty pages tracked.
pub type Memory = GuestMemoryMmap<BitmapMmapRegion>;

/// One memory table's guest memory: cheap to clone, mapped as long as a clone lives.
#[derive(Clone)]
pub struct GuestRam(Arc<Memory>);

impl GuestRam {
    /// Guest memory in which addresses of rings and buffers are guest-physical.
    pub fn new(memory: Arc<Memory>) -> GuestRam {
        GuestRam(memory)
    }
}
