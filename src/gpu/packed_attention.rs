//! Attention of packed sequences behind one prefix, and its gradient: what training and prefilling launch.

use candle_core::{DType, Result, Tensor};

use super::launch::{Arg, Launch};
use super::machine::{address, first_address};
use super::ops::{int, like, room};
use crate::ops::attention::{Heads, PackedGradients, PackedKv};

/// Rows (tokens times the query heads of a KV head), or keys, of a thread block of the kernels.
const BLOCK_ROWS: usize = 64;
/// Rows of outputs that a thread block of `attention_backward_delta` takes.
const DELTA_ROWS: usize = 64;
/// Numbers that a thread block of `attention_backward_sum` takes.
const SUM_NUMBERS: usize = 1024;
/// Sequences, or parts, in the third dimension of a grid.
const MOST_IN_GRID: usize = 65_535;
/// Thread blocks that the prefix's gradient is cut into where there are rows enough: the 264 that fit on the
/// 132 multiprocessors of a Hopper, several times over, so that none waits long for the last.
const PREFIX_BLOCKS: usize = 1024;
/// A part of the rows that is shorter than this costs more than it gains.
const LEAST_PART_ROWS: usize = 256;

/// The sequences of a pass: [`crate::ops::attention::PackedAttention`] of all their tokens.
pub struct PackedSequences<'a> {
    pub heads: Heads,
    pub scale: f32,
    /// `[sequences + 1]` i32: sequence `i` is the tokens `cu_seqlens[i] .. cu_seqlens[i + 1]`.
    pub cu_seqlens: &'a Tensor,
    /// Tokens of the longest sequence.
    pub longest: usize,
}

/// Where a prefix lies.
struct PrefixAt {
    keys: u64,
    values: u64,
    tokens: usize,
    /// Numbers from one head to the next.
    stride: usize,
}

impl PrefixAt {
    fn of(prefix: Option<(&Tensor, &Tensor)>, dtype: DType) -> Result<Self> {
        let Some((keys, values)) = prefix else {
            return Ok(Self { keys: 0, values: 0, tokens: 0, stride: 0 });
        };
        let (_, tokens, head_dim) = keys.dims3()?;
        let stride = keys.stride()[0];
        let fits =
            |tensor: &&Tensor| tensor.stride() == [stride, head_dim, 1] && tensor.dtype() == dtype;
        if ![keys, values].iter().all(fits) {
            candle_core::bail!("packed attention: prefix {keys:?} and {values:?} for {dtype:?}");
        }
        let (keys, values) = (first_address(keys)?, first_address(values)?);
        Ok(Self { keys, values, tokens, stride })
    }
}

impl PackedSequences<'_> {
    /// The output like `q`, and per token and head the log-sum-exp of its scores, `[tokens, heads]` f32.
    ///
    /// Tensors are of one type and contiguous, but for the distance between the heads of the prefix.
    pub fn forward(
        &self,
        gpu: &dyn Launch,
        q: &Tensor,
        PackedKv { k, v, prefix }: PackedKv<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let Heads { heads, kv_heads, .. } = self.heads;
        let tokens = self.check(q)?;
        let prefix = PrefixAt::of(prefix, q.dtype())?;
        let (out, lse) = (like(q)?, room((tokens, heads), DType::F32, q.device())?);
        let args = [
            Arg::from(address(q)?),
            address(k)?.into(),
            address(v)?.into(),
            prefix.keys.into(),
            prefix.values.into(),
            address(self.cu_seqlens)?.into(),
            address(&out)?.into(),
            address(&lse)?.into(),
            int(heads),
            int(kv_heads),
            int(prefix.tokens),
            Arg::from(prefix.stride as i64),
            self.scale.into(),
        ];
        // SAFETY: the arguments of the kernel; every token is of one sequence, so that all of `out` and `lse`
        // is written.
        unsafe { gpu.launch(&self.named("packed", q), self.row_grid()?, &args)? };
        Ok((out, lse))
    }

    /// From the gradient of the output `out` to those of what it was computed from.
    pub fn backward(
        &self,
        gpu: &dyn Launch,
        q: &Tensor,
        PackedKv { k, v, prefix }: PackedKv<'_>,
        (out, lse): (&Tensor, &Tensor),
        d_out: &Tensor,
        own: bool,
    ) -> Result<PackedGradients> {
        let Heads { heads, kv_heads, head_dim } = self.heads;
        let tokens = self.check(q)?;
        let at = PrefixAt::of(prefix, q.dtype())?;
        let delta = room((tokens, heads), DType::F32, q.device())?;
        let rows = tokens * heads;
        let args = [
            Arg::from(address(out)?),
            address(d_out)?.into(),
            address(&delta)?.into(),
            Arg::from(rows as i64),
            int(head_dim),
        ];
        let name = format!("attention_backward_delta_{}", q.dtype().as_str());
        // SAFETY, here and below: the arguments of the kernels; the caller checked the shapes.
        unsafe { gpu.launch(&name, [rows.div_ceil(DELTA_ROWS), 1, 1], &args)? };
        let (q_at, d_out_at) = (Arg::from(address(q)?), Arg::from(address(d_out)?));
        let (lse, delta_at) = (Arg::from(address(lse)?), Arg::from(address(&delta)?));
        let cu_seqlens = Arg::from(address(self.cu_seqlens)?);
        let own = match own {
            false => None,
            true => {
                let (k_at, v_at) = (Arg::from(address(k)?), Arg::from(address(v)?));
                let [dq, dk, dv] = [like(q)?, like(k)?, like(v)?];
                let args = [
                    q_at,
                    k_at,
                    v_at,
                    at.keys.into(),
                    at.values.into(),
                    cu_seqlens,
                    d_out_at,
                    lse,
                    delta_at,
                    address(&dq)?.into(),
                    int(heads),
                    int(kv_heads),
                    int(at.tokens),
                    Arg::from(at.stride as i64),
                    self.scale.into(),
                ];
                unsafe { gpu.launch(&self.named("backward_queries", q), self.row_grid()?, &args)? };
                let args = [
                    q_at,
                    k_at,
                    v_at,
                    cu_seqlens,
                    d_out_at,
                    lse,
                    delta_at,
                    address(&dk)?.into(),
                    address(&dv)?.into(),
                    int(heads),
                    int(kv_heads),
                    self.scale.into(),
                ];
                let grid = [self.key_blocks(self.longest), kv_heads, self.sequences()?];
                unsafe { gpu.launch(&self.named("backward_own", q), grid, &args)? };
                Some([dq, dk, dv])
            }
        };
        let Some((keys, values)) = prefix else { return Ok(PackedGradients { prefix: None, own }) };
        let rows = tokens * heads / kv_heads;
        let key_blocks = self.key_blocks(at.tokens);
        let part_rows = part_rows(rows, key_blocks * kv_heads);
        let parts = rows.div_ceil(part_rows);
        let parts_of = |tensor: &Tensor| {
            let (heads, tokens, dim) = tensor.dims3()?;
            room((parts, heads, tokens, dim), DType::F32, tensor.device())
        };
        let (dk, dv) = (parts_of(keys)?, parts_of(values)?);
        let args = [
            q_at,
            at.keys.into(),
            at.values.into(),
            d_out_at,
            lse,
            delta_at,
            address(&dk)?.into(),
            address(&dv)?.into(),
            int(tokens),
            int(heads),
            int(kv_heads),
            int(at.tokens),
            Arg::from(at.stride as i64),
            int(part_rows),
            self.scale.into(),
        ];
        let grid = [key_blocks, kv_heads, parts];
        unsafe { gpu.launch(&self.named("backward_prefix", q), grid, &args)? };
        let whole = |tensor: &Tensor| room(tensor.shape(), DType::F32, tensor.device());
        let prefix = match parts {
            1 => (dk.reshape(keys.shape())?, dv.reshape(values.shape())?),
            _ => {
                let (to_dk, to_dv) = (whole(keys)?, whole(values)?);
                let count = keys.elem_count();
                let args = [
                    Arg::from(address(&dk)?),
                    address(&dv)?.into(),
                    address(&to_dk)?.into(),
                    address(&to_dv)?.into(),
                    int(parts),
                    Arg::from(count as i64),
                ];
                let grid = [count.div_ceil(SUM_NUMBERS), 2, 1];
                unsafe { gpu.launch("attention_backward_sum", grid, &args)? };
                (to_dk, to_dv)
            }
        };
        Ok(PackedGradients { prefix: Some(prefix), own })
    }

    /// The tokens of `q`. An error for more than the kernels can count.
    fn check(&self, q: &Tensor) -> Result<usize> {
        let (tokens, heads, _) = q.dims3()?;
        let shared_by = heads / self.heads.kv_heads;
        if tokens * shared_by * shared_by > i32::MAX as usize {
            candle_core::bail!("packed attention: {tokens} tokens in one pass are too many");
        }
        Ok(tokens)
    }

    fn sequences(&self) -> Result<usize> {
        match self.cu_seqlens.dims1()?.saturating_sub(1) {
            sequences if sequences <= MOST_IN_GRID => Ok(sequences),
            sequences => candle_core::bail!("packed attention: {sequences} sequences in one pass"),
        }
    }

    fn row_grid(&self) -> Result<[usize; 3]> {
        let Heads { heads, kv_heads, .. } = self.heads;
        let rows = self.longest * (heads / kv_heads);
        Ok([rows.div_ceil(BLOCK_ROWS), kv_heads, self.sequences()?])
    }

    /// Thread blocks per KV head that gradients of so many keys take; two share the columns of a wide head.
    fn key_blocks(&self, keys: usize) -> usize {
        keys.div_ceil(BLOCK_ROWS) * if self.heads.head_dim > 128 { 2 } else { 1 }
    }

    fn named(&self, kernel: &str, q: &Tensor) -> String {
        format!("attention_{kernel}_{}_d{}", q.dtype().as_str(), self.heads.head_dim)
    }
}

/// How many of `rows` a part of the prefix's gradient sums, where each part has `blocks` thread blocks: a
/// matter of shapes only, as the bits of the sum depend on it.
fn part_rows(rows: usize, blocks: usize) -> usize {
    let parts = (PREFIX_BLOCKS / blocks.max(1)).max(1);
    rows.div_ceil(parts).max(LEAST_PART_ROWS).next_multiple_of(BLOCK_ROWS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_fill_the_places_and_are_neither_short_nor_too_many() {
        for (rows, blocks, parts) in [
            (1, 8, 1),
            (256, 8, 1),
            (257, 8, 2),
            // A long pack behind a short prefix, and behind one of 2,048 tokens with 8 KV heads.
            (65_536, 8, 128),
            (65_536, 256, 4),
            (8_192, 256, 4),
            (1 << 30, 1, 1024),
            (1 << 20, 5000, 1),
        ] {
            let rows_of_part = part_rows(rows, blocks);
            assert_eq!(rows.div_ceil(rows_of_part), parts, "{rows} rows, {blocks} blocks");
            assert!(rows_of_part >= LEAST_PART_ROWS && rows_of_part.is_multiple_of(BLOCK_ROWS));
            assert!(parts <= MOST_IN_GRID);
        }
    }
}
