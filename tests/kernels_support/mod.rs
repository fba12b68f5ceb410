//! Running the kernels of `kernels/` on the CPU: the host's C++ compiler builds them against `kernels/simt/`.
#![allow(dead_code, unused_imports)] // each test binary uses its own part

mod build;
mod cases;
mod emulation;
mod memory;

pub use build::Library;
pub use cases::{Expected, Random, Shape, check_one, shape};
pub use emulation::{Emulation, launches, placement};
pub use memory::{Buffer, Side};

use std::ffi::{CStr, c_char, c_int, c_void};

use half::{bf16, f16};

/// An argument of a kernel, as its bytes.
pub struct Arg {
    bytes: [u8; 8],
    len: u32,
}

macro_rules! argument {
    ($($kind:ty),*) => {$(
        impl From<$kind> for Arg {
            fn from(value: $kind) -> Self {
                let mut bytes = [0; 8];
                let from = value.to_ne_bytes();
                bytes[..from.len()].copy_from_slice(&from);
                Self { bytes, len: from.len() as u32 }
            }
        }
    )*};
}
argument!(i32, u32, i64, u64, f32);

impl<T> From<&Buffer<T>> for Arg {
    fn from(buffer: &Buffer<T>) -> Self {
        Self::from(buffer.address() as u64)
    }
}

/// `None` is a null pointer.
impl<T> From<Option<&Buffer<T>>> for Arg {
    fn from(buffer: Option<&Buffer<T>>) -> Self {
        Self::from(buffer.map_or(0, |buffer| buffer.address() as u64))
    }
}

#[macro_export]
macro_rules! args {
    ($($arg:expr),* $(,)?) => { &[$($crate::kernels_support::Arg::from($arg)),*] };
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
    /// Runs a kernel over a grid; what went wrong otherwise. `seed` is the order in which threads run.
    pub fn try_launch(
        &self,
        kernel: &str,
        grid: [usize; 3],
        seed: u64,
        args: &[Arg],
    ) -> Result<(), String> {
        let entry = self.symbol(&format!("{kernel}_launch"));
        // SAFETY: KERNEL in `kernels/simt/device.hpp` declares every symbol of this name so.
        let entry: extern "C" fn(*const Launch) -> c_int = unsafe { std::mem::transmute(entry) };
        let arguments: Vec<_> = args.iter().map(|arg| arg.bytes.as_ptr().cast()).collect();
        let argument_bytes: Vec<_> = args.iter().map(|arg| arg.len).collect();
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
        self.launch(function, [1; 3], 0, args);
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
