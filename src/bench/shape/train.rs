//! A training step: gradients of a pack, and the update by Adam.

use super::measure::{Times, Unmeasured, check_memory, time};
use super::memory::Peak;
use super::roofline::Packed;
use super::serving::placement;
use super::{Bench, Beside, Case, Part};
use crate::bench::BenchError;
use crate::cartridge::LayerKv;
use crate::model::{Decoder, noise};
use crate::train::{
    Adam, AdamOptions, Pack, Parameters, StepOptions, Targets, gradients, keep_freed_memory,
};

/// Entries of a teacher's distribution, as the paper's.
const TOP: usize = 20;
const LEARNING_RATE: f64 = 1e-3;

pub(super) fn run(bench: &mut Bench<'_>, decoder: &Decoder) -> Result<(), BenchError> {
    keep_freed_memory();
    let length = bench.lengths.conversation;
    let sequences = (bench.lengths.pack / length).max(1);
    let pack = Packed { sequences, length, prefix: bench.lengths.prefix };
    // An answer as long as its question.
    let targets = length.div_ceil(2);
    for recompute in [false, true] {
        let case = Case {
            what: Part::Train.name(),
            name: format!(
                "tokens={} length={length} targets={} top={TOP} p={} recompute={recompute}",
                pack.tokens(),
                sequences * targets,
                pack.prefix
            ),
            work: bench.costs.train_step(pack, targets),
            tokens: Some(pack.tokens()),
            sequences: Some(sequences),
            note: String::new(),
        };
        let mut peak = None;
        let times = step(bench, decoder, pack, targets, recompute, &mut peak);
        bench.row(case, &times, Beside { peak, ..Beside::default() })?;
    }
    Ok(())
}

fn step(
    bench: &Bench<'_>,
    decoder: &Decoder,
    pack: Packed,
    targets: usize,
    recompute: bool,
    peak: &mut Option<u64>,
) -> Result<Times, Unmeasured> {
    let device = decoder.device();
    check_memory(device, bench.costs.trace_bytes(pack.tokens(), recompute))?;
    let mut parameters = parameters(decoder, pack.prefix)?;
    let mut adam = Adam::new(AdamOptions::default(), &parameters);
    let options = StepOptions { recompute, ..StepOptions::default() };
    let pack = random_pack(pack, targets, decoder.config().vocab_size);
    let mut step = || {
        let prefix = parameters.prefix(device)?;
        let output = gradients(decoder, &prefix, &pack, &options)?;
        let tensors = output.gradients.iter().flat_map(|(keys, values)| [keys, values]);
        let numbers = tensors
            .map(|tensor| tensor.flatten_all()?.to_vec1())
            .collect::<candle_core::Result<Vec<Vec<f32>>>>()?;
        adam.update(&mut parameters, &numbers, LEARNING_RATE);
        Ok(())
    };
    let times = time(device, &bench.plan.timing, &mut step)?;
    // In a run that is not timed: whoever watches takes part.
    let watch = Peak::watch(device);
    step()?;
    *peak = watch.and_then(Peak::growth);
    Ok(times)
}

fn parameters(decoder: &Decoder, tokens: usize) -> Result<Parameters, Unmeasured> {
    let config = decoder.config();
    let numbers =
        |seed| noise((config.kv_heads, tokens, config.head_dim), 1.0, &placement(decoder), seed);
    let layer = LayerKv { keys: numbers(4)?, values: numbers(5)?, bias: None };
    Ok(Parameters::new(&vec![layer; config.layers], 0)?)
}

/// Any tokens; each of the last `targets` rows of a sequence has a distribution over some tokens.
fn random_pack(pack: Packed, targets: usize, vocab: usize) -> Pack {
    let length = pack.length as u32;
    let token = |at: u32| at.wrapping_mul(2_654_435_761) % vocab as u32;
    let mut entries = Targets::default();
    let rows = (0..pack.tokens() as u32).filter(|row| row % length >= length - targets as u32);
    for (row, entry) in rows.flat_map(|row| (0..TOP as u32).map(move |entry| (row, entry))) {
        entries.push(row, token(row * TOP as u32 + entry), 1.0 / TOP as f32);
    }
    Pack {
        tokens: (0..pack.tokens() as u32).map(token).collect(),
        cu_seqlens: (0..=pack.sequences as u32).map(|i| i * length).collect(),
        targets: entries,
        dataset_rows: Vec::new(),
    }
}
