//! Running the kernels of `kernels/`: on the CPU, where the host's C++ compiler builds them against
//! `kernels/simt/`, or, with the feature `cuda` and `CARTOUCHE_TEST_DEVICE=cuda:0`, on a GPU, as the program
//! has them. Their twins run on the CPU in either case.
#![allow(dead_code, unused_imports)] // each test binary uses its own part

mod build;
#[cfg(feature = "cuda")]
mod card;
mod cases;
mod copies;
mod emulation;
mod memory;

pub use build::Library;
pub use cases::{Expected, Random, Shape, check_one, shape};
pub use copies::{Elsewhere, launch as launch_elsewhere};
pub use emulation::{Emulation, launches, placement};
pub use memory::{Buffer, Side};

use std::ffi::{CStr, c_char, c_int, c_void};

pub use cartouche::gpu::Arg;
use half::{bf16, f16};

/// What `args!` takes.
pub trait Argument {
    fn arg(self) -> Arg;
}

macro_rules! argument {
    ($($kind:ty as $passed:ty),*) => {$(
        impl Argument for $kind {
            fn arg(self) -> Arg {
                Arg::from(self as $passed)
            }
        }
    )*};
}
argument!(i32 as i32, u32 as i32, i64 as i64, u64 as u64, f32 as f32);

impl<T> Argument for &Buffer<T> {
    fn arg(self) -> Arg {
        Arg::from(self.address() as u64)
    }
}

/// `None` is a null pointer.
impl<T> Argument for Option<&Buffer<T>> {
    fn arg(self) -> Arg {
        self.map_or(Arg::from(0u64), Argument::arg)
    }
}

#[macro_export]
macro_rules! args {
    ($($arg:expr),* $(,)?) => { &[$($crate::kernels_support::Argument::arg($arg)),*] };
}

/// The GPU that `CARTOUCHE_TEST_DEVICE` names (`cuda:0`). Without it kernels run on the emulation.
///
/// Panics if the test was built without the feature `cuda`: it must not seem to have run there.
pub fn gpu_index() -> Option<usize> {
    let name = std::env::var("CARTOUCHE_TEST_DEVICE").ok()?;
    let index = name.strip_prefix("cuda:").and_then(|index| index.parse().ok());
    let index = index.unwrap_or_else(|| panic!("CARTOUCHE_TEST_DEVICE={name}: not cuda:N"));
    if cfg!(not(feature = "cuda")) {
        panic!("CARTOUCHE_TEST_DEVICE={name}: this test was built without the feature cuda");
    }
    Some(index)
}

/// `simt::Launch` of `kernels/simt/launch.hpp`.
#[repr(C)]
struct Launch {
    grid: [u32; 3],
    argument_count: u32,
    seed: u64,
    arguments: *const *const c_void,
    argument_bytes: *const u32,
    error: *mut c_char,
    error_bytes: u64,
}

impl Library {
    /// Runs a kernel over a grid; what went wrong otherwise. `seed` is the order in which threads run; a GPU
    /// has its own.
    pub fn try_launch(
        &self,
        kernel: &str,
        grid: [usize; 3],
        seed: u64,
        args: &[Arg],
    ) -> Result<(), String> {
        match gpu_index() {
            #[cfg(feature = "cuda")]
            Some(index) if self.is_of_the_program() => card::launch(index, kernel, grid, args),
            _ => self.run_here(kernel, grid, seed, args),
        }
    }

    /// On the emulation, or a twin.
    pub fn run_here(
        &self,
        function: &str,
        grid: [usize; 3],
        seed: u64,
        args: &[Arg],
    ) -> Result<(), String> {
        let entry = self.symbol(&format!("{function}_launch"));
        // SAFETY: KERNEL in `kernels/simt/device.hpp` declares every symbol of this name so.
        let entry: extern "C" fn(*const Launch) -> c_int = unsafe { std::mem::transmute(entry) };
        let arguments: Vec<_> = args.iter().map(|arg| arg.bytes().as_ptr().cast()).collect();
        let argument_bytes: Vec<_> = args.iter().map(|arg| arg.bytes().len() as u32).collect();
        let mut error = [0 as c_char; 512];
        let failed = entry(&Launch {
            grid: grid.map(|blocks| blocks as u32),
            argument_count: args.len() as u32,
            seed,
            arguments: arguments.as_ptr(),
            argument_bytes: argument_bytes.as_ptr(),
            error: error.as_mut_ptr(),
            error_bytes: error.len() as u64,
        });
        // SAFETY: the launcher ends the text with a zero.
        let error = unsafe { CStr::from_ptr(error.as_ptr()) };
        if failed == 0 { Ok(()) } else { Err(error.to_string_lossy().into_owned()) }
    }

    /// Calls a naive twin, a plain function registered by REFERENCE.
    #[track_caller]
    pub fn call(&self, function: &str, args: &[Arg]) {
        if let Err(error) = self.run_here(function, [1; 3], 0, args) {
            panic!("{error}");
        }
    }

    #[track_caller]
    pub fn launch(&self, kernel: &str, grid: [usize; 3], seed: u64, args: &[Arg]) {
        if let Err(error) = self.try_launch(kernel, grid, seed, args) {
            panic!("{error}");
        }
    }
}

/// Numbers that kernels compute with.
pub trait Number: Copy {
    /// In the names of kernels.
    const NAME: &'static str;
    /// Half a unit in the last place of 1.
    const EPSILON: f64;
    fn of(x: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Number for bf16 {
    const NAME: &'static str = "bf16";
    const EPSILON: f64 = 1.0 / 512.0;
    fn of(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

impl Number for f16 {
    const NAME: &'static str = "f16";
    const EPSILON: f64 = 1.0 / 4096.0;
    fn of(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

impl Number for f32 {
    const NAME: &'static str = "f32";
    const EPSILON: f64 = f32::EPSILON as f64 / 2.0;
    fn of(x: f32) -> Self {
        x
    }
    fn to_f32(self) -> f32 {
        self
    }
}
