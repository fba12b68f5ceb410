//! What can go wrong while a cartridge is trained.

/// Errors of training.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A pack that the decoder cannot compute; nothing was computed.
    #[error("the pack cannot be trained on: {reason}")]
    Pack { reason: String },
    /// Keys or values of a shape the model does not have.
    #[error("the cartridge does not fit the model: {reason}")]
    Prefix { reason: String },
    /// A temperature that is no positive number.
    #[error("the temperature must be a positive number, not {temperature}")]
    Temperature { temperature: f32 },
    /// `row` is the first such row of the pack, an index into its tokens.
    #[error(
        "the loss of row {row} is not finite: lower the learning rate, or look for a teacher \
         probability or a cartridge that is not finite"
    )]
    NonFiniteLoss { row: usize },
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
