//! What it looks like when the VMM takes guest memory away.

use std::fmt;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::memory::Memory;

/// Which part of a memory table could not be had when it was accessed, as far as its files tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemoryLoss {
    /// The file behind a region has become too short for it.
    Truncated {
        /// Guest-physical address of the region.
        start: u64,
        /// Where the region ends in its file, in bytes.
        end: u64,
        /// Length of the file in bytes, as of now.
        len: u64,
    },
    /// No file is too short: the pages that are missing could not be allocated, or not be read.
    Unbacked,
    /// The guest's memory is there, and its dirty log is not.
    DirtyLog,
}

impl MemoryLoss {
    /// Looks for what has become of a memory, if `memory_lost`, or only of its log.
    pub(super) fn of(memory: &Memory, memory_lost: bool) -> MemoryLoss {
        if !memory_lost {
            return MemoryLoss::DirtyLog;
        }
        let too_short = memory.iter().find_map(|region| {
            let file = region.file_offset()?;
            let metadata = file
                .file()
                .metadata()
                .ok()
                .filter(|metadata| metadata.is_file())?;
            let (end, len) = (file.start().saturating_add(region.len()), metadata.len());
            (end > len).then_some(MemoryLoss::Truncated {
                start: region.start_addr().raw_value(),
                end,
                len,
            })
        });
        too_short.unwrap_or(MemoryLoss::Unbacked)
    }
}

impl fmt::Display for MemoryLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MemoryLoss::Truncated { start, end, len } => write!(
                f,
                "the VMM has truncated guest memory: the file of the region at {start:#x} has {len} bytes, and the region \
                 ends at byte {end}"
            ),
            MemoryLoss::Unbacked => f.write_str(
                "a page of guest memory could not be had, although its file is long enough: the file system behind it \
                 (/dev/shm) or the huge pages are used up, or the memory has failed",
            ),
            MemoryLoss::DirtyLog => f.write_str("the VMM has truncated the dirty log"),
        }
    }
}
