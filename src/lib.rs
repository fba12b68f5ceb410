//! Cartouche: one program that serves *cartridges*, makes exact ones of documents and trains small ones.
//!
//! A cartridge is a trained KV-cache prefix, one key and one value tensor per layer, that stands for a
//! long text (Cartridges, arXiv 2506.06266). A request names it and the model attends to it as if the
//! text were in the context.
//!
//! # Map
//! | folder | purpose | may import |
//! |---|---|---|
//! | [`cli`] | one file per command | everything below |
//! | [`api`] | HTTP: wire types, handlers, streaming, error bodies | `engine`, `cartridge`, `text` |
//! | [`bench`] | the load generator: measures any OpenAI-compatible URL; `bench::shape` the decoder itself | block size of `engine`; `shape`: `engine`, `train`, `model`, `ops` |
//! | [`engine`] | the loop that turns requests into tokens | `model`, `cartridge`, `ops` |
//! | [`train`] | learning a cartridge: data, packs, loss, gradients, checkpoints | `engine`, `model`, `cartridge`, `text`, `ops` |
//! | [`model`] | one decoder for the Llama family and Qwen | `ops`, `text`, shapes and KV of `cartridge` |
//! | [`cartridge`] | the artifact, its file formats, the registry, its sources | candle; `gpu::is_gpu`, `ops::memory` |
//! | [`text`] | tokenizer, chat template, detokenizer, stop strings | nothing of ours |
//! | [`gpu`] | which CUDA kernels run, with which arguments | block size of `engine` |
//! | [`ops`] | building blocks with their backward passes | candle only |
//!
//! `docs/architecture.md` holds the invariants and where each one is enforced.

pub mod api;
pub mod bench;
pub mod cartridge;
pub mod cli;
pub mod demo;
pub mod engine;
pub mod gpu;
pub mod limits;
pub mod model;
pub mod ops;
pub mod text;
pub mod train;
