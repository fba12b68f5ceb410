//! What sharing a cartridge saves: many sequences on one, and the same with a copy for each.

use super::measure::{Unmeasured, check_memory, time};
use super::roofline::{Decoding, Work};
use super::serving::{AttentionInputs, Batch, Copies, placement};
use super::{Bench, Beside, Case, Part};
use crate::bench::BenchError;
use crate::cartridge::Lease;
use crate::model::Decoder;

const SEQUENCES: usize = 64;

pub(super) fn run(bench: &mut Bench<'_>, decoder: &Decoder) -> Result<(), BenchError> {
    for tokens in bench.lengths.cartridges {
        let batch = |shared| Decoding {
            sequences: SEQUENCES,
            own: bench.lengths.suffix,
            cartridge: tokens,
            cartridges: if shared { 1 } else { SEQUENCES },
        };
        let (one, each) = (batch(true), batch(false));
        let shared = both(bench, decoder, one, None)?;
        let (attention, step) = (bench.costs.step_attention(one), bench.costs.step(one));
        let of_shared = [(shared[0], attention), (shared[1], step)];
        both(bench, decoder, each, Some(of_shared))?;
    }
    Ok(())
}

/// The attention of a step, then the whole step; their medians. Ratios are to `shared`.
fn both(
    bench: &mut Bench<'_>,
    decoder: &Decoder,
    reads: Decoding,
    shared: Option<[(Option<f64>, Work); 2]>,
) -> Result<[Option<f64>; 2], BenchError> {
    let Decoding { sequences, own, cartridge, cartridges } = reads;
    let whole = [bench.costs.step_attention(reads), bench.costs.step(reads)];
    let cases = ["attention", "step"].iter().zip(whole).map(|(of, work)| Case {
        what: Part::Cartridge.name(),
        name: format!(
            "of={of} p={cartridge} suffix={own} sequences={sequences} cartridges={cartridges}"
        ),
        work,
        tokens: Some(sequences),
        sequences: Some(sequences),
        note: if cartridges > 1 { "the time with one cartridge for all" } else { "" }.to_owned(),
    });
    let (device, timing) = (&bench.plan.placement.device, &bench.plan.timing);
    let mut measured = Vec::new();
    match stage(decoder, reads) {
        Ok((mut batch, inputs)) => {
            measured.push(time(device, timing, || batch.attention(&inputs)));
            measured.push(time(device, timing, || batch.step()));
        }
        Err(reason) => {
            let again = Unmeasured::Again(reason.to_string());
            measured.extend([Err(reason), Err(again)]);
        }
    }
    let mut medians = [None; 2];
    for (i, (case, times)) in cases.zip(measured).enumerate() {
        let beside = match shared.map(|shared| shared[i]) {
            None => Beside::default(),
            Some((median, work)) => {
                let mine = times.as_ref().ok().map(|times| times.median);
                Beside {
                    ratio: mine.zip(median).map(|(mine, shared)| mine / shared),
                    ratio_predicted: Some(case.work.bytes as f64 / work.bytes as f64),
                    peak: None,
                }
            }
        };
        medians[i] = bench.row(case, &times, beside)?;
    }
    Ok(medians)
}

fn stage(decoder: &Decoder, reads: Decoding) -> Result<(Batch<'_>, AttentionInputs), Unmeasured> {
    let copies = Copies::new(decoder, reads.cartridge)?;
    let leases: Vec<Vec<Lease>> = match reads.cartridges {
        1 => vec![vec![copies.whole()?]; reads.sequences],
        count => {
            check_memory(decoder.device(), count as u64 * copies.layer_bytes())?;
            (0..count).map(|_| Ok(vec![copies.one_layer()?])).collect::<Result<_, Unmeasured>>()?
        }
    };
    drop(copies);
    let inputs = AttentionInputs::new(decoder.config(), &placement(decoder), reads.sequences)?;
    Ok((Batch::new(decoder, leases, reads.own)?, inputs))
}
