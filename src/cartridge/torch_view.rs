//! One tensor of a `.pt` file: a strided view of a storage, checked and copied out of it.

use candle_core::DType;

use super::{
    CartridgeError,
    pickle_value::{Element, TensorRef},
};

/// All tokens of one head, one after the other; [`check_view`] made sure that all of them lie inside `data`.
pub(super) fn copy_head(view: &TensorRef, head: usize, width: usize, data: &[u8], out: &mut [u8]) {
    let stride = |axis: usize| view.stride[axis] as usize;
    let (tokens, numbers) = (view.size[2] as usize, view.size[3] as usize);
    let start = view.offset as usize + head * stride(1);
    if stride(3) == 1 && (stride(2) == numbers || tokens == 1) {
        out.copy_from_slice(&data[start * width..][..out.len()]);
        return;
    }
    for (token, row) in out.chunks_exact_mut(numbers * width).enumerate() {
        let start = start + token * stride(2);
        if stride(3) == 1 {
            row.copy_from_slice(&data[start * width..][..row.len()]);
            continue;
        }
        for (i, number) in row.chunks_exact_mut(width).enumerate() {
            number.copy_from_slice(&data[(start + i * stride(3)) * width..][..width]);
        }
    }
}

/// Bytes the view stands for, if its last element lies inside its storage and the storage in its
/// record.
pub(super) fn check_view(
    view: &TensorRef,
    dtype: DType,
    record: u64,
) -> Result<u64, CartridgeError> {
    let width = dtype.size_in_bytes() as u64;
    let storage_width = if view.storage.element == Element::Untyped { 1 } else { width };
    let key = &view.storage.key;
    let claimed = view.storage.len.checked_mul(storage_width);
    let Some(claimed) = claimed.filter(|claimed| *claimed <= record) else {
        let reason =
            format!("storage `{key}` claims {} elements, has {record} bytes", view.storage.len);
        return Err(CartridgeError::invalid(reason));
    };
    let last = view.size.iter().zip(&view.stride).try_fold(view.offset, |sum, (size, stride)| {
        (size - 1).checked_mul(*stride).and_then(|step| sum.checked_add(step))
    });
    let end = last.and_then(|last| last.checked_add(1)).and_then(|end| end.checked_mul(width));
    if end.is_none_or(|end| end > claimed) {
        let (size, stride, offset) = (&view.size, &view.stride, view.offset);
        let reason = format!(
            "a tensor of shape {size:?}, strides {stride:?} and offset {offset} leaves its storage \
             `{key}` of {claimed} bytes"
        );
        return Err(CartridgeError::invalid(reason));
    }
    let bytes = view.size.iter().try_fold(width, |product, size| product.checked_mul(*size));
    // A view that repeats elements (stride 0) may have more elements than its storage.
    match bytes.filter(|bytes| *bytes <= claimed) {
        Some(bytes) => Ok(bytes),
        None => {
            let reason =
                format!("a tensor of shape {:?} repeats elements of its storage", view.size);
            Err(CartridgeError::invalid(reason))
        }
    }
}

pub(super) fn dims(tensor: &TensorRef, place: &str) -> Result<[u64; 4], CartridgeError> {
    match tensor.size[..] {
        [1, heads, tokens, head_dim] => Ok([1, heads, tokens, head_dim]),
        _ => {
            let have = &tensor.size;
            let reason =
                format!("{place}: shape {have:?}, expected [1, kv_heads, tokens, head_dim]");
            Err(CartridgeError::invalid(reason))
        }
    }
}

pub(super) fn element_type(tensor: &TensorRef, place: &str) -> Result<DType, CartridgeError> {
    match tensor.element {
        Element::F16 => Ok(DType::F16),
        Element::BF16 => Ok(DType::BF16),
        Element::F32 => Ok(DType::F32),
        Element::Untyped => Err(CartridgeError::invalid(format!("{place}: no number type"))),
        Element::Other(name) => {
            let reason = format!("{place}: type {name}; cartridges are f16, bf16 or f32");
            Err(CartridgeError::invalid(reason))
        }
    }
}
