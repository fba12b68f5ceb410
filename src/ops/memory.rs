//! Large blocks of memory.

use std::alloc::{Layout, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use memmap2::MmapMut;

/// Zeroed memory of its own pages, in huge ones where the system grants them: without, a quarter million
/// page faults per GiB are the larger part of loading a model. Aligned to a page, so that vectors never
/// straddle cache lines.
#[derive(Debug)]
pub(crate) struct Pages<T> {
    map: MmapMut,
    len: usize,
    holds: PhantomData<T>,
}

impl<T: Pod> Pages<T> {
    /// Ends the process if the system has no such memory left, like any allocation.
    pub fn zeroed(len: usize) -> Self {
        // More than there can be is refused like more than there is.
        let bytes = len.saturating_mul(size_of::<T>());
        // A map of nothing is an error.
        let Ok(map) = MmapMut::map_anon(bytes.max(1)) else {
            handle_alloc_error(Layout::array::<T>(len).unwrap_or(Layout::new::<T>()))
        };
        #[cfg(target_os = "linux")]
        if bytes >= 2 << 20 {
            // A refusal only costs time.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Self { map, len, holds: PhantomData }
    }
}

impl<T: Pod> Deref for Pages<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.map[..self.len * size_of::<T>()])
    }
}

impl<T: Pod> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.map[..self.len * size_of::<T>()])
    }
}

/// Gives freed memory back to the system, as far as whole pages go. Without, the allocator keeps what was freed
/// in the arena of each thread that allocated it: several times what is in use, where many threads load and
/// free large tensors in turn. Takes milliseconds.
pub(crate) fn give_back_freed() {
    // SAFETY: has no preconditions.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Asks for huge pages for memory that was not touched yet. Without, the page faults of what is about to be
/// written there are a large part of writing it.
pub(crate) fn prefer_huge_pages<T: Pod>(memory: &mut [T]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let start = (memory.as_mut_ptr() as usize).next_multiple_of(PAGE);
        let end = (memory.as_mut_ptr() as usize + size_of_val(memory)) / PAGE * PAGE;
        if end.saturating_sub(start) >= 2 << 20 {
            // SAFETY: whole pages inside memory that is lent for writing, whose content this does not change. A
            // refusal only costs time.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    let _ = memory;
}
