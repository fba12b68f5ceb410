//! Building blocks of the decoder, with forward and backward.
//!
//! A backward pass is a function of its own from gradient to gradient, which writes to the memory of what it
//! was given where it can: candle's graph would keep every tensor in between, and add each gradient to
//! zeroes. An operation asked for its gradient through candle's graph is an error. The model's own weights are
//! frozen by design: nothing computes their gradient.
//!
//! On the CPU operations compute in f32, in loops of our own. On a GPU ([`crate::gpu::machine`]) they launch
//! kernels and leave the rest to candle; each decides once, for the tensors it is given.

pub mod attention;
mod linear;
mod matrix;
pub(crate) mod memory;
mod numbers;
pub(crate) mod product;
mod reduce;
mod rms_norm;
mod rope;
mod rows;
pub(crate) mod simd;
mod sum;
mod swiglu;

pub use linear::Linear;
pub use matrix::Matrix;
pub(crate) use numbers::{
    Numbers, change_f32, contiguous_f32, f32_slice, is_ours, on_host, visit_bytes, with_f32,
};
pub use reduce::{all_finite, argmax, exp_in_place, exp_sum, max};
pub use rms_norm::{add_rms_norm, rms_norm, rms_norm_backward};
pub use rope::{RopeScaling, RopeTable, apply_rope, rope_backward};
pub use rows::Rows;
pub use sum::{add_in_place, add_scaled};
pub use swiglu::{swiglu, swiglu_backward};

#[cfg(test)]
pub(crate) mod tests {
    use candle_core::Tensor;

    /// Panics unless both tensors have one shape and differ by at most `tolerance` anywhere.
    pub fn assert_close(a: &Tensor, b: &Tensor, tolerance: f32) {
        assert_eq!(a.dims(), b.dims());
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let worst = flat(a).iter().zip(flat(b)).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max);
        assert!(worst <= tolerance, "largest difference {worst} exceeds {tolerance}");
    }
}
