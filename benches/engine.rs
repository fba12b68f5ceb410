//! The engine loop alone: no HTTP, no text. Prefill and decode tokens per second at several numbers of
//! clients, and what a cartridge costs per step.
//!
//!     cargo bench --bench engine -- --model demo --clients 1,8,32

use std::time::Instant;

use candle_core::{Device, Tensor};
use cartouche::cartridge::{Cartridge, LayerKv, Lease, Provenance};
use cartouche::engine::{
    self, EngineHandle, EngineOptions, Event, GenerateRequest, SamplingParams,
};
use cartouche::model::{self, LoadOptions, ModelSource};
use clap::Parser;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value = "demo")]
    model: String,
    #[arg(long, default_value = "1,8,32", value_delimiter = ',')]
    clients: Vec<usize>,
    #[arg(long, default_value_t = 16)]
    prompt_tokens: usize,
    #[arg(long, default_value_t = 128)]
    output_tokens: usize,
    /// Tokens of a cartridge that all clients share; 0 is none.
    #[arg(long, default_value_t = 0)]
    cartridge_tokens: usize,
    /// Give every client a copy of the cartridge with a content of its own.
    #[arg(long)]
    private: bool,
    /// As of `cartouche serve`; a number above the clients turns grouping off.
    #[arg(long, default_value_t = EngineOptions::default().group_min_sequences)]
    group_min_sequences: usize,
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    #[arg(long, default_value_t = 1024)]
    kv_cache_mib: u64,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let source: ModelSource = args.model.parse()?;
    let loaded = model::load(&source, &LoadOptions::default())?;
    let options = EngineOptions {
        kv_bytes: args.kv_cache_mib << 20,
        max_running_sequences: 1024,
        prefix_cache: false,
        group_min_sequences: args.group_min_sequences,
        ..EngineOptions::default()
    };
    let (engine, _) = engine::start(loaded.decoder, &options)?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    println!(
        "clients,cartridge_tokens,private,group_min,prefill_tokens_per_s,decode_tokens_per_s,step_ms"
    );
    let most = args.clients.iter().copied().max().unwrap_or(1);
    let copies = if args.private { most } else { 1 };
    let cartridges = match args.cartridge_tokens {
        0 => Vec::new(),
        tokens => {
            (0..copies).map(|_| random_cartridge(&engine, tokens)).collect::<Result<Vec<_>, _>>()?
        }
    };
    for &clients in &args.clients {
        let mut runs: Vec<(f64, f64)> =
            (0..args.repeat).map(|_| run(&runtime, &engine, clients, &args, &cartridges)).collect();
        runs.sort_by(|a, b| a.1.total_cmp(&b.1));
        let (prefill, decode) = runs[runs.len() / 2];
        println!(
            "{clients},{},{},{},{prefill:.1},{decode:.1},{:.3}",
            args.cartridge_tokens,
            args.private,
            args.group_min_sequences,
            1e3 * clients as f64 / decode
        );
    }
    Ok(())
}

fn random_cartridge(
    engine: &EngineHandle,
    tokens: usize,
) -> Result<Lease, Box<dyn std::error::Error>> {
    let shape = engine.info().kv_shape;
    let tensor =
        || Tensor::randn(0f32, 1f32, (shape.kv_heads, tokens, shape.head_dim), &Device::Cpu);
    let layers = (0..shape.layers)
        .map(|_| Ok(LayerKv { keys: tensor()?, values: tensor()?, bias: None }))
        .collect::<candle_core::Result<_>>()?;
    Ok(Lease::detached("bench", &Cartridge::new(layers, 0, Provenance::default())?)?)
}

/// Prefill and decode tokens per second of `clients` requests sent together.
fn run(
    runtime: &tokio::runtime::Runtime,
    engine: &EngineHandle,
    clients: usize,
    args: &Args,
    cartridges: &[Lease],
) -> (f64, f64) {
    let vocab = engine.info().vocab_size as u32;
    let started = Instant::now();
    let streams: Vec<_> = (0..clients)
        .map(|client| {
            let token = |i: usize| (i as u32 * 31 + client as u32 * 7) % vocab;
            let request = GenerateRequest {
                prompt: (0..args.prompt_tokens).map(token).collect(),
                cartridges: cartridges
                    .get(client % cartridges.len().max(1))
                    .cloned()
                    .into_iter()
                    .collect(),
                n: 1,
                sampling: SamplingParams {
                    temperature: 0.0,
                    max_tokens: args.output_tokens,
                    ..SamplingParams::default()
                },
                stop_token_ids: Vec::new(),
                logprobs: Default::default(),
                priority: Default::default(),
                cache_salt: None,
            };
            engine.submit(request).expect("the request fits")
        })
        .collect();
    // One thread reads all streams, as a server's runtime would; a thread each would measure the kernel's
    // scheduler.
    let ends = runtime.block_on(futures_util::future::join_all(streams.into_iter().map(
        |mut stream| async move {
            let mut first = None;
            while let Some(event) = stream.next().await {
                match event {
                    Event::Token { .. } if first.is_none() => first = Some(started.elapsed()),
                    Event::Failed(error) => panic!("{error}"),
                    _ => {}
                }
            }
            (first.expect("a token"), started.elapsed())
        },
    )));
    let prefilled = ends.iter().map(|(first, _)| *first).max().expect("a client");
    let ended = ends.iter().map(|(_, end)| *end).max().expect("a client");
    let prefill = (clients * args.prompt_tokens) as f64 / prefilled.as_secs_f64();
    let decoded = clients * (args.output_tokens - 1);
    (prefill, decoded as f64 / (ended - prefilled).as_secs_f64())
}
