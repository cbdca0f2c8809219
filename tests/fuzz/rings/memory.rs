//! Guest memory twice: the real one, which the code under test writes to, and a copy in which what it should have written is
//! written by the model. Both must be the same at the end.

use std::collections::BTreeMap;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vsock_sidecar::guest::{Access, GuestRam, Memory, Permission, Slice};

/// Bytes of each region.
pub const REGION: usize = 0x1_0000;
/// Where the regions begin: two that are neighbours for the guest and not for us, and one behind a hole.
pub const REGIONS: [u64; 3] = [0, 0x1_0000, 0x10_0000];
pub const PAGE: u64 = 4096;
/// Pages of memory.
const PAGES: usize = REGIONS.len() * REGION / PAGE as usize;

/// A run of bytes in the copy: where, and how many.
pub type Run = (usize, usize);

/// What an address may be used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page {
    pub gpa: u64,
    pub permission: Permission,
}

impl Page {
    /// Not asked of the code that is judged.
    pub fn allows(self, access: Access) -> bool {
        match self.permission {
            Permission::ReadWrite => true,
            Permission::Read => access == Access::Read,
            Permission::Write => access == Access::Write,
        }
    }
}

/// Why an address has no memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lack {
    /// There is none, or the range wraps around.
    Unmapped,
    /// It is not translated, or not for this.
    Missing,
}

/// Guest memory, its copy, and what is known of translations.
pub struct Ram {
    memory: Arc<Memory>,
    pub ram: GuestRam,
    copy: Vec<u8>,
    /// What is mapped, by I/O virtual page; `None` without an IOMMU.
    pub pages: Option<BTreeMap<u64, Page>>,
}

thread_local! {
    static MEMORY: Arc<Memory> = Arc::new(
        Memory::from_ranges(&REGIONS.map(|start| (GuestAddress(start), REGION))).expect("memory"),
    );
}

impl Ram {
    /// All zero.
    pub fn new(translated: bool) -> Ram {
        let memory = MEMORY.with(Arc::clone);
        let zeroes = [0; REGION];
        for start in REGIONS {
            memory
                .write_slice(&zeroes, GuestAddress(start))
                .expect("a region");
        }
        Ram {
            ram: GuestRam::new(Arc::clone(&memory)),
            memory,
            copy: vec![0; REGIONS.len() * REGION],
            pages: translated.then(BTreeMap::new),
        }
    }

    /// Where an address of the guest is in the copy.
    pub fn flat(gpa: u64) -> Option<usize> {
        REGIONS.iter().enumerate().find_map(|(n, start)| {
            let at = gpa.checked_sub(*start).filter(|at| *at < REGION as u64)?;
            Some(n * REGION + at as usize)
        })
    }

    /// Where the driver's page is, whatever is mapped: no two neighbours are neighbours in memory behind an IOMMU.
    pub fn home(&self, address: u64) -> u64 {
        if self.pages.is_none() {
            return address;
        }
        let Some(flat) = Ram::flat(address) else {
            return address;
        };
        let page = flat / PAGE as usize * 5 % PAGES * PAGE as usize;
        REGIONS[page / REGION] + (page % REGION) as u64 + address % PAGE
    }

    /// The driver writes.
    pub fn put(&mut self, address: u64, bytes: &[u8]) {
        for (n, byte) in (0..).zip(bytes) {
            let gpa = self.home(address.wrapping_add(n));
            if let Some(flat) = Ram::flat(gpa) {
                self.copy[flat] = *byte;
                self.memory
                    .write_obj(*byte, GuestAddress(gpa))
                    .expect("in a region");
            }
        }
    }

    /// The bytes that a device's range means, in runs as long as they may be: one for each page behind an IOMMU, one for each
    /// region otherwise.
    pub fn runs(&self, address: u64, len: u64, access: Access) -> Result<Vec<Run>, Lack> {
        let mut runs = Vec::new();
        if len == 0 {
            return Ok(runs);
        }
        let last = address.checked_add(len - 1).ok_or(Lack::Unmapped)?;
        let (mut at, mut missing) = (address, None);
        loop {
            let (gpa, end) = match &self.pages {
                None => (at, last),
                Some(pages) => {
                    let end = last.min(at | (PAGE - 1));
                    let page = pages.get(&(at & !(PAGE - 1)));
                    match page.filter(|page| page.allows(access)) {
                        Some(page) => (page.gpa + at % PAGE, end),
                        // Not looked at any further: the rest of the range is not known either.
                        None => {
                            missing = Some(Lack::Missing);
                            break;
                        }
                    }
                }
            };
            let flat = Ram::flat(gpa).ok_or(Lack::Unmapped)?;
            let n = (end - at + 1).min((REGION - flat % REGION) as u64);
            runs.push((flat, n as usize));
            match at.checked_add(n).filter(|next| *next <= last) {
                Some(next) => at = next,
                None => break,
            }
        }
        missing.map_or(Ok(runs), Err)
    }

    /// What is in the copy.
    pub fn read(&self, runs: &[Run], skip: usize, len: usize) -> Vec<u8> {
        let runs = part(runs, skip, len);
        let bytes = runs.iter().flat_map(|(at, n)| &self.copy[*at..at + n]);
        bytes.copied().collect()
    }

    /// The model writes: behind the first `skip` bytes of the runs, as many as there are.
    pub fn write(&mut self, runs: &[Run], skip: usize, bytes: &[u8]) {
        let (mut skip, mut rest) = (skip, bytes);
        for (at, n) in runs {
            let passed = skip.min(*n);
            skip -= passed;
            let (now, later) = rest.split_at(rest.len().min(n - passed));
            self.copy[at + passed..at + passed + now.len()].copy_from_slice(now);
            rest = later;
        }
        assert!(rest.is_empty(), "the model writes beyond its runs");
    }

    /// Where a slice of the code under test lies in the copy; it must lie in one region.
    pub fn of_slice(&self, slice: &Slice<'_>) -> Run {
        let guard = slice.ptr_guard();
        let from = guard.as_ptr() as usize;
        for (n, start) in REGIONS.iter().enumerate() {
            let base = self
                .memory
                .get_host_address(GuestAddress(*start))
                .expect("a region") as usize;
            if let Some(at) = from.checked_sub(base).filter(|at| *at < REGION) {
                assert!(at + slice.len() <= REGION, "a slice goes beyond its region");
                return (n * REGION + at, slice.len());
            }
        }
        panic!("a slice is not in guest memory");
    }

    /// Real memory is what the model says.
    pub fn assert_same(&self) {
        let mut real = vec![0; REGION];
        for (n, start) in REGIONS.iter().enumerate() {
            self.memory
                .read_slice(&mut real, GuestAddress(*start))
                .expect("a region");
            let copy = &self.copy[n * REGION..][..REGION];
            if real != copy {
                let at = real.iter().zip(copy).position(|(real, copy)| real != copy);
                let at = at.expect("they differ");
                panic!(
                    "guest address {:#x} holds {:#x} instead of {:#x}",
                    *start + at as u64,
                    real[at],
                    copy[at]
                );
            }
        }
    }

    /// The model gives up to know what was written, but not where it may have been.
    pub fn believe(&mut self) {
        let mut real = vec![0; PAGE as usize];
        for page in (0..PAGES).map(|page| page * PAGE as usize) {
            let gpa = REGIONS[page / REGION] + (page % REGION) as u64;
            self.memory
                .read_slice(&mut real, GuestAddress(gpa))
                .expect("a page");
            let copy = &mut self.copy[page..][..PAGE as usize];
            if real != copy {
                let mut pages = self.pages.iter().flat_map(BTreeMap::values);
                let writable = pages.any(|page| page.gpa == gpa && page.allows(Access::Write));
                assert!(
                    writable || self.pages.is_none(),
                    "guest page {gpa:#x} may not be written"
                );
                copy.copy_from_slice(&real);
            }
        }
    }
}

/// The same bytes in as few runs as possible.
pub fn joined(runs: impl IntoIterator<Item = Run>) -> Vec<Run> {
    let mut joined: Vec<Run> = Vec::new();
    for (at, n) in runs.into_iter().filter(|(_, n)| *n > 0) {
        match joined.last_mut() {
            Some((from, len)) if *from + *len == at => *len += n,
            _ => joined.push((at, n)),
        }
    }
    joined
}

/// The runs' bytes `skip..skip + len`.
pub fn part(runs: &[Run], skip: usize, len: usize) -> Vec<Run> {
    let (mut skip, mut left) = (skip, len);
    let mut part = Vec::new();
    for (at, n) in runs {
        let passed = skip.min(*n);
        skip -= passed;
        let taken = left.min(n - passed);
        left -= taken;
        if taken > 0 {
            part.push((at + passed, taken));
        }
    }
    part
}
