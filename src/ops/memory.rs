//! Large blocks of memory.

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
    /// # Panics
    /// If the system has no memory left, like any allocation.
    pub fn zeroed(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>()).expect("a size in memory");
        // A map of nothing is an error.
        let map = MmapMut::map_anon(bytes.max(1)).expect("the system has memory left");
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
