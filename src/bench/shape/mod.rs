//! `cartouche bench --shape`: the speed of the decoder itself, on random weights of a real model's shape, each
//! figure beside what the device's own copy and matrix product allow.
//!
//! The rest of the load generator knows servers only; this room knows the engine's parts and uses them as the
//! engine and the trainer do. `models` are the shapes, `roofline` counts bytes and operations, `roofs` and
//! `measure` measure, `serving` is a batch in the middle of decoding; `decode`, `cartridge`, `capacity`,
//! `attention` and `train` are the figures, and `report` shows them.

mod attention;
mod capacity;
mod cartridge;
mod decode;
mod dump;
mod measure;
mod memory;
mod models;
mod report;
mod roofline;
mod roofs;
mod serving;
mod train;

pub use capacity::{Holding, holding};
pub use dump::dump;
pub use measure::{Times, Timing, Unmeasured};
pub use models::{config, names};
pub use report::{Row, csv, header, heading, line, write};
pub use roofline::{Costs, Decoding, Packed, Roofs, Work};
pub use roofs::RoofSizes;

use crate::bench::BenchError;
use crate::model::{Decoder, ModelConfig, Placement};

/// Seed of all weights, keys and values.
const SEED: u64 = 1;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Steps of 1, 8, 64 and 256 sequences with 1,024 tokens each
    Decode,
    /// 64 sequences on one cartridge, and with a copy for each
    Cartridge,
    /// As many sequences as the KV memory holds: with cartridges, and with the text instead
    Capacity,
    /// The attention of training and its gradient
    Attention,
    /// A training step with Adam
    Train,
}

impl Part {
    /// All of them, in the order in which they are measured.
    pub const ALL: [Self; 5] =
        [Self::Decode, Self::Cartridge, Self::Capacity, Self::Attention, Self::Train];

    fn name(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Cartridge => "cartridge",
            Self::Capacity => "capacity",
            Self::Attention => "attention",
            Self::Train => "train",
        }
    }
}

/// Numbers of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Own tokens of a sequence of `decode`.
    pub context: usize,
    /// Of the cartridges of `cartridge`, and own tokens beside them.
    pub cartridges: [usize; 2],
    pub suffix: usize,
    /// Of a pack of training, and of the sequences in it.
    pub pack: usize,
    pub sequences: [usize; 3],
    /// Of the cartridge that is trained.
    pub prefix: usize,
    /// Of a sequence of a training step.
    pub conversation: usize,
    /// Of a cartridge of `capacity`, of the text it stands for, and own tokens beside either.
    pub cartridge: usize,
    pub text: usize,
    pub answer: usize,
}

impl Lengths {
    /// The full lengths divided by `scale`. The text is 38.6 times the cartridge, as in the paper
    /// (arXiv 2506.06266).
    pub fn scaled(scale: usize) -> Self {
        let scaled = |tokens: usize| (tokens / scale.max(1)).max(1);
        Self {
            context: scaled(1024),
            cartridges: [2048, 8192].map(scaled),
            suffix: scaled(256),
            pack: scaled(8192),
            sequences: [512, 2048, 8192].map(scaled),
            prefix: scaled(2048),
            conversation: scaled(1024),
            cartridge: scaled(2048),
            text: scaled(79_053),
            answer: scaled(128),
        }
    }
}

/// What to measure, and where.
#[derive(Debug, Clone)]
pub struct ShapePlan {
    /// Name of the shape, for the report.
    pub shape: String,
    pub config: ModelConfig,
    /// Layers of the whole model; [`Self::config`] may have fewer.
    pub of_layers: usize,
    pub placement: Placement,
    pub parts: Vec<Part>,
    /// Divides every length, and the KV memory if it is not given.
    pub scale: usize,
    /// Bytes of keys and values in `capacity`.
    pub kv_bytes: Option<u64>,
    pub roofs: RoofSizes,
    pub timing: Timing,
}

/// Measures and hands every row to `sink` as it is done. Returns how many figures there are.
///
/// A figure that cannot be had is a row whose note says why.
///
/// # Errors
/// [`BenchError`] if the roofs cannot be measured, the weights do not fit, or `sink` fails.
pub fn run(
    plan: &ShapePlan,
    sink: &mut dyn FnMut(&Row) -> Result<(), BenchError>,
) -> Result<usize, BenchError> {
    let mut bench = Bench::new(plan, sink)?;
    let chosen = Part::ALL.iter().filter(|part| plan.parts.contains(part));
    let mut decoder: Option<Decoder> = None;
    for part in chosen {
        if *part == Part::Attention {
            attention::run(&mut bench)?;
            continue;
        }
        let decoder = match decoder.take() {
            Some(known) => decoder.insert(known),
            None => decoder.insert(bench.decoder()?),
        };
        match part {
            Part::Decode => decode::run(&mut bench, decoder)?,
            Part::Cartridge => cartridge::run(&mut bench, decoder)?,
            Part::Capacity => capacity::run(&mut bench, decoder)?,
            Part::Attention | Part::Train => train::run(&mut bench, decoder)?,
        }
    }
    Ok(bench.figures)
}

/// What all parts have in common.
struct Bench<'a> {
    plan: &'a ShapePlan,
    lengths: Lengths,
    costs: Costs,
    roofs: Roofs,
    device: String,
    figures: usize,
    sink: &'a mut dyn FnMut(&Row) -> Result<(), BenchError>,
}

/// What a row is about, before anything is measured.
struct Case {
    what: &'static str,
    name: String,
    work: Work,
    /// Tokens computed in a run, and sequences in it, where that means something.
    tokens: Option<usize>,
    sequences: Option<usize>,
    note: String,
}

/// What is known once it is.
#[derive(Default)]
struct Beside {
    ratio: Option<f64>,
    ratio_predicted: Option<f64>,
    peak: Option<u64>,
}

impl<'a> Bench<'a> {
    fn new(
        plan: &'a ShapePlan,
        sink: &'a mut dyn FnMut(&Row) -> Result<(), BenchError>,
    ) -> Result<Self, BenchError> {
        let Placement { device, dtype } = &plan.placement;
        let roof = |times: Result<(Work, Times), Unmeasured>| {
            times.map_err(|e| BenchError::Plan(format!("the device cannot be measured: {e}")))
        };
        let (copied, copy) = roof(roofs::copy(device, plan.roofs, &plan.timing))?;
        let (computed, product) = roof(roofs::product(&plan.placement, plan.roofs, &plan.timing))?;
        let roofs = Roofs {
            bytes_per_s: copied.bytes as f64 / copy.median,
            flops_per_s: computed.flops as f64 / product.median,
        };
        let mut bench = Self {
            plan,
            lengths: Lengths::scaled(plan.scale),
            costs: Costs::new(&plan.config, *dtype),
            roofs,
            device: memory::device_name(device),
            figures: 0,
            sink,
        };
        for (name, work, times) in [
            ("copy".to_owned(), copied, copy),
            (format!("product side={}", plan.roofs.product), computed, product),
        ] {
            let case = Case {
                what: "roof",
                name,
                work,
                tokens: None,
                sequences: None,
                note: String::new(),
            };
            bench.row(case, &Ok(times), Beside::default())?;
        }
        Ok(bench)
    }

    fn decoder(&self) -> Result<Decoder, BenchError> {
        let placement = &self.plan.placement;
        measure::check_memory(&placement.device, self.costs.weight_bytes()).map_err(|reason| {
            BenchError::Plan(format!(
                "the weights of {} do not fit: {reason}; --layers N measures its first N layers",
                self.plan.shape
            ))
        })?;
        Ok(crate::model::random(self.plan.config.clone(), placement, SEED)?)
    }

    /// Measures one case and shows it. Its median, if it could be measured.
    fn measure(
        &mut self,
        case: Case,
        f: impl FnOnce(&candle_core::Device, &Timing) -> Result<Times, Unmeasured>,
    ) -> Result<Option<f64>, BenchError> {
        let times = f(&self.plan.placement.device, &self.plan.timing);
        self.row(case, &times, Beside::default())
    }

    fn row(
        &mut self,
        case: Case,
        times: &Result<Times, Unmeasured>,
        beside: Beside,
    ) -> Result<Option<f64>, BenchError> {
        let Case { what, name, work, tokens, sequences, mut note } = case;
        if let Err(reason) = times {
            let also = if note.is_empty() { "" } else { "; " };
            note = format!("not measured: {reason}{also}{note}");
        }
        let times = times.as_ref().ok();
        let ms = |seconds: f64| seconds * 1e3;
        let per_s = |amount: f64| times.map(|times| amount / times.median);
        let (predicted, bound) = match what {
            "roof" => (None, None),
            _ => {
                let (seconds, bound) = self.roofs.shortest(work);
                (Some(seconds), Some(bound))
            }
        };
        let row = Row {
            device: self.device.clone(),
            dtype: self.plan.placement.dtype.as_str().to_owned(),
            shape: self.plan.shape.clone(),
            layers: self.plan.config.layers,
            of_layers: self.plan.of_layers,
            scale: self.plan.scale,
            heads: self.plan.config.heads,
            kv_heads: self.plan.config.kv_heads,
            head_dim: self.plan.config.head_dim,
            what,
            case: name,
            predicted_ms: predicted.map(ms),
            measured_ms: times.map(|times| ms(times.median)),
            min_ms: times.map(|times| ms(times.min)),
            max_ms: times.map(|times| ms(times.max)),
            runs: times.map(|times| times.runs),
            bytes: work.bytes,
            flops: work.flops,
            bound,
            roof_fraction: predicted.zip(times).map(|(predicted, times)| predicted / times.median),
            gb_per_s: per_s(work.bytes as f64 / 1e9),
            tflop_per_s: per_s(work.flops as f64 / 1e12),
            sequences,
            tokens_per_s: tokens.and_then(|tokens| per_s(tokens as f64)),
            ratio: beside.ratio,
            ratio_predicted: beside.ratio_predicted,
            peak_mib: beside.peak.map(|bytes| bytes as f64 / f64::from(1 << 20)),
            note,
        };
        (self.sink)(&row)?;
        self.figures += usize::from(times.is_some());
        Ok(times.map(|times| times.median))
    }
}
