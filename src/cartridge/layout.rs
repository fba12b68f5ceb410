//! Numbers on their way into host memory: converted to f32, checked to be finite, and laid out as attention
//! on the CPU reads them, in one pass.

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16, slice::HalfFloatSliceExt};

use super::{CartridgeError, artifact::with_bytes};
use crate::ops::memory::prefer_huge_pages;

/// Tokens that are transposed together: their numbers of one head stay in the first cache.
const TILE: usize = 64;
/// Numbers that are looked at before it is known whether they are finite.
const BLOCK: usize = 4096;

/// A tensor `[kv_heads, tokens, head_dim]` as f32 in host memory; with `transposed`, the numbers of each head
/// lie as `[head_dim, tokens]`, and only the strides tell. `None` if a number is not finite.
pub(super) fn to_f32(tensor: &Tensor, transposed: bool) -> Result<Option<Tensor>, CartridgeError> {
    let failed = |e| CartridgeError::tensor(&e);
    let dims = tensor.dims3().map_err(failed)?;
    let mut numbers = vec![0f32; tensor.elem_count()];
    prefer_huge_pages(&mut numbers);
    let out = &mut numbers[..];
    let finite = with_bytes(tensor, |bytes| match tensor.dtype() {
        DType::BF16 => place::<bf16>(bytemuck::cast_slice(bytes), out, dims, transposed),
        DType::F16 => place::<f16>(bytemuck::cast_slice(bytes), out, dims, transposed),
        _ => place::<f32>(bytemuck::cast_slice(bytes), out, dims, transposed),
    })?;
    if !finite {
        return Ok(None);
    }
    let (heads, tokens, head_dim) = dims;
    let placed = match transposed {
        false => Tensor::from_vec(numbers, dims, &Device::Cpu),
        true => Tensor::from_vec(numbers, (heads, head_dim, tokens), &Device::Cpu)
            .and_then(|t| t.transpose(1, 2)),
    };
    placed.map(Some).map_err(failed)
}

trait Number: Copy {
    fn convert(from: &[Self], to: &mut [f32]);
}

impl Number for f32 {
    fn convert(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

impl Number for bf16 {
    fn convert(from: &[Self], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
    }
}

impl Number for f16 {
    fn convert(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
}

/// Whether all numbers are finite.
fn place<T: Number>(
    from: &[T],
    to: &mut [f32],
    (_, tokens, head_dim): (usize, usize, usize),
    transposed: bool,
) -> bool {
    if !transposed {
        let mut blocks = from.chunks(BLOCK).zip(to.chunks_mut(BLOCK));
        return blocks.all(|(from, to)| {
            T::convert(from, to);
            all_finite(to)
        });
    }
    let head = tokens * head_dim;
    let mut heads = from.chunks_exact(head).zip(to.chunks_exact_mut(head));
    let mut rows = vec![0f32; TILE * head_dim];
    heads.all(|(from, to)| {
        let mut tiles = from.chunks(TILE * head_dim).enumerate();
        tiles.all(|(tile, from)| {
            let rows = &mut rows[..from.len()];
            T::convert(from, rows);
            let first = tile * TILE;
            let count = from.len() / head_dim;
            for (number, column) in to.chunks_exact_mut(tokens).enumerate() {
                let column = &mut column[first..first + count];
                for (out, row) in column.iter_mut().zip(rows.chunks_exact(head_dim)) {
                    *out = row[number];
                }
            }
            all_finite(rows)
        })
    })
}

/// An exponent of all ones is an infinity or a NaN. Looked at without a way out in between, which compilers
/// turn into vector code.
fn all_finite(numbers: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    !numbers.iter().fold(false, |any, n| any | (n.to_bits() & EXPONENT == EXPONENT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pass_gives_what_candle_gives() {
        for (heads, tokens, head_dim) in [(1, 1, 1), (2, 3, 4), (3, 65, 8), (2, 130, 33)] {
            let numbers =
                Tensor::randn(0f32, 3f32, (heads, tokens, head_dim), &Device::Cpu).unwrap();
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let tensor = numbers.to_dtype(dtype).unwrap();
                let expected = tensor.to_dtype(DType::F32).unwrap().to_vec3::<f32>().unwrap();
                for transposed in [false, true] {
                    let placed = to_f32(&tensor, transposed).unwrap().unwrap();
                    assert_eq!(placed.to_vec3::<f32>().unwrap(), expected);
                    let as_read = if transposed { placed.transpose(1, 2).unwrap() } else { placed };
                    assert!(as_read.is_contiguous());
                }
            }
        }
    }

    #[test]
    fn every_place_of_a_number_that_is_not_finite_is_seen() {
        let dims = (2, 67, 3);
        for at in [0, 200, 201, 401] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut numbers = vec![1f32; 402];
                numbers[at] = bad;
                let tensor = Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap();
                for dtype in [DType::F32, DType::BF16, DType::F16] {
                    let tensor = tensor.to_dtype(dtype).unwrap();
                    assert!(to_f32(&tensor, true).unwrap().is_none());
                    assert!(to_f32(&tensor, false).unwrap().is_none());
                }
            }
        }
    }
}
