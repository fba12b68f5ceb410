//! The KV cache on a GPU.

use candle_core::{DType, Device, Result, Tensor};

use super::{BLOCK_TOKENS, BatchEntry};
use crate::cartridge::{KvShape, Lease};
use crate::gpu::ops::{Pages, room, rotate_and_store};
use crate::gpu::{
    CartridgeLayer, LayerAddresses, Machine, QuerySequence, StepAttention, StepHeads, address,
};
use crate::model::{Attend, Unrotated};

/// Per layer keys and values, each `[blocks, kv_heads, BLOCK_TOKENS, head_dim]`.
pub struct GpuKvCache {
    shape: KvShape,
    dtype: DType,
    device: Device,
    gpu: Machine,
    layers: Vec<(Tensor, Tensor)>,
    #[cfg(feature = "flash-attn")]
    pub flash_attn: bool,
}

impl GpuKvCache {
    /// On `gpu`, the machine of `device`.
    pub fn new(
        shape: KvShape,
        blocks: usize,
        gpu: Machine,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let dims = (blocks, shape.kv_heads, BLOCK_TOKENS, shape.head_dim);
        let zeros = || Tensor::zeros(dims, dtype, device);
        let layers = (0..shape.layers).map(|_| Ok((zeros()?, zeros()?))).collect::<Result<_>>()?;
        Ok(Self {
            shape,
            dtype,
            device: device.clone(),
            gpu,
            layers,
            #[cfg(feature = "flash-attn")]
            flash_attn: false,
        })
    }

    pub fn attention<'a>(&'a mut self, batch: &'a [BatchEntry<'a>]) -> GpuAttention<'a> {
        GpuAttention { cache: self, batch, step: None }
    }
}

/// Attention of a step over this cache.
pub struct GpuAttention<'a> {
    cache: &'a mut GpuKvCache,
    batch: &'a [BatchEntry<'a>],
    /// Made with the first layer, which says how many heads the queries have.
    step: Option<Step<'a>>,
}

/// What all layers of a step have in common.
struct Step<'a> {
    plan: StepAttention,
    /// The cartridges, in the plan's order.
    leases: Vec<&'a Lease>,
    indices: Tensor,
    /// The place of every new token in the cache: `block * BLOCK_TOKENS + slot`.
    places: Tensor,
    parts: Tensor,
    lse: Tensor,
    #[cfg(feature = "flash-attn")]
    plain: Option<super::flash::PlainPrefill>,
}

impl<'a> GpuAttention<'a> {
    /// To be put back.
    fn take_step(&mut self, heads: usize) -> Result<Step<'a>> {
        self.step.take().map_or_else(|| self.plan(heads), Ok)
    }

    fn plan(&self, heads: usize) -> Result<Step<'a>> {
        let KvShape { kv_heads, head_dim, .. } = self.cache.shape;
        // A cartridge is known by its layers: leases of one generation share them.
        let mut leases: Vec<&Lease> = Vec::new();
        let mut index = |lease: &'a Lease| {
            let same = |known: &&Lease| std::ptr::eq(known.layers(), lease.layers());
            let index = leases.iter().position(same).unwrap_or_else(|| {
                leases.push(lease);
                leases.len() - 1
            });
            (index, lease.tokens())
        };
        let cartridges: Vec<Vec<(usize, usize)>> = self
            .batch
            .iter()
            .map(|entry| entry.cartridges.iter().map(&mut index).collect())
            .collect();
        let sequences: Vec<QuerySequence<'_>> = self
            .batch
            .iter()
            .zip(&cartridges)
            .map(|(entry, cartridges)| QuerySequence {
                blocks: entry.table.blocks(),
                start: entry.start,
                rows: entry.rows,
                cartridges,
            })
            .collect();
        let plan = StepAttention::new(StepHeads { heads, kv_heads, head_dim }, &sequences);
        let places = self.batch.iter().flat_map(|entry| {
            (entry.start..entry.start + entry.rows).map(|at| {
                entry.table.blocks()[at / BLOCK_TOKENS] * BLOCK_TOKENS as u32
                    + (at % BLOCK_TOKENS) as u32
            })
        });
        let device = &self.cache.device;
        let places = Tensor::from_iter(places, device)?;
        let indices = Tensor::from_iter(plan.indices().iter().copied(), device)?;
        let parts = room((plan.slots(), heads, head_dim), DType::F32, device)?;
        let lse = room((plan.slots(), heads), DType::F32, device)?;
        Ok(Step {
            plan,
            leases,
            indices,
            places,
            parts,
            lse,
            #[cfg(feature = "flash-attn")]
            plain: match self.cache.flash_attn {
                true => super::flash::PlainPrefill::of(self.batch, device)?,
                false => None,
            },
        })
    }
}

impl Attend for GpuAttention<'_> {
    /// Stores keys and values in the same launch.
    fn rotate(&mut self, layer: usize, unrotated: &Unrotated<'_>) -> Result<(Tensor, Tensor)> {
        let step = self.take_step(unrotated.q.dim(1)?)?;
        let (keys, values) = &self.cache.layers[layer];
        let pages = Pages { keys, values, places: &step.places };
        // SAFETY: every place is in a block of the sequence whose token goes there.
        let rotated = unsafe { rotate_and_store(&*self.cache.gpu, unrotated, &pages)? };
        self.step = Some(step);
        Ok(rotated)
    }

    /// Over the keys and values that [`Self::rotate`] has stored.
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        #[cfg(not(feature = "flash-attn"))]
        let _ = (k, v);
        let (rows, heads, head_dim) = q.dims3()?;
        let step = self.take_step(heads)?;
        let q = q.contiguous()?;
        let (keys, values) = &self.cache.layers[layer];
        let (keys, values) = (address(keys)?, address(values)?);
        let (gpu, dtype) = (&*self.cache.gpu, self.cache.dtype);
        let scale = 1.0 / (head_dim as f32).sqrt();
        #[cfg(feature = "flash-attn")]
        if let Some(plain) = &step.plain {
            let out = plain.attend(&q, k, v, scale);
            self.step = Some(step);
            return out;
        }
        let cartridges = step.leases.iter().map(|lease| {
            let kv = &lease.layers()[layer];
            Ok(CartridgeLayer {
                keys: address(&kv.keys)?,
                values: address(&kv.values)?,
                bias: kv.bias.as_ref().map_or(Ok(0), address)?,
            })
        });
        let cartridges = cartridges.collect::<Result<Vec<_>>>()?;
        let out = room((rows, heads, head_dim), dtype, &self.cache.device)?;
        let at = LayerAddresses {
            indices: address(&step.indices)?,
            q: address(&q)?,
            keys,
            values,
            cartridges: &cartridges,
            parts: address(&step.parts)?,
            lse: address(&step.lse)?,
            out: address(&out)?,
        };
        // SAFETY: the tensors above and those of the leases have these shapes and live until the end of the
        // step; the stream orders what is freed after it.
        unsafe { step.plan.launch(gpu, dtype, &at, scale)? };
        self.step = Some(step);
        Ok(out)
    }
}
