//! What a small prefix is worth where memory is full: sequences that each have a cartridge of their own,
//! against as many as fit with the text in its place.

use super::measure::{Unmeasured, check_memory, time};
use super::roofline::{Costs, Decoding};
use super::serving::{Batch, Copies, plain, plain_work};
use super::{Bench, Beside, Case, Part, memory};
use crate::bench::BenchError;
use crate::engine::{BLOCK_TOKENS, blocks_for};
use crate::model::Decoder;

/// Throughput with cartridges over that with the text, of the paper (arXiv 2506.06266).
const GOAL: f64 = 26.4;
/// KV memory on the CPU, before it is scaled: what the engine takes there.
const CPU_KV_BYTES: u64 = 1 << 30;

/// How many sequences fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holding {
    /// Bytes of one sequence: its cartridge, and its own tokens in whole blocks.
    pub sequence_bytes: u64,
    pub sequences: usize,
}

/// Sequences with a cartridge of `cartridge` tokens and `own` tokens each in `memory` bytes.
pub fn holding(costs: &Costs, memory: u64, cartridge: usize, own: usize) -> Holding {
    let tokens = cartridge + blocks_for(own) * BLOCK_TOKENS;
    let sequence_bytes = tokens as u64 * costs.kv_token_bytes();
    Holding { sequence_bytes, sequences: (memory / sequence_bytes) as usize }
}

pub(super) fn run(bench: &mut Bench<'_>, decoder: &Decoder) -> Result<(), BenchError> {
    let device = decoder.device();
    let memory = bench.plan.kv_bytes.unwrap_or_else(|| match memory::free(device) {
        // The rest is for activations.
        Some(free) if !device.is_cpu() => free / 4 * 3 / bench.plan.scale as u64,
        _ => CPU_KV_BYTES / bench.plan.scale as u64,
    });
    let super::Lengths { text, cartridge, answer, .. } = bench.lengths;
    let with_text = measured(bench, decoder, memory, 0, text + answer, None)?;
    measured(bench, decoder, memory, cartridge, answer, Some(with_text))?;
    Ok(())
}

/// Tokens per second: measured, and at most.
type Throughput = (Option<f64>, Option<f64>);

fn measured(
    bench: &mut Bench<'_>,
    decoder: &Decoder,
    memory: u64,
    cartridge: usize,
    own: usize,
    with_text: Option<Throughput>,
) -> Result<Throughput, BenchError> {
    let Holding { sequence_bytes, sequences } = holding(&bench.costs, memory, cartridge, own);
    let reads = match cartridge {
        0 => plain_work(sequences, own),
        _ => Decoding { sequences, own, cartridge, cartridges: sequences },
    };
    let gib = memory as f64 / f64::from(1 << 30);
    let mut note = match with_text {
        None => format!("{gib:.2} GiB of keys and values"),
        Some(_) => {
            format!("the tokens/s with the text; paper {GOAL}; {gib:.2} GiB of keys and values")
        }
    };
    let most = decoder.config().max_positions;
    if cartridge + own > most {
        note += &format!("; beyond the model's {most} positions: speed only");
    }
    let case = Case {
        what: Part::Capacity.name(),
        name: format!("p={cartridge} own={own} sequences={sequences}"),
        work: bench.costs.step(reads),
        tokens: Some(sequences),
        sequences: Some(sequences),
        note,
    };
    let (shortest, _) = bench.roofs.shortest(case.work);
    let predicted = (sequences > 0).then(|| sequences as f64 / shortest);
    let times = match sequences {
        0 => Err(Unmeasured::NoSequence { memory, sequence: sequence_bytes }),
        _ => stage(decoder, reads)
            .and_then(|mut batch| time(decoder.device(), &bench.plan.timing, || batch.step())),
    };
    let reached = times.as_ref().ok().map(|times| sequences as f64 / times.median);
    let over =
        |mine: Option<f64>, text: Option<f64>| mine.zip(text).map(|(mine, text)| mine / text);
    let beside = match with_text {
        None => Beside::default(),
        Some((text, text_predicted)) => Beside {
            ratio: over(reached, text),
            ratio_predicted: over(predicted, text_predicted),
            peak: None,
        },
    };
    bench.row(case, &times, beside)?;
    Ok((reached, predicted))
}

/// Every sequence with memory of its own.
fn stage(decoder: &Decoder, reads: Decoding) -> Result<Batch<'_>, Unmeasured> {
    let leases = match reads.cartridge {
        0 => plain(reads.sequences),
        tokens => {
            let copies = Copies::new(decoder, tokens)?;
            check_memory(decoder.device(), reads.sequences as u64 * copies.bytes())?;
            (0..reads.sequences)
                .map(|_| Ok(vec![copies.whole()?]))
                .collect::<Result<_, Unmeasured>>()?
        }
    };
    Batch::new(decoder, leases, reads.own)
}
