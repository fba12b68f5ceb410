//! The allocator, told how training allocates.

/// Makes the C library's allocator keep large freed blocks for the next allocation, for the whole process.
///
/// Every operation of a step allocates tensors of some ten MiB and frees them soon after. By default each
/// such block is mapped from the system anew, and clearing its pages takes a tenth of a step. What the
/// process holds at most stays about the same. Does nothing where the allocator is not glibc's.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the allocator takes these at any time, from any thread; a refusal changes nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}
