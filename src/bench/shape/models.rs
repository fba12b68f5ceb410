//! The shapes that can be measured, as their publishers' `config.json` gives them.

use crate::bench::BenchError;
use crate::model::ModelConfig;

/// Name and configuration, in the form the loader reads.
const MODELS: [(&str, &str); 4] = [
    ("llama-3.2-1b", include_str!("../../../assets/shapes/llama-3.2-1b.json")),
    ("llama-3.2-3b", include_str!("../../../assets/shapes/llama-3.2-3b.json")),
    ("llama-3.1-8b", include_str!("../../../assets/shapes/llama-3.1-8b.json")),
    ("qwen3-4b", include_str!("../../../assets/shapes/qwen3-4b.json")),
];

/// Names that [`config`] knows.
pub fn names() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|(name, _)| *name)
}

/// The configuration of a named shape.
///
/// # Errors
/// A name that is not among [`names`].
pub fn config(name: &str) -> Result<ModelConfig, BenchError> {
    let Some((_, json)) = MODELS.iter().find(|(known, _)| *known == name) else {
        let names = names().collect::<Vec<_>>().join(", ");
        return Err(BenchError::Plan(format!("--shape {name}: not one of {names}")));
    };
    Ok(ModelConfig::from_json(json.as_bytes(), name)?)
}
