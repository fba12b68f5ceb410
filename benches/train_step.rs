//! One training micro-step: tokens per second, forward and backward, and the memory it takes.
//!
//!     cargo bench --bench train_step -- --model demo --tokens 2048 --prefix 128 --recompute

use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use cartouche::model::{ModelSource, Quantize, load_decoder};
use cartouche::train::{
    Pack, PrefixLayer, StepOptions, Targets, evaluate, gradients, keep_freed_memory,
};
use clap::Parser;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value = "demo")]
    model: String,
    /// Tokens of the pack.
    #[arg(long, default_value_t = 2048)]
    tokens: u32,
    /// Sequences they are cut into.
    #[arg(long, default_value_t = 4)]
    sequences: u32,
    /// Tokens of the cartridge.
    #[arg(long, default_value_t = 128)]
    prefix: usize,
    /// Target entries of each trained row.
    #[arg(long, default_value_t = 20)]
    entries: u32,
    /// One row in so many has targets.
    #[arg(long, default_value_t = 2)]
    every: usize,
    #[arg(long)]
    recompute: bool,
    #[arg(long)]
    q8_0: bool,
    /// Let the allocator keep what is freed.
    #[arg(long)]
    keep_memory: bool,
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    if args.keep_memory {
        keep_freed_memory();
    }
    let source: ModelSource = args.model.parse()?;
    let decoder = load_decoder(&source, args.q8_0.then_some(Quantize::Q8_0))?;
    let config = decoder.config();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let vocab = config.vocab_size as u32;
    let mut targets = Targets::default();
    for row in (0..args.tokens).step_by(args.every) {
        for _ in 0..args.entries {
            targets.push(row, rng.random_range(0..vocab), 1.0 / args.entries as f32);
        }
    }
    let pack = Pack {
        tokens: (0..args.tokens).map(|_| rng.random_range(0..vocab)).collect(),
        cu_seqlens: (0..=args.sequences).map(|i| i * args.tokens / args.sequences).collect(),
        targets,
    };
    let shape = (config.kv_heads, args.prefix, config.head_dim);
    let mut random = || -> candle_core::Result<Tensor> {
        let len = shape.0 * shape.1 * shape.2;
        let values = (0..len).map(|_| rng.random_range(-1f32..1.0)).collect();
        Ok(Var::from_vec(values, shape, &Device::Cpu)?.into_inner())
    };
    let prefix: Vec<PrefixLayer> = (0..config.layers)
        .map(|_| Ok(PrefixLayer { keys: random()?, values: random()? }))
        .collect::<candle_core::Result<_>>()?;
    let options = StepOptions { recompute: args.recompute, ..StepOptions::default() };
    println!("pass,tokens,prefix,recompute,seconds,tokens_per_s,loaded_mib,peak_mib");
    let loaded = memory_mib("VmRSS:");
    for pass in ["forward", "step"] {
        for _ in 0..args.repeat {
            let start = Instant::now();
            match pass {
                "forward" => evaluate(&decoder, &prefix, &pack, &options)?.loss,
                _ => gradients(&decoder, &prefix, &pack, &options)?.loss,
            };
            let seconds = start.elapsed().as_secs_f64();
            println!(
                "{pass},{},{},{},{seconds:.3},{:.0},{loaded},{}",
                args.tokens,
                args.prefix,
                args.recompute,
                f64::from(args.tokens) / seconds,
                memory_mib("VmHWM:")
            );
        }
    }
    Ok(())
}

/// A line of `/proc/self/status` in MiB; 0 where there is none.
fn memory_mib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}
