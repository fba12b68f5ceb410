//! Buffers between pages that trap, as the device memory of a test.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Which end of the buffer lies at a trapping page. The other end has up to a page of poison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Front,
    Back,
}

/// What device allocations are multiples of, for loads of 16 bytes.
const ALIGNMENT: usize = 16;
pub const POISON: u8 = 0xff; // NaN in every float type, -1 in integers

/// All buffers there are: where what lies between their trapping pages begins, and its bytes.
static LIVE: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

fn live() -> MutexGuard<'static, BTreeMap<usize, usize>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The buffer, with the poison beside it, in which an address lies: start and bytes. The end of an empty
/// buffer belongs to it.
pub fn buffer_at(address: usize) -> Option<(usize, usize)> {
    let live = live();
    let (start, bytes) = live.range(..=address).next_back()?;
    (address <= start + bytes).then_some((*start, *bytes))
}

/// Numbers for a kernel. Reading just outside traps or gives NaN, writing traps or is found by [`Buffer::read`].
pub struct Buffer<T> {
    mapping: NonNull<u8>,
    mapped: usize,
    /// Of the first number, from the mapping.
    offset: usize,
    page: usize,
    len: usize,
    _numbers: std::marker::PhantomData<T>,
}

impl<T: Copy> Buffer<T> {
    pub fn of(values: &[T], side: Side) -> Self {
        let buffer = Self::poisoned(values.len(), side);
        // SAFETY: the buffer has room for as many, and nobody else knows it yet.
        unsafe {
            let to = buffer.mapping.as_ptr().add(buffer.offset).cast::<T>();
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
        }
        buffer
    }

    /// Every byte 0xff.
    pub fn poisoned(len: usize, side: Side) -> Self {
        // SAFETY: sysconf has no preconditions.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let bytes = (len * size_of::<T>()).next_multiple_of(ALIGNMENT);
        let inner = bytes.next_multiple_of(page).max(page);
        let mapped = inner + 2 * page;
        // SAFETY: a new private mapping; its inner pages are made writable before use.
        let mapping = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANON;
            let at = libc::mmap(std::ptr::null_mut(), mapped, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(at, libc::MAP_FAILED, "no memory for {mapped} bytes");
            let at = at.cast::<u8>();
            let access = libc::PROT_READ | libc::PROT_WRITE;
            assert_eq!(libc::mprotect(at.add(page).cast(), inner, access), 0);
            std::ptr::write_bytes(at.add(page), POISON, inner);
            NonNull::new(at).unwrap()
        };
        live().insert(mapping.as_ptr() as usize + page, inner);
        let offset = match side {
            Side::Front => page,
            Side::Back => page + inner - bytes,
        };
        Self { mapping, mapped, offset, page, len, _numbers: std::marker::PhantomData }
    }

    /// The numbers. Panics if a byte beside them has changed.
    #[track_caller]
    pub fn read(&self) -> Vec<T> {
        // SAFETY: the inner pages are readable, and no kernel runs while we are here.
        let inner = unsafe {
            let first = self.mapping.as_ptr().add(self.page);
            std::slice::from_raw_parts(first, self.mapped - 2 * self.page)
        };
        let start = self.offset - self.page;
        let end = start + self.len * size_of::<T>();
        let beside = inner[..start].iter().chain(&inner[end..]);
        assert!(beside.into_iter().all(|byte| *byte == POISON), "a write outside of a buffer");
        // SAFETY: `of` or a kernel wrote numbers of this type; every bit pattern is one.
        unsafe {
            let first = self.mapping.as_ptr().add(self.offset).cast::<T>();
            std::slice::from_raw_parts(first, self.len).to_vec()
        }
    }
}

impl<T> Buffer<T> {
    pub fn address(&self) -> usize {
        self.mapping.as_ptr() as usize + self.offset
    }

    pub fn as_ptr(&self) -> *const T {
        self.address() as *const T
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        live().remove(&(self.mapping.as_ptr() as usize + self.page));
        // SAFETY: our own mapping, unmapped once.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.mapped) };
    }
}
