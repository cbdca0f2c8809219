//! The guest's memory: regions of shared memory (memfd), mapped here and passed to the back-end by descriptor.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::error::{Error, Result};
use crate::sys::sigbus::Guarded;

/// Page size of the guests that we imitate.
pub const PAGE: usize = 4096;

/// One region of guest memory: a memfd, its place in the guest's address space and our mapping of it.
/// Clones share the memory.
#[derive(Clone, Debug)]
pub struct Region {
    gpa: u64,
    file: Arc<File>,
    map: Arc<Guarded<MmapRegion<()>>>,
}

impl Region {
    /// Creates a region of `size` bytes (a multiple of the page size) at guest physical address `gpa`. Pages are
    /// allocated by the kernel when they are first touched.
    pub fn new(gpa: u64, size: usize) -> Result<Region> {
        let fd = memfd_create("guest-memory", MemfdFlags::CLOEXEC).map_err(Error::errno("memfd_create"))?;
        ftruncate(&fd, size as u64).map_err(Error::errno("set the size of guest memory"))?;
        let file = Arc::new(File::from(fd));
        let map =
            MmapRegion::from_file(FileOffset::from_arc(file.clone(), 0), size).map_err(|e| Error::Io {
                what: "map guest memory",
                source: std::io::Error::other(e.to_string()),
            })?;
        Ok(Region {
            gpa,
            file,
            map: Arc::new(Guarded::mapping(Arc::new(map))),
        })
    }

    /// Guest physical address of the first byte.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Length in bytes.
    pub fn size(&self) -> usize {
        self.map.size()
    }

    /// The address of the first byte in the front-end's address space: the "user address" of vhost-user. Like
    /// QEMU we tell the true one.
    pub fn user_addr(&self) -> u64 {
        self.map.as_ptr() as u64
    }

    /// The memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Shortens the memfd under everybody's feet: who touches a page beyond `size` gets SIGBUS. This guest itself reads zeros
    /// then, and goes on: it is the device that is to be judged.
    pub fn truncate(&self, size: u64) -> Result<()> {
        ftruncate(&self.file, size).map_err(Error::errno("truncate guest memory"))
    }

    fn offset_of(&self, gpa: u64, len: usize) -> Option<usize> {
        let offset = usize::try_from(gpa.checked_sub(self.gpa)?).ok()?;
        (offset.checked_add(len)? <= self.size()).then_some(offset)
    }
}

/// A window of one region, for structures that are touched often: no search for the region at each access.
///
/// The driver sees it as one piece. Under an IOMMU its pages may lie anywhere in the region, and change places while
/// clones of the window are in use.
#[derive(Clone, Debug)]
pub struct Window {
    map: Arc<Guarded<MmapRegion<()>>>,
    /// Guest physical address of the region's first byte.
    region_gpa: u64,
    place: Place,
    len: usize,
    /// What the device calls the first byte.
    bus: u64,
}

/// Where a window's bytes are.
#[derive(Clone, Debug)]
enum Place {
    /// Side by side, from this offset in the region on.
    At(usize),
    /// Page by page: the offset of each in the region.
    Pages(Arc<[AtomicUsize]>),
}

impl Window {
    /// The device's address of the first byte: guest-physical, or an IOVA after [`Window::set_bus`].
    pub fn bus(&self) -> u64 {
        self.bus
    }

    /// Says what the device calls the first byte, once the window is mapped in an IOMMU.
    pub fn set_bus(&mut self, bus: u64) {
        self.bus = bus;
    }

    /// The first byte's address in the front-end's address space.
    pub fn user_addr(&self) -> u64 {
        self.map.as_ptr() as u64 + self.at(0) as u64
    }

    /// The front-end's address of the page that holds the byte at `offset`.
    pub fn user_page(&self, offset: usize) -> u64 {
        let at = self.at(offset);
        self.map.as_ptr() as u64 + (at - at % PAGE) as u64
    }

    /// The front-end's addresses of the pages that hold `len` bytes from `offset` on.
    pub fn user_pages(&self, offset: usize, len: usize) -> Vec<u64> {
        self.check(offset, len);
        let within = self.at(offset) % PAGE;
        let starts = (offset..offset + len).step_by(PAGE);
        // A step of a page from wherever the range begins meets every page of it but for the last, perhaps.
        let mut pages: Vec<u64> = starts.map(|at| self.user_page(at)).collect();
        if within + len > pages.len() * PAGE {
            pages.push(self.user_page(offset + len - 1));
        }
        pages
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Moves page `page` of a window in pages to the page at guest-physical address `gpa`, of the same region, with its
    /// contents; answers the guest-physical address of the old one, which keeps them. `None` if the window lies in one
    /// piece. Who accesses the window meanwhile may lose what it writes.
    pub fn move_page(&self, page: usize, gpa: u64) -> Option<u64> {
        let Place::Pages(pages) = &self.place else {
            return None;
        };
        let slot = pages.get(page)?;
        let fresh = usize::try_from(gpa.checked_sub(self.region_gpa)?).ok()?;
        let old = slot.load(Ordering::Relaxed);
        let memory = self.map.as_volatile_slice();
        let mut bytes = [0; PAGE];
        memory.read_slice(&mut bytes, old).ok()?;
        memory.write_slice(&bytes, fresh).ok()?;
        slot.store(fresh, Ordering::Relaxed);
        Some(self.region_gpa + old as u64)
    }

    /// Loads an integer. `offset` lies in the window and is aligned: the driver's own arithmetic, a slip of which
    /// is a bug of this module and panics.
    pub fn load<T: AtomicAccess>(&self, offset: usize, order: Ordering) -> T {
        self.check(offset, size_of::<T>());
        self.map
            .as_volatile_slice()
            .load(self.at(offset), order)
            .expect("checked against the window")
    }

    /// Stores an integer; see [`Window::load`] about `offset`.
    pub fn store<T: AtomicAccess>(&self, value: T, offset: usize, order: Ordering) {
        self.check(offset, size_of::<T>());
        self.map
            .as_volatile_slice()
            .store(value, self.at(offset), order)
            .expect("checked against the window");
    }

    /// Copies bytes out; see [`Window::load`] about `offset`.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.check(offset, bytes.len());
        let mut done = 0;
        while done < bytes.len() {
            let len = self.piece(offset + done, bytes.len() - done);
            self.map
                .as_volatile_slice()
                .read_slice(&mut bytes[done..done + len], self.at(offset + done))
                .expect("checked against the window");
            done += len;
        }
    }

    /// Copies bytes in; see [`Window::load`] about `offset`.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.check(offset, bytes.len());
        let mut done = 0;
        while done < bytes.len() {
            let len = self.piece(offset + done, bytes.len() - done);
            self.map
                .as_volatile_slice()
                .write_slice(&bytes[done..done + len], self.at(offset + done))
                .expect("checked against the window");
            done += len;
        }
    }

    /// Sets every byte to zero.
    pub fn clear(&self) {
        let zeros = [0u8; PAGE];
        for at in (0..self.len).step_by(PAGE) {
            self.write(at, &zeros[..PAGE.min(self.len - at)]);
        }
    }

    /// Where the byte at `offset` is in the region.
    fn at(&self, offset: usize) -> usize {
        match &self.place {
            Place::At(start) => start + offset,
            Place::Pages(pages) => pages
                .get(offset / PAGE)
                .map_or(usize::MAX, |page| page.load(Ordering::Relaxed) + offset % PAGE),
        }
    }

    /// How many of `len` bytes from `offset` on lie side by side.
    fn piece(&self, offset: usize, len: usize) -> usize {
        match self.place {
            Place::At(_) => len,
            Place::Pages(_) => len.min(PAGE - offset % PAGE),
        }
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(
            offset + len <= self.len,
            "{len} bytes at {offset} leave a window of {}",
            self.len
        );
    }
}

/// All of the guest's memory, with a simple allocator: the driver takes areas of the first region, front to back,
/// and never gives them back (a guest reboot starts over).
#[derive(Clone, Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
    next_free: u64,
}

/// Where the driver's structures start in the first region: guest physical address 0 stays unused, so that a zero
/// address is always a mistake.
const FIRST_ALLOCATION: u64 = 0x10_0000;

impl GuestMemory {
    /// One region of `size` bytes at guest physical address 0.
    pub fn new(size: usize) -> Result<GuestMemory> {
        Ok(GuestMemory {
            regions: vec![Region::new(0, size)?],
            next_free: FIRST_ALLOCATION,
        })
    }

    /// The regions, in the order in which they were added.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Adds a region (memory hot-plug). The back-end learns of it by `FrontEnd::add_mem_reg` or `set_mem_table`.
    pub fn add_region(&mut self, gpa: u64, size: usize) -> Result<Region> {
        let region = Region::new(gpa, size)?;
        self.regions.push(region.clone());
        Ok(region)
    }

    /// Takes the region at `gpa` out; the mapping lives as long as the answer.
    pub fn remove_region(&mut self, gpa: u64) -> Option<Region> {
        let at = self.regions.iter().position(|r| r.gpa == gpa)?;
        Some(self.regions.remove(at))
    }

    /// Replaces the first region's memory by a copy in a new memfd at the same address, as after a migration. Our
    /// own windows still point to the old memory: rebuild the driver.
    pub fn replace_first_region(&mut self) -> Result<()> {
        let first = self.regions.first().ok_or(Error::Address { gpa: 0, len: 0 })?;
        let fresh = Region::new(first.gpa, first.size())?;
        self.regions[0] = fresh;
        self.next_free = FIRST_ALLOCATION;
        Ok(())
    }

    /// Takes `len` bytes of the first region, aligned to `align` (a power of two).
    pub fn allocate(&mut self, len: usize, align: u64) -> Result<Window> {
        let gpa = self.next_free.next_multiple_of(align);
        let window = self.window(gpa, len)?;
        self.next_free = gpa + len as u64;
        Ok(window)
    }

    /// Takes `len` bytes of the first region in pages, none of which lies behind the one that precedes it.
    pub fn allocate_scattered(&mut self, len: usize) -> Result<Window> {
        let mut window = self.allocate(len.next_multiple_of(PAGE), PAGE as u64)?;
        let Place::At(start) = window.place else {
            return Ok(window);
        };
        let pages = window.len / PAGE;
        // The odd ones downwards, then the even ones: a page's successor is never its neighbour.
        let odd = (0..pages).rev().filter(|page| page % 2 == 1);
        let places = odd.chain((0..pages).filter(|page| page % 2 == 0));
        window.place = Place::Pages(places.map(|page| AtomicUsize::new(start + page * PAGE)).collect());
        window.len = len;
        Ok(window)
    }

    /// Forgets every allocation and starts again `skip` bytes further than usual, so that the rings after a reboot
    /// stand elsewhere than before, as they do in a real guest.
    pub fn forget_allocations(&mut self, skip: u64) {
        self.next_free = FIRST_ALLOCATION + skip;
    }

    /// A window on `len` bytes at `gpa`, which one region must hold.
    pub fn window(&self, gpa: u64, len: usize) -> Result<Window> {
        self.regions
            .iter()
            .find_map(|r| {
                Some(Window {
                    map: r.map.clone(),
                    region_gpa: r.gpa,
                    place: Place::At(r.offset_of(gpa, len)?),
                    len,
                    bus: gpa,
                })
            })
            .ok_or(Error::Address { gpa, len })
    }

    /// Copies bytes out of guest memory.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<()> {
        self.window(gpa, bytes.len())?.read(0, bytes);
        Ok(())
    }

    /// Copies bytes into guest memory.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<()> {
        self.window(gpa, bytes.len())?.write(0, bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_shared_memory_and_windows_keep_to_them() {
        let mut memory = GuestMemory::new(4 << 20).unwrap();
        memory.add_region(0x1_0000_0000, 1 << 20).unwrap();
        memory.write(0x1_0000_0ff0, b"over a page border").unwrap();
        let mut got = [0; 18];
        memory.clone().read(0x1_0000_0ff0, &mut got).unwrap();
        assert_eq!(&got, b"over a page border");

        assert!(
            memory.window((4 << 20) - 8, 9).is_err(),
            "one byte beyond the first region"
        );
        assert!(
            memory.window(u64::MAX - 3, 8).is_err(),
            "wraps around the address space"
        );
        let hot = memory.remove_region(0x1_0000_0000).unwrap();
        assert_eq!(hot.size(), 1 << 20);
        assert!(memory.window(0x1_0000_0000, 1).is_err(), "gone with its region");
    }

    #[test]
    fn allocations_are_aligned_and_do_not_overlap() {
        let mut memory = GuestMemory::new(4 << 20).unwrap();
        let a = memory.allocate(100, 64).unwrap();
        let b = memory.allocate(100, 4096).unwrap();
        assert_eq!(b.bus() % 4096, 0);
        assert!(b.bus() >= a.bus() + 100);
        assert!(memory.allocate(8 << 20, 1).is_err(), "larger than the region");
        memory.forget_allocations(0x40_000);
        assert_eq!(memory.allocate(1, 1).unwrap().bus(), FIRST_ALLOCATION + 0x40_000);
    }

    #[test]
    fn a_scattered_window_is_one_piece_for_the_driver_and_none_in_memory() {
        let mut memory = GuestMemory::new(4 << 20).unwrap();
        let window = memory.allocate_scattered(5 * PAGE).unwrap();
        let pages = window.user_pages(0, window.len());
        assert_eq!(pages.len(), 5);
        for pair in pages.windows(2) {
            assert_ne!(pair[0] + PAGE as u64, pair[1], "neighbours");
        }
        let bytes: Vec<u8> = (0..5 * PAGE).map(|i| (i / 7) as u8).collect();
        window.write(0, &bytes);
        let mut got = vec![0; 3000];
        window.read(PAGE - 1000, &mut got);
        assert_eq!(got, bytes[PAGE - 1000..PAGE + 2000]);
        assert_eq!(window.user_pages(PAGE - 1, 2), pages[..2]);
        assert_eq!(window.user_pages(PAGE, PAGE), pages[1..2]);
        assert_eq!(window.user_pages(2 * PAGE - 4, 4 + PAGE + 1), pages[1..4]);

        let fresh = memory.allocate(PAGE, PAGE as u64).unwrap().bus();
        let old = window.clone().move_page(1, fresh).unwrap();
        memory.write(old, &[0xee; PAGE]).unwrap();
        window.read(0, &mut got);
        assert_eq!(got, bytes[..3000], "contents move along, for every clone");
        window.read(PAGE, &mut got);
        assert_eq!(got, bytes[PAGE..PAGE + 3000]);
    }
}
