//! Storage of the paged KV cache, and what a step of the engine attends to: a sequence's cartridges, then its
//! own blocks. One form for each kind of device.

mod cpu;
#[cfg(feature = "flash-attn")]
mod flash;
mod gpu;

use candle_core::{DType, Device, Result};

use self::cpu::{CpuAttention, CpuKvCache};
use self::gpu::GpuKvCache;
use super::blocks::{BLOCK_TOKENS, BlockTable};
use crate::cartridge::{KvShape, Lease};
use crate::gpu::machine;
use crate::model::Attend;

/// Keys and values of all blocks.
pub enum KvCache {
    Cpu(CpuKvCache),
    Gpu(GpuKvCache),
}

/// One sequence's part of a step: `rows` new tokens after `start` stored ones.
pub struct BatchEntry<'a> {
    pub table: &'a BlockTable,
    pub cartridges: &'a [Lease],
    pub start: usize,
    pub rows: usize,
}

impl KvCache {
    /// Room for `blocks` blocks of numbers of `dtype` on `device`; on the CPU they are f32.
    ///
    /// # Errors
    /// The memory of a GPU does not suffice, or this program was built without support for it.
    pub fn new(shape: KvShape, blocks: usize, device: &Device, dtype: DType) -> Result<Self> {
        match (machine(device, dtype)?, device) {
            (Some(gpu), _) => Ok(Self::Gpu(GpuKvCache::new(shape, blocks, gpu, device, dtype)?)),
            (None, Device::Cpu) => Ok(Self::Cpu(CpuKvCache::new(shape, blocks))),
            (None, other) => candle_core::bail!("no KV cache on {other:?} in this program"),
        }
    }

    /// Bytes one block takes over all layers, keys and values.
    pub fn block_bytes(shape: KvShape, dtype: DType) -> u64 {
        (2 * shape.layers * block_elements(shape) * dtype.size_in_bytes()) as u64
    }

    /// Has steps of plain prefill computed by FlashAttention on a GPU; elsewhere nothing changes.
    #[cfg(feature = "flash-attn")]
    pub fn set_flash_attn(&mut self, flash_attn: bool) {
        if let Self::Gpu(cache) = self {
            cache.flash_attn = flash_attn;
        }
    }

    /// What the decoder attends to in a step with the rows of `batch`, one entry after the other.
    /// `group_min` sequences must share a cartridge for it to be read once for all of them.
    pub fn attention<'a>(
        &'a mut self,
        batch: &'a [BatchEntry<'a>],
        group_min: usize,
    ) -> Box<dyn Attend + 'a> {
        match self {
            Self::Cpu(cache) => Box::new(CpuAttention { cache, batch, group_min }),
            // Reading a cartridge once for all is never slower there.
            Self::Gpu(cache) => Box::new(cache.attention(batch)),
        }
    }
}

/// Keys, or values, of a block in one layer.
fn block_elements(shape: KvShape) -> usize {
    shape.kv_heads * BLOCK_TOKENS * shape.head_dim
}
