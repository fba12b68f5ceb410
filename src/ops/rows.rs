//! Some rows of a tensor.

use candle_core::{Device, Result, Tensor};

use super::{Numbers, add_in_place, change_f32, is_ours};

/// Rows chosen of a tensor's first dimension, on the device of that tensor.
#[derive(Debug, Clone)]
pub struct Rows {
    chosen: Vec<u32>,
    /// Rows there are.
    of: usize,
    index: Tensor,
    /// Of every row its place among the chosen ones; behind the last of them if it is none.
    places: Tensor,
}

impl Rows {
    /// `chosen` must ascend strictly within the `of` rows there are.
    pub fn new(chosen: Vec<u32>, of: usize, device: &Device) -> Result<Self> {
        if !chosen.is_sorted_by(|a, b| a < b)
            || chosen.last().is_some_and(|row| *row as usize >= of)
        {
            candle_core::bail!("chosen rows must ascend within the {of} there are");
        }
        let mut places = vec![chosen.len() as u32; of];
        (0..).zip(&chosen).for_each(|(place, row)| places[*row as usize] = place);
        let index = Tensor::new(chosen.as_slice(), device)?;
        let places = Tensor::from_vec(places, of, device)?;
        Ok(Self { chosen, of, index, places })
    }

    /// Which they are.
    pub fn chosen(&self) -> &[u32] {
        &self.chosen
    }

    /// `[of, ..]` to `[chosen, ..]`.
    pub fn pick(&self, x: &Tensor) -> Result<Tensor> {
        x.index_select(&self.index, 0)
    }

    /// `[chosen, ..]` to `[of, ..]`, with zeroes in all other rows.
    pub fn spread(&self, x: &Tensor) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        let Some(rows) = shape.first_mut() else { candle_core::bail!("a tensor without rows") };
        if is_ours(x) {
            *rows = self.of;
            return self.add(x, Tensor::zeros(shape, x.dtype(), x.device())?);
        }
        // Every row looks up what it gets: no two of them write to one place.
        *rows = 1;
        let nothing = Tensor::zeros(shape, x.dtype(), x.device())?;
        Tensor::cat(&[x, &nothing], 0)?.index_select(&self.places, 0)
    }

    /// `to` `[of, ..]` plus [`Self::spread`], written to the place of `to`, which nobody else may hold.
    pub fn add(&self, x: &Tensor, to: Tensor) -> Result<Tensor> {
        if x.dims().first() != Some(&self.chosen.len()) || to.dims().first() != Some(&self.of) {
            candle_core::bail!("adding rows of {:?} to {:?}", x.dims(), to.dims());
        }
        if !is_ours(&to) {
            return add_in_place(to, &self.spread(x)?);
        }
        let x = Numbers::of(x)?;
        let width = x.len() / self.chosen.len().max(1);
        change_f32(&to, |to| {
            for (row, from) in self.chosen.iter().zip(x.chunks_exact(width.max(1))) {
                let to = &mut to[*row as usize * width..][..width];
                to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
            }
            Ok(())
        })?;
        Ok(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    #[test]
    fn spread_rows_are_where_they_were_picked_in_both_forms() -> Result<()> {
        let device = &Device::Cpu;
        for (chosen, of) in [(vec![1, 4, 5], 7), (vec![0], 1), (vec![], 3), (vec![0, 1], 2)] {
            let rows = Rows::new(chosen.clone(), of, device)?;
            let x = Tensor::arange(1f32, 1.0 + (of * 6) as f32, device)?.reshape((of, 2, 3))?;
            let picked = rows.pick(&x)?;
            assert_eq!(picked.dims(), [chosen.len(), 2, 3]);
            let kept = |row: u32| f32::from(u8::from(chosen.contains(&row)));
            let mask: Vec<f32> = (0..of as u32).map(kept).collect();
            let want = x.broadcast_mul(&Tensor::from_vec(mask, (of, 1, 1), device)?)?;
            // In f64 as on a GPU.
            for dtype in [DType::F32, DType::F64] {
                let (picked, x) = (picked.to_dtype(dtype)?, x.copy()?.to_dtype(dtype)?);
                let numbers = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
                assert_eq!(numbers(&rows.spread(&picked)?)?, numbers(&want)?);
                let sum = (x.to_dtype(DType::F32)? + &want)?;
                assert_eq!(numbers(&rows.add(&picked, x)?)?, numbers(&sum)?);
            }
        }
        for chosen in [vec![3], vec![1, 1], vec![2, 1]] {
            assert!(Rows::new(chosen, 3, device).is_err());
        }
        Ok(())
    }
}
