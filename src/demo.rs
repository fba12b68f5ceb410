//! The built-in demo: a small model that recalls facts from its context, two documents, two cartridges.
//!
//! Everything is embedded in the binary, so that the first start needs no download.

/// Name the demo model is served under.
pub const MODEL_NAME: &str = "cartouche-demo";

/// A file of the demo model by its name in the repository.
pub fn model_file(name: &str) -> Option<&'static [u8]> {
    Some(match name {
        "config.json" => include_bytes!("../assets/demo/model/config.json"),
        "generation_config.json" => include_bytes!("../assets/demo/model/generation_config.json"),
        "model.safetensors" => include_bytes!("../assets/demo/model/model.safetensors"),
        "tokenizer.json" => include_bytes!("../assets/demo/model/tokenizer.json"),
        "tokenizer_config.json" => include_bytes!("../assets/demo/model/tokenizer_config.json"),
        _ => return None,
    })
}
