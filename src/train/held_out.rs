//! How well the cartridge stands for the teacher on conversations it does not learn from.

use super::step::evaluate;
use super::trainer::rows_to_blame;
use super::{Normalizer, Pack, TrainError, Trainer};

/// Sums over held-out sequences.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct HeldOut {
    /// Of all supervised tokens, or entries as the run's normaliser says.
    pub loss: f64,
    /// Mean over sequences of the loss of each.
    pub macro_loss: f64,
    /// Kullback-Leibler divergence from the teacher per supervised token, over the entries kept: the loss less
    /// the teacher's own entropy. 0 for a cartridge that is as good as the text, but for what was cut.
    pub kl: f64,
    pub sequences: usize,
    pub input_tokens: usize,
    pub target_tokens: usize,
}

impl Trainer {
    /// Measures the cartridge as it is now, one sequence after the other.
    ///
    /// # Errors
    /// [`TrainError::HeldOut`] names the dataset row; [`TrainError::Invalid`] for packs without targets.
    pub fn measure(&self, packs: &[Pack]) -> Result<HeldOut, TrainError> {
        let prefix = self.parameters.prefix(self.decoder.device())?;
        let mut sum = HeldOut::default();
        let (mut nll, mut kl, mut divisor) = (0.0, 0.0, 0);
        for pack in packs.iter().flat_map(Pack::sequences) {
            let loss =
                evaluate(&self.decoder, &prefix, &pack, &self.options.step).map_err(|e| {
                    let dataset_rows = rows_to_blame(&pack, &e);
                    TrainError::HeldOut { dataset_rows, source: Box::new(e) }
                })?;
            nll += loss.nll_sum;
            kl += loss.nll_sum + loss.entropy_sum;
            divisor += match self.options.step.normalizer {
                Normalizer::Tokens => loss.rows,
                Normalizer::Entries => loss.entries,
            };
            sum.macro_loss += loss.loss;
            sum.sequences += 1;
            sum.input_tokens += pack.tokens.len();
            sum.target_tokens += loss.rows;
        }
        if sum.sequences == 0 {
            return Err(TrainError::Invalid("no held-out sequence has targets".to_owned()));
        }
        sum.macro_loss /= sum.sequences as f64;
        Ok(HeldOut { loss: nll / divisor as f64, kl: kl / sum.target_tokens as f64, ..sum })
    }
}
