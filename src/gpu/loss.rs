//! The distillation loss on a GPU.

use candle_core::{DType, Result, Tensor};

use super::launch::{Arg, Launch};
use super::machine::address;
use super::ops::{int, null};

/// Sparse targets of a number of rows, and room for what becomes of them; all on one device.
pub struct LossRows {
    /// `[rows + 1]` i32: row `r` has the entries `starts[r] .. starts[r + 1]`.
    pub starts: Tensor,
    /// `[entries]` i32, below the vocabulary.
    pub ids: Tensor,
    /// `[entries]` f32.
    pub probs: Tensor,
    /// `[rows]` f32: the loss of each.
    pub losses: Tensor,
    /// `[entries]` f32, if gradients are wanted.
    pub slopes: Option<Tensor>,
}

impl LossRows {
    /// Computes the losses of the rows from `first` on, as many as there are `logits` `[rows, vocab]` in f32;
    /// these become gradients if gradients are wanted. `scale` is 1 / temperature, `unit` that over the
    /// divisor of the loss.
    pub fn compute(
        &self,
        gpu: &dyn Launch,
        logits: &Tensor,
        first: usize,
        (scale, unit): (f32, f32),
    ) -> Result<()> {
        let (rows, vocab) = logits.dims2()?;
        let whole = self.losses.dims1()?;
        if first + rows > whole || self.starts.dims1()? != whole + 1 || logits.dtype() != DType::F32
        {
            candle_core::bail!(
                "distillation_loss: {:?} from row {first} of {whole}",
                logits.dims()
            );
        }
        let from = |tensor: &Tensor, row: usize| {
            Ok::<_, candle_core::Error>(address(tensor)? + 4 * row as u64)
        };
        let args = [
            Arg::from(address(logits)?),
            from(&self.starts, first)?.into(),
            address(&self.ids)?.into(),
            address(&self.probs)?.into(),
            from(&self.losses, first)?.into(),
            self.slopes.as_ref().map_or(Ok(null()), |slopes| address(slopes).map(Arg::from))?,
            int(vocab),
            scale.into(),
            unit.into(),
            int(self.slopes.is_some().into()),
        ];
        // SAFETY: the arguments of the kernel; these rows and their entries exist.
        unsafe { gpu.launch("distillation_loss_f32", [rows, 1, 1], &args) }
    }
}
