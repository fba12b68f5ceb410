//! HTTP only: router, wire types, handlers, error bodies, server-sent events.
//!
//! Every request passes `access`, the gate; `routes` is the table of what is behind it.
//!
//! A generation request then passes `extract` and `openai::fields` (what was sent), `openai::params` (what is
//! meant), `cartridges` and `openai::prompt` (what it is about), the engine, `generate` (tokens to text)
//! and ends in `chat` or `completions` as a whole reply or through `stream`.

pub mod access;
mod admin;
mod blocking;
pub mod cartridge_blocks;
pub mod cartridges;
mod chat;
mod choice;
mod completions;
mod cors;
mod demo;
mod error;
mod error_from;
pub mod extract;
mod generate;
mod health;
mod in_flight;
mod lend;
mod life;
mod listen;
mod logprobs;
mod metrics;
mod models;
pub mod openai;
mod request;
mod request_id;
mod router_metrics;
mod routes;
mod state;
mod stream;
mod tally;
mod tokenize;
mod updates;

pub use access::{Access, KeySources};
pub use cors::Origin;
pub use error::ApiError;
pub use in_flight::InFlight;
pub use lend::ImplicitLoad;
pub use listen::{ListenOptions, Shutdown, serve};
pub use metrics::Metrics;
pub use routes::{Route, router, routes};
pub use state::{ApiOptions, AppState, Readiness, ServedModel};
