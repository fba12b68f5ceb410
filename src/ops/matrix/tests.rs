//! Products against candle's own, and what they promise about batches and gradients.

use super::*;
use crate::ops::tests::assert_close;
use candle_core::Var;

fn randn(rows: usize, columns: usize) -> Result<Tensor> {
    Tensor::randn(0f32, 1f32, (rows, columns), &Device::Cpu)
}

/// The transposed product; added to `start` if that is not 0.
fn back(matrix: &Matrix, up: &Tensor, start: f32) -> Result<Tensor> {
    let shape = (up.dim(0)?, matrix.dims()?.1);
    let to = Tensor::full(start, shape, &Device::Cpu)?.contiguous()?;
    matrix.transposed_product(up, (start != 0.0).then_some(to))
}

#[test]
fn a_dense_product_and_its_gradient_equal_candles() -> Result<()> {
    for (out, input) in [(1, 1), (16, 7), (33, 64), (200, 1000), (300, 520)] {
        let weight = randn(out, input)?;
        let matrix = Matrix::dense(&weight)?;
        assert_eq!(matrix.to_dense(&Device::Cpu)?.to_vec2::<f32>()?, weight.to_vec2::<f32>()?);
        let x = Var::from_tensor(&randn(21, input)?)?;
        let up = randn(21, out)?;
        let theirs = x.matmul(&weight.t()?)?;
        assert_close(&matrix.product(&x, None)?, &theirs, 1e-3);
        let theirs = (theirs * &up)?.sum_all()?.backward()?;
        assert_close(&back(&matrix, &up, 0.0)?, theirs.get(&x).unwrap(), 1e-3);
        assert_close(&back(&matrix, &up, 2.0)?, &(theirs.get(&x).unwrap() + 2.0)?, 1e-3);
    }
    Ok(())
}

#[test]
fn gradient_passes_through_quantised_weights() -> Result<()> {
    for dtype in [GgmlDType::Q8_0, GgmlDType::Q4_0] {
        let matrix = Matrix::quantized(QTensor::quantize(&randn(280, 320)?, dtype)?)?;
        let up = randn(5, 280)?;
        let theirs = up.matmul(&matrix.to_dense(&Device::Cpu)?)?;
        assert_close(&back(&matrix, &up, 0.0)?, &theirs, 1e-4);
        assert_close(&back(&matrix, &up, 1.0)?, &(theirs + 1.0)?, 1e-4);
    }
    Ok(())
}

/// What invariant 9 rests on.
#[test]
fn a_token_gets_the_same_bits_in_any_batch() -> Result<()> {
    for (input, out) in [(3, 5), (32, 64), (64, 128), (256, 512), (1000, 130), (2048, 256)] {
        let matrix = Matrix::dense(&randn(out, input)?)?;
        let x = randn(70, input)?;
        let all = matrix.product(&x, None)?.to_vec2::<f32>()?;
        for rows in [1, 2, 3, 7, 8, 9, 16, 33, 65] {
            let part = matrix.product(&x.narrow(0, 70 - rows, rows)?, None)?.to_vec2::<f32>()?;
            assert_eq!(part, all[70 - rows..], "{rows} rows of {input} to {out}");
        }
    }
    Ok(())
}

#[test]
fn a_row_that_is_not_there_is_an_error() -> Result<()> {
    let ids = Tensor::new(&[0u32, 3], &Device::Cpu)?;
    let matrix = Matrix::dense(&randn(3, 4)?)?;
    assert!(matrix.rows(&ids).unwrap_err().to_string().contains("row 3"));
    assert!(matrix.product(&randn(1, 5)?, None).is_err());
    Ok(())
}
