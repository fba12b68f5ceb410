//! Forward and backward of the packs of a run, without the optimiser: tokens per second, peak memory.
//!
//! Prints `tokens_per_s,peak_mib,peak_over_start_mib` as scripts/bench_train.py reads it.

use std::path::PathBuf;
use std::time::Instant;

use candle_core::{Device, Tensor};
use cartouche::model::{self, LoadOptions, ModelSource};
use cartouche::train::{PrefixLayer, RunDir, StepOptions, gradients};
use clap::Parser;

#[derive(Parser)]
struct Args {
    /// Folder of a run of `cartouche train`, whose packs are taken.
    #[arg(long)]
    run_dir: PathBuf,
    #[arg(long, default_value = "demo")]
    model: String,
    /// Tokens of the cartridge.
    #[arg(long, default_value_t = 46)]
    tokens: usize,
    #[arg(long, default_value_t = 4)]
    packs: usize,
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    #[arg(long)]
    recompute: bool,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    // SAFETY: no other thread has started yet.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", args.threads.to_string()) };
    cartouche::train::keep_freed_memory();
    let source: ModelSource = args.model.parse()?;
    let decoder = model::load(&source, &LoadOptions::default())?.decoder;
    let mut packs = RunDir::open(&args.run_dir, 0)?.packs().read()?;
    packs.truncate(args.packs);
    let shape = decoder.config().kv_shape();
    let tensor =
        || Tensor::randn(0f32, 1f32, (shape.kv_heads, args.tokens, shape.head_dim), &Device::Cpu);
    let prefix = (0..shape.layers)
        .map(|_| Ok(PrefixLayer { keys: tensor()?, values: tensor()? }))
        .collect::<candle_core::Result<Vec<_>>>()?;
    let options = StepOptions { recompute: args.recompute, ..StepOptions::default() };
    let before = resident("VmRSS")?;
    gradients(&decoder, &prefix, &packs[0], &options)?;
    let mut times = Vec::new();
    for _ in 0..args.repeat {
        let start = Instant::now();
        for pack in &packs {
            gradients(&decoder, &prefix, pack, &options)?;
        }
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let tokens: usize = packs.iter().map(|pack| pack.tokens.len()).sum();
    let peak = resident("VmHWM")?;
    println!("{:.1},{peak:.0},{:.0}", tokens as f64 / times[times.len() / 2], peak - before);
    Ok(())
}

/// MiB, from `/proc/self/status`.
fn resident(field: &str) -> Result<f64, Box<dyn std::error::Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field)).ok_or("no such field")?;
    let kib: f64 = line.split_whitespace().nth(1).ok_or("no number")?.parse()?;
    Ok(kib / 1024.0)
}
