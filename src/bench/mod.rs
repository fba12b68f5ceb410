//! The load generator behind `cartouche bench`: it measures any OpenAI-compatible server over HTTP.
//!
//! `plan` says what to run, `workload` makes the request bodies, `client` and `sse` read one streamed
//! reply into a `Record`, `load` drives many of them (closed or open loop), `run` takes targets and
//! levels in turns, `stats` sums records up, and `table`, `files`, `html` and `plot` show the result.
//!
//! Nothing of this knows our engine: peers are measured by the same code over the same bytes. `shape` is
//! apart from it: it measures the decoder in this process, without a server.

mod client;
mod error;
mod files;
mod html;
mod load;
mod machine;
mod median;
mod plan;
pub(crate) mod plot;
mod record;
mod run;
pub mod shape;
pub mod sse;
pub mod stats;
mod summary;
mod table;
mod target;
mod workload;

pub use client::{Connection, Endpoint, Sending, perform};
pub use error::{BenchError, Failure};
pub use files::{csv, write};
pub use load::{Stop, arrivals, drive};
pub use machine::{Machine, cpu_seconds};
pub use plan::{Amount, Api, Load, Plan, Prefix, PromptSource, Target, WorkloadOptions};
pub use record::Record;
pub use run::{Report, run};
pub use stats::{Distribution, percentile};
pub use summary::{LevelSummary, summarize};
pub use table::table;
pub use workload::Workload;
