//! NVIDIA GPUs: which kernels of `kernels/` run, over which blocks, with which arguments.
//!
//! What is decided here is plain arithmetic over host numbers and addresses, behind [`Launch`]. With the
//! feature `cuda` that is a GPU; in the tests it is the emulation the kernels themselves are tested on
//! ([`emulate`]), so that model, engine and trainer are proven to launch the right ones on machines
//! without a GPU. Only `cuda.rs` needs the feature.

pub(crate) mod backward;
#[cfg(feature = "cuda")]
mod cuda;
mod launch;
pub(crate) mod loss;
mod machine;
pub(crate) mod ops;
pub(crate) mod packed_attention;
pub mod sampling;
mod step_attention;

#[cfg(feature = "cuda")]
pub use cuda::{CudaKernels, device};
pub use launch::{Arg, Launch};
pub(crate) use machine::machine_of;
pub use machine::{Machine, address, emulate, is_gpu, machine};
pub use sampling::SampleRow;
pub use step_attention::{CartridgeLayer, LayerAddresses, QuerySequence, StepAttention, StepHeads};
