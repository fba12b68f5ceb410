//! One step of decoding at several batch sizes.

use super::measure::time;
use super::serving::{Batch, plain, plain_work};
use super::{Bench, Case, Part};
use crate::bench::BenchError;
use crate::model::Decoder;

const BATCHES: [usize; 4] = [1, 8, 64, 256];

pub(super) fn run(bench: &mut Bench<'_>, decoder: &Decoder) -> Result<(), BenchError> {
    let own = bench.lengths.context;
    for sequences in BATCHES {
        let case = Case {
            what: Part::Decode.name(),
            name: format!("batch={sequences} context={own}"),
            work: bench.costs.step(plain_work(sequences, own)),
            tokens: Some(sequences),
            sequences: Some(sequences),
            note: String::new(),
        };
        bench.measure(case, |device, timing| {
            let mut batch = Batch::new(decoder, plain(sequences), own)?;
            time(device, timing, || batch.step())
        })?;
    }
    Ok(())
}
