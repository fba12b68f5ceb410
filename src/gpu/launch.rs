//! Starting a kernel by its name.

use candle_core::Result;

/// An argument of a kernel: a number, or an address in the memory of the machine it runs on.
#[derive(Debug, Clone, Copy)]
pub struct Arg {
    /// Its bytes first.
    bits: [u8; 8],
    len: usize,
}

impl Arg {
    /// As it is passed; the length is checked by whoever knows the kernel's declaration.
    pub fn bytes(&self) -> &[u8] {
        &self.bits[..self.len]
    }

    /// Its bytes and those behind it, for a driver that knows how many it takes.
    #[cfg(feature = "cuda")]
    pub(super) fn bits(&self) -> &[u8; 8] {
        &self.bits
    }
}

macro_rules! from_number {
    ($($kind:ty),*) => {$(
        impl From<$kind> for Arg {
            fn from(value: $kind) -> Self {
                let mut bits = [0; 8];
                let from = value.to_ne_bytes();
                bits[..from.len()].copy_from_slice(&from);
                Self { bits, len: from.len() }
            }
        }
    )*};
}
from_number!(i32, i64, u64, f32);

/// A machine that runs the kernels of `kernels/`.
pub trait Launch {
    /// Runs `kernel` over `grid` blocks, after what was launched before. Threads and shared memory of a
    /// block belong to the kernel. A grid without blocks is nothing to do.
    ///
    /// # Safety
    /// The arguments must be those of the kernel's declaration, and its addresses valid for what its head
    /// comment says it reads and writes, until the launch has run.
    ///
    /// # Errors
    /// An unknown kernel, or a grid that is too large.
    unsafe fn launch(&self, kernel: &str, grid: [usize; 3], args: &[Arg]) -> Result<()>;
}
