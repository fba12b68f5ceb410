//! NVIDIA GPUs: which kernels of `kernels/` run, over which blocks, with which arguments.
//!
//! What is decided here is plain arithmetic over host numbers and addresses, behind [`Launch`]. With the
//! feature `cuda` that is a GPU; in the tests it is the emulation the kernels themselves are tested on, so
//! that their arguments are proven on machines without a GPU.

#[cfg(feature = "cuda")]
mod cuda;
mod launch;
#[cfg(feature = "cuda")]
pub(crate) mod ops;
mod step_attention;

#[cfg(feature = "cuda")]
pub use cuda::{CudaKernels, address, storage_address};
pub use launch::{Arg, Launch};
pub use step_attention::{CartridgeLayer, LayerAddresses, QuerySequence, StepAttention, StepHeads};
