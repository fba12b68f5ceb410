//! The KV cache on a GPU.

use candle_core::{DType, Device, Result, Tensor};

use super::{BLOCK_TOKENS, BatchEntry};
use crate::cartridge::{KvShape, Lease};
use crate::gpu::ops::room;
use crate::gpu::{
    Arg, CartridgeLayer, LayerAddresses, Machine, QuerySequence, StepAttention, StepHeads, address,
};
use crate::model::Attend;

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
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (rows, heads, head_dim) = q.dims3()?;
        let step = match self.step.take() {
            Some(step) => step,
            None => self.plan(heads)?,
        };
        let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
        let (keys, values) = &self.cache.layers[layer];
        let (keys, values) = (address(keys)?, address(values)?);
        let KvShape { kv_heads, .. } = self.cache.shape;
        let write = [
            Arg::from(address(&k)?),
            address(&v)?.into(),
            address(&step.places)?.into(),
            keys.into(),
            values.into(),
            (kv_heads as i32).into(),
            (head_dim as i32).into(),
        ];
        let gpu = &*self.cache.gpu;
        let dtype = self.cache.dtype;
        // SAFETY: the kernel's arguments; every place is inside of a block of the cache.
        unsafe {
            gpu.launch(&format!("kv_write_{}", dtype.as_str()), [rows, 1, 1], &write)?;
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        #[cfg(feature = "flash-attn")]
        if let Some(plain) = &step.plain {
            let out = plain.attend(&q, &k, &v, scale);
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
