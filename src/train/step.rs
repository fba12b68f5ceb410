use super::*;
use crate::model::Decoder;
use candle_core::Tensor;
#[derive(Debug, Clone)]
pub struct PrefixLayer {
    pub keys: Tensor,
    pub values: Tensor,
}
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum Normalizer {
    #[default]
    Tokens,
    Entries,
}
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOptions {
    pub normalizer: Normalizer,
    pub temperature: f32,
    pub recompute: bool,
}
pub struct StepOutput {
    pub loss: f64,
    pub nll_sum: f64,
    pub entropy_sum: f64,
    pub rows: usize,
    pub entries: usize,
    pub gradients: Vec<(Tensor, Tensor)>,
}
pub struct LossOnly {
    pub loss: f64,
    pub nll_sum: f64,
    pub entropy_sum: f64,
    pub rows: usize,
    pub entries: usize,
}
pub fn gradients(
    _: &Decoder,
    _: &[PrefixLayer],
    _: &Pack,
    _: &StepOptions,
) -> Result<StepOutput, TrainError> {
    todo!()
}
pub fn evaluate(
    _: &Decoder,
    _: &[PrefixLayer],
    _: &Pack,
    _: &StepOptions,
) -> Result<LossOnly, TrainError> {
    todo!()
}
