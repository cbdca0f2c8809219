//! Scatter/gather lists over guest memory.
//!
//! Why not `std::io::IoSlice`: it is a `&[u8]`, and a Rust reference to guest memory must never exist, since
//! the guest changes that memory whenever it likes. An `iovec` is an address and a length which only the
//! kernel dereferences.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// How many slices an [`IoVecs`] holds: room for a burst of RX buffers of 4 KiB each (about 470 KiB), and one
/// eighth of what the kernel takes (`UIO_MAXIOV`).
pub const MAX_IOVECS: usize = 128;

/// A bounded list of memory ranges for one `readv` or `writev`, borrowed for `'m` from whoever owns the
/// memory.
///
/// Lives on the stack: creating one costs nothing, so that no buffer has to outlive a burst.
pub struct IoVecs<'m> {
    /// Entries `0..len` are initialised and lie in memory that is mapped for `'m`.
    entries: [MaybeUninit<libc::iovec>; MAX_IOVECS],
    len: usize,
    /// Sum of the entries' lengths.
    bytes: usize,
    /// The slices stand for memory that is mapped as long as `'m` lasts. A `&mut IoVecs` is invariant in
    /// `'m`, so a slice of a shorter life cannot be pushed into it.
    memory: PhantomData<VolatileSlice<'m>>,
}

impl<'m> IoVecs<'m> {
    /// An empty list.
    pub fn new() -> IoVecs<'m> {
        IoVecs {
            entries: [MaybeUninit::uninit(); MAX_IOVECS],
            len: 0,
            bytes: 0,
            memory: PhantomData,
        }
    }

    /// Adds a slice at the end; `false` when the list is full and nothing was added. Empty slices take no
    /// entry.
    #[must_use = "a full list takes nothing"]
    pub fn push<B: BitmapSlice>(&mut self, slice: &VolatileSlice<'m, B>) -> bool {
        if slice.is_empty() {
            return true;
        }
        let Some(entry) = self.entries.get_mut(self.len) else {
            return false;
        };
        // The guard may go: without vm-memory's `xen` feature it maps nothing, the memory is mapped for 'm
        // anyway.
        let guard = slice.ptr_guard_mut();
        entry.write(libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        });
        self.len += 1;
        // Slices may overlap (a guest may name one buffer many times), so their sum is not bounded by the
        // address space.
        self.bytes = self.bytes.saturating_add(slice.len());
        true
    }

    /// How many slices are in the list.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the list holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether [`IoVecs::push`] would refuse.
    pub fn is_full(&self) -> bool {
        self.len == MAX_IOVECS
    }

    /// Length of all slices together, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Forgets all slices.
    pub fn clear(&mut self) {
        self.len = 0;
        self.bytes = 0;
    }

    /// Copies the bytes behind the first `skip` into `into`, as many as fit; tells how many. For what a
    /// socket refused.
    pub fn copy_to(&self, skip: usize, into: &mut [u8]) -> usize {
        let mut skip = skip;
        let mut copied = 0;
        for entry in self.as_slice() {
            let passed = skip.min(entry.iov_len);
            skip -= passed;
            let Some(rest) = into.get_mut(copied..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            let base = entry.iov_base.cast::<u8>().wrapping_add(passed);
            // SAFETY: `entry` came from a `VolatileSlice<'m>`, so `iov_len` bytes at `iov_base` are mapped
            // for 'm, which `self` does not outlive; `passed <= iov_len`, so what is left of them begins at
            // `base`. Others access that memory with volatile accesses or not from this program.
            let slice = unsafe { VolatileSlice::new(base, entry.iov_len - passed) };
            copied += slice.copy_to(rest);
        }
        copied
    }

    /// Appends the bytes behind the first `skip` to `into`; tells how many.
    pub fn append_to(&self, skip: usize, into: &mut Vec<u8>) -> usize {
        let at = into.len();
        into.resize(at.saturating_add(self.bytes.saturating_sub(skip)), 0);
        let copied = into.get_mut(at..).map_or(0, |tail| self.copy_to(skip, tail));
        into.truncate(at + copied);
        copied
    }

    pub(super) fn as_slice(&self) -> &[libc::iovec] {
        // SAFETY: entries 0..len are initialised (`push` writes an entry before it counts it; `len` never
        // exceeds the array), and `MaybeUninit<T>` has the layout of `T`.
        unsafe { std::slice::from_raw_parts(self.entries.as_ptr().cast(), self.len) }
    }
}

impl Default for IoVecs<'_> {
    fn default() -> Self {
        IoVecs::new()
    }
}

impl std::fmt::Debug for IoVecs<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoVecs")
            .field("len", &self.len)
            .field("bytes", &self.bytes)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_list_refuses_and_an_empty_slice_takes_no_entry() {
        let mut memory = [0u8; 8];
        let slice = VolatileSlice::from(&mut memory[..]);
        let empty = slice.subslice(0, 0).unwrap();
        let mut list = IoVecs::new();
        for _ in 0..MAX_IOVECS {
            assert!(list.push(&slice));
            assert!(list.push(&empty));
        }
        assert!(list.is_full());
        assert!(!list.push(&slice));
        assert!(list.push(&empty));
        assert_eq!((list.len(), list.bytes()), (MAX_IOVECS, 8 * MAX_IOVECS));
        list.clear();
        assert!(list.is_empty());
        assert_eq!(list.bytes(), 0);
    }

    #[test]
    fn what_a_socket_refused_is_copied_from_any_offset() {
        let mut memory = *b"abcdefghij";
        let slice = VolatileSlice::from(&mut memory[..]);
        let mut list = IoVecs::new();
        // "fghij", "abc": two pieces, out of order.
        assert!(list.push(&slice.subslice(5, 5).unwrap()));
        assert!(list.push(&slice.subslice(0, 3).unwrap()));
        for skip in 0..=8 {
            let mut spilled = b">".to_vec();
            assert_eq!(list.append_to(skip, &mut spilled), 8 - skip);
            assert_eq!(spilled[1..], b"fghijabc"[skip..]);
        }
        let mut short = [0; 4];
        assert_eq!(list.copy_to(3, &mut short), 4);
        assert_eq!(&short, b"ijab");
        assert_eq!(list.copy_to(100, &mut short), 0);
    }
}
