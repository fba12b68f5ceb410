//! One decoder for Llama, Mistral, Qwen2 and Qwen3, and everything needed to load it.
//!
//! It runs on packed, unpadded tokens and asks an [`Attend`] what to attend to; that seam is the only
//! difference between serving and training. It knows no HTTP, no request, no training.

mod attend;
mod config;
mod decoder;
mod error;
mod gguf;
mod gguf_tokenizer;
mod layer;
mod load;
mod prefill;
mod random;
mod source;
mod weights;

pub use attend::{Angles, Attend, Unrotated};
pub use config::{Architecture, Biases, ModelConfig};
pub use decoder::Decoder;
pub use error::ModelError;
pub(crate) use layer::{Chosen, Trace};
pub use load::{LoadOptions, LoadedModel, Quantize, load, load_config, load_decoder};
pub use prefill::prefill;
pub(crate) use random::noise;
pub use random::random;
pub use source::ModelSource;
pub use weights::Placement;
