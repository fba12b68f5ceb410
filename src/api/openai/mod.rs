//! The OpenAI wire format, with the fields that vLLM and Tokasaurus clients add to it: request fields,
//! their validation, prompts, and reply bodies. Knows of no route.

pub mod fields;
pub mod messages;
pub mod params;
pub mod prompt;
pub mod prompt_field;
pub mod reply;
