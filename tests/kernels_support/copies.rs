//! Launches on a machine with memory of its own: the buffers of a launch are copied there and back, with
//! everything beside their numbers. What a kernel writes next to them is found by `Buffer::read`, as on the
//! CPU, or here.

use cartouche::gpu::Arg;

use super::memory::{POISON, buffer_at};

/// Poison there on either side of a buffer, in the place of the pages that trap.
const GUARD: usize = 4096;

pub trait Elsewhere {
    /// Memory there, given back when it is dropped.
    type Memory;

    /// Begins at a multiple of 256.
    fn put(&self, bytes: &[u8]) -> Result<Self::Memory, String>;
    fn address(&self, memory: &Self::Memory) -> u64;
    fn get(&self, memory: &Self::Memory) -> Result<Vec<u8>, String>;
    /// Returns when the kernel has run.
    fn launch(&self, kernel: &str, grid: [usize; 3], args: &[Arg]) -> Result<(), String>;
}

/// A buffer of the test and its copy.
struct Copied<M> {
    start: usize,
    bytes: usize,
    memory: M,
}

/// Every address in a buffer, its beginning or another, becomes the same one in its copy.
pub fn launch<E: Elsewhere>(
    there: &E,
    kernel: &str,
    grid: [usize; 3],
    args: &[Arg],
) -> Result<(), String> {
    let mut copies: Vec<Copied<E::Memory>> = Vec::new();
    let mut moved = Vec::with_capacity(args.len());
    for arg in args {
        // No number of these tests is as large as an address.
        let address = arg.bytes().try_into().map(u64::from_ne_bytes).unwrap_or_default() as usize;
        let Some((start, bytes)) = buffer_at(address) else {
            moved.push(*arg);
            continue;
        };
        let at = match copies.iter().position(|copied| copied.start == start) {
            Some(at) => at,
            None => {
                let mut image = vec![POISON; bytes + 2 * GUARD];
                // SAFETY: a live buffer, which only this test uses, and no kernel runs.
                let here = unsafe { std::slice::from_raw_parts(start as *const u8, bytes) };
                image[GUARD..GUARD + bytes].copy_from_slice(here);
                copies.push(Copied { start, bytes, memory: there.put(&image)? });
                copies.len() - 1
            }
        };
        let base = there.address(&copies[at].memory);
        moved.push(Arg::from(base + (GUARD + address - start) as u64));
    }
    there.launch(kernel, grid, &moved)?;
    for (i, Copied { start, bytes, memory }) in copies.iter().enumerate() {
        let image = there.get(memory)?;
        let (front, rest) = image.split_at(GUARD);
        let (numbers, back) = rest.split_at(*bytes);
        if front.iter().chain(back).any(|byte| *byte != POISON) {
            return Err(format!("{kernel}: a write outside of every buffer, near the {i}th"));
        }
        // SAFETY: as above; `numbers` has as many bytes.
        unsafe { std::ptr::copy_nonoverlapping(numbers.as_ptr(), *start as *mut u8, *bytes) };
    }
    Ok(())
}
