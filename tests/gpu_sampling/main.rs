//! Tokens chosen where the logits are, on a GPU (here the emulation), against the host's choice from the very
//! same logits.

#[path = "../common/mod.rs"]
mod common;
#[path = "../engine_support/mod.rs"]
mod engine_support;
#[path = "../kernels_support/mod.rs"]
mod kernels_support;

mod engine;
mod rows;

use cartouche::engine::SampledToken;

/// The same tokens; log-probabilities to 1e-5.
#[track_caller]
fn assert_same(got: &SampledToken, want: &SampledToken, what: &str) {
    let close = |got: f32, want: f32| (got - want).abs() <= 1e-5 * want.abs().max(1.0);
    assert_eq!(got.id, want.id, "{what}: {got:?}, not {want:?}");
    assert!(close(got.logprob, want.logprob), "{what}: {}, not {}", got.logprob, want.logprob);
    let ids = |token: &SampledToken| token.top.iter().map(|(id, _)| *id).collect::<Vec<_>>();
    assert_eq!(ids(got), ids(want), "{what}");
    for ((_, got), (_, want)) in got.top.iter().zip(&want.top) {
        assert!(close(*got, *want), "{what}: {got}, not {want}");
    }
}
