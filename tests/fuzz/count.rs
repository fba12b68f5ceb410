//! Counts what the thread at hand allocates.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    /// Bytes held, the most held, bytes allocated in all. Freeing what another thread allocated makes the
    /// first wrong, hence signed.
    static HELD: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
    static TOTAL: Cell<u64> = const { Cell::new(0) };
}

/// Past this an allocation fails, which ends the process: better than to have the system end it, or others.
const MAX_HELD: i64 = 3 << 30;

fn grow(size: usize) -> bool {
    let grown = HELD.try_with(|held| {
        let now = held.get() + size as i64;
        if now > MAX_HELD {
            return false;
        }
        held.set(now);
        // A thread that ends has no counters left, and nobody who asks for them.
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(now)));
        let _ = TOTAL.try_with(|total| total.set(total.get() + size as u64));
        true
    });
    grown.unwrap_or(true)
}

fn shrink(size: usize) {
    let _ = HELD.try_with(|held| held.set(held.get() - size as i64));
}

// SAFETY: every call goes on to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !grow(layout.size()) {
            return std::ptr::null_mut();
        }
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !grow(layout.size()) {
            return std::ptr::null_mut();
        }
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        shrink(layout.size());
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !grow(size) {
            return std::ptr::null_mut();
        }
        shrink(layout.size());
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// What a piece of code allocated.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Bytes held at the same time, beyond those held before.
    pub peak: u64,
    /// Bytes allocated in all.
    pub total: u64,
}

/// Runs a piece of code and counts what this thread allocates for it.
pub fn counted<T>(run: impl FnOnce() -> T) -> (T, Cost) {
    let (held, total) = (HELD.get(), TOTAL.get());
    PEAK.set(held);
    let result = run();
    let peak = u64::try_from(PEAK.get() - held).unwrap_or(0);
    (result, Cost { peak, total: TOTAL.get() - total })
}

/// The counters count: without this, no bound would mean anything.
#[test]
fn allocations_are_counted() {
    let (kept, cost) = counted(|| {
        drop(vec![1u8; 1000]);
        let mut kept = Vec::<u8>::with_capacity(100);
        kept.resize(5000, 1);
        kept
    });
    assert!(
        (6000..20_000).contains(&cost.total) && (5000..10_100).contains(&cost.peak),
        "{cost:?}"
    );
    let (_, cost) = counted(|| drop(kept));
    assert_eq!((cost.peak, cost.total), (0, 0));
}
