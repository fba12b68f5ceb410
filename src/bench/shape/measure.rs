//! The clock, and why something has no time.

use std::time::Instant;

use candle_core::Device;

use super::memory;
use crate::bench::stats::median;

/// How often something is run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timing {
    /// Runs before the first that counts; fewer where they take longer than `seconds` already.
    pub warmup: usize,
    /// Runs that count.
    pub least: usize,
    pub most: usize,
    /// Beyond the least number of runs it goes on for so long.
    pub seconds: f64,
}

impl Default for Timing {
    fn default() -> Self {
        Self { warmup: 3, least: 3, most: 100, seconds: 1.0 }
    }
}

/// Of the runs that count, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Times {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    pub runs: usize,
}

/// Why there is no figure.
#[derive(Debug, thiserror::Error)]
pub enum Unmeasured {
    #[error("it takes {} of memory, {} are free", gib(*.needed), gib(*.free))]
    Memory { needed: u64, free: u64 },
    #[error("{} of keys and values do not hold one sequence of {}", gib(*.memory), gib(*.sequence))]
    NoSequence { memory: u64, sequence: u64 },
    #[error("what came out is not finite")]
    NotFinite,
    /// What it was to run on could not be made, for the reason of the row before.
    #[error("{0}")]
    Again(String),
    #[error("nothing ran")]
    NoRun,
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    #[error(transparent)]
    Cartridge(#[from] crate::cartridge::CartridgeError),
    #[error(transparent)]
    Train(#[from] crate::train::TrainError),
}

fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

/// The median over several runs of `f`. The device has nothing left to do at every reading of the clock.
pub fn time(
    device: &Device,
    timing: &Timing,
    mut f: impl FnMut() -> Result<(), Unmeasured>,
) -> Result<Times, Unmeasured> {
    let mut run = || {
        device.synchronize()?;
        let start = Instant::now();
        f()?;
        device.synchronize()?;
        Ok::<_, Unmeasured>(start.elapsed().as_secs_f64())
    };
    let mut spent = 0.0;
    for _ in 0..timing.warmup {
        if spent < timing.seconds {
            spent += run()?;
        }
    }
    let mut times: Vec<f64> = Vec::new();
    while times.len() < timing.least
        || times.len() < timing.most && times.iter().sum::<f64>() < timing.seconds
    {
        times.push(run()?);
    }
    let middle = median(times.iter().copied()).ok_or(Unmeasured::NoRun)?;
    let min = times.iter().copied().fold(f64::INFINITY, f64::min);
    let max = times.iter().copied().fold(0.0, f64::max);
    Ok(Times { median: middle, min, max, runs: times.len() })
}

/// Refuses what would not fit into the memory that is free: on the CPU the system would end the process.
pub fn check_memory(device: &Device, needed: u64) -> Result<(), Unmeasured> {
    match memory::free(device) {
        Some(free) if needed > free => Err(Unmeasured::Memory { needed, free }),
        _ => Ok(()),
    }
}
