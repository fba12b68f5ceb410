//! `cartouche bench --shape`: what it counts, what it measures, and what it writes.

#[path = "kernels_support/mod.rs"]
mod kernels_support;

use std::path::Path;
use std::process::{Command, Output};

use candle_core::{DType, Device, Tensor};
use cartouche::bench::shape::{
    self, Costs, Decoding, Holding, Lengths, Packed, Part, RoofSizes, Roofs, Row, ShapePlan,
    Timing, Work, config,
};
use cartouche::model::{ModelConfig, Placement, random};
use serde_json::json;

/// Two layers of 4 query heads on 2.
fn tiny() -> ModelConfig {
    let json = json!({
        "model_type": "qwen3", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": true,
    });
    ModelConfig::from_json(json.to_string().as_bytes(), "tiny").unwrap()
}

fn plan(placement: Placement, parts: &[Part]) -> ShapePlan {
    ShapePlan {
        shape: "tiny".to_owned(),
        config: tiny(),
        of_layers: 3,
        placement,
        parts: parts.to_vec(),
        scale: 64,
        kv_bytes: Some(2_000_000),
        roofs: RoofSizes { copy_bytes: 1 << 16, product: 64 },
        timing: Timing { warmup: 1, least: 1, most: 1, seconds: 0.0 },
    }
}

fn measured(plan: &ShapePlan) -> Vec<Row> {
    let mut rows = Vec::new();
    let figures = shape::run(plan, &mut |row| {
        rows.push(row.clone());
        Ok(())
    });
    let with_time = rows.iter().filter(|row| row.measured_ms.is_some()).count();
    assert_eq!(figures.unwrap(), with_time);
    rows
}

#[test]
fn shapes_have_the_parameters_their_publishers_give() {
    for (name, parameters, kv_token) in [
        ("llama-3.2-1b", 1_235_814_400, 32 << 10),
        ("llama-3.2-3b", 3_212_749_824, 112 << 10),
        ("llama-3.1-8b", 8_030_261_248, 128 << 10),
        ("qwen3-4b", 4_022_468_096, 144 << 10),
    ] {
        let costs = Costs::new(&config(name).unwrap(), DType::BF16);
        assert_eq!(costs.weight_bytes(), 2 * parameters, "{name}");
        assert_eq!(costs.kv_token_bytes(), kv_token, "{name}");
    }
    assert!(config("llama").unwrap_err().to_string().contains("llama-3.1-8b"));
}

#[test]
fn weights_are_counted_as_the_decoder_holds_them() {
    let decoder = random(tiny(), &Placement::default(), 1).unwrap();
    // The decoder does not count its norms: two of each layer, two of its heads, and the last.
    let norms = 2 * (2 * 64 + 2 * 16) + 64;
    let costs = Costs::new(&tiny(), DType::F32);
    assert_eq!(costs.weight_bytes(), decoder.weight_bytes() + 4 * norms);
}

#[test]
fn a_step_moves_weights_logits_and_each_cartridge_once() {
    let costs = Costs::new(&config("llama-3.1-8b").unwrap(), DType::BF16);
    let batch = |cartridges| Decoding { sequences: 64, own: 256, cartridge: 2048, cartridges };
    // 128 KiB a token; 64 sequences read 256 of their own and write one.
    let (shared, each) = (costs.step_attention(batch(1)), costs.step_attention(batch(64)));
    assert_eq!(shared.bytes, 131_072 * (64 * 257 + 2048));
    assert_eq!(each.bytes, 131_072 * (64 * 257 + 64 * 2048));
    // Scores and their product with the values: 4 operations per number of a query and key.
    assert_eq!(shared.flops, 4 * 32 * 4096 * 64 * 2304);
    assert_eq!(each.flops, shared.flops);
    // All weights but the table of embeddings, 525,336,576 numbers; logits in f32 written and read.
    let step = costs.step(batch(1));
    assert_eq!(step.bytes - shared.bytes, 2 * 7_504_924_672 + 4 * 2 * 64 * 128_256);
    // Norms, 65 of 4,096, are no products.
    assert_eq!(step.flops - shared.flops, 2 * 64 * (7_504_924_672 - 65 * 4096));
}

/// Ratios of unshared to shared reading for 64 sequences with 256 tokens of their own, computed elsewhere
/// from the sizes of weights and keys and values alone.
#[test]
fn ceilings_of_sharing_are_those_of_the_design() {
    for (name, tokens, ratio) in [
        ("llama-3.2-1b", 2048, 2.37),
        ("llama-3.2-1b", 8192, 6.16),
        ("llama-3.2-3b", 2048, 2.73),
        ("llama-3.2-3b", 8192, 7.40),
        ("qwen3-4b", 2048, 2.77),
    ] {
        let costs = Costs::new(&config(name).unwrap(), DType::BF16);
        let bytes = |cartridges| {
            let batch = Decoding { sequences: 64, own: 256, cartridge: tokens, cartridges };
            costs.step(batch).bytes as f64
        };
        let counted = bytes(64) / bytes(1);
        assert!((counted / ratio - 1.0).abs() < 0.02, "{name} {tokens}: {counted}");
    }
}

#[test]
fn attention_of_training_counts_the_pairs_that_see_each_other() {
    let costs = Costs::new(&config("llama-3.1-8b").unwrap(), DType::BF16);
    let pack = Packed { sequences: 4, length: 2048, prefix: 2048 };
    assert_eq!(pack.pairs(2048), 4 * (2048 * 2048 + 2048 * 2049 / 2));
    assert_eq!(pack.pairs(1), 4 * (2048 + 2048));
    let forward = costs.packed_forward(pack);
    assert_eq!(forward.flops, 412_383_969_280);
    // Queries and results of 4,096 numbers a token, keys and values of 1,024 each.
    assert_eq!(forward.bytes, 2 * (8192 * (2 * 4096 + 2 * 1024) + 2 * 2048 * 1024));
    let backward = costs.packed_backward(pack);
    assert_eq!(backward.flops, 412_383_969_280 / 2 * 5);
    assert_eq!(backward.bytes, 2 * 8192 * 4 * (4096 + 1024) + 2048 * 2 * 1024 * (2 + 4));
}

/// Row by row, for a model small enough to do so.
#[test]
fn a_training_step_counts_what_it_computes() {
    let costs = Costs::new(&tiny(), DType::F32);
    let (length, targets, sequences, prefix) = (6u64, 2u64, 3u64, 5u64);
    let (hidden, queries, keys, mlp, vocab) = (64, 64, 32, 128, 96);
    let mut multiplies = 0;
    for row in 0..length {
        let chosen = row >= length - targets;
        let seen = prefix + row + 1;
        for layer in 0..2 {
            let (first, last) = (layer == 0, layer == 1);
            let passes = if first { 1 } else { 2 };
            multiplies += passes * hidden * 2 * keys;
            if last && !chosen {
                continue;
            }
            let q_product = hidden * queries;
            let others = q_product + 3 * hidden * mlp;
            multiplies += passes * q_product + 2 * others;
            // Scores and values; back again the scores, gradients of weights, queries, keys and values.
            multiplies += queries * seen * 2;
            multiplies += if first { queries * prefix * 4 } else { queries * seen * 5 };
        }
        if chosen {
            multiplies += 2 * hidden * vocab;
        }
    }
    let pack = Packed { sequences: 3, length: 6, prefix: 5 };
    let work = costs.train_step(pack, 2);
    assert_eq!(work.flops, 2 * sequences * multiplies);
    let weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64 + 2 * 16) + 64 + 64 * 96;
    assert_eq!(work.bytes, 2 * 4 * weights + 2 * 2 * 32 * 5 * (4 + 4 + 4 + 28));
}

#[test]
fn a_prediction_is_under_the_lower_roof() {
    let roofs = Roofs { bytes_per_s: 100.0, flops_per_s: 1000.0 };
    assert_eq!(roofs.shortest(Work { bytes: 50, flops: 10 }), (0.5, "bytes"));
    assert_eq!(roofs.shortest(Work { bytes: 50, flops: 2000 }), (2.0, "flops"));
}

/// Cases in the order in which they are measured, as (what, how many).
fn counts(rows: &[Row]) -> Vec<(&str, usize)> {
    rows.chunk_by(|a, b| a.what == b.what).map(|rows| (rows[0].what, rows.len())).collect()
}

#[test]
fn every_case_is_measured_and_written() {
    let rows = measured(&plan(Placement::default(), &Part::ALL));
    let all = [
        ("roof", 2),
        ("decode", 4),
        ("cartridge", 8),
        ("capacity", 2),
        ("attention", 12),
        ("train", 2),
    ];
    assert_eq!(counts(&rows), all);
    for row in &rows {
        assert!(row.measured_ms.is_some_and(|ms| ms > 0.0), "{row:?}");
        assert_eq!(row.predicted_ms.is_some(), row.what != "roof");
        assert_eq!((row.layers, row.of_layers, row.scale), (2, 3, 64));
    }
    for row in rows.iter().filter(|row| row.predicted_ms.is_some()) {
        let fraction = row.predicted_ms.unwrap() / row.measured_ms.unwrap();
        assert!((row.roof_fraction.unwrap() / fraction - 1.0).abs() < 1e-9);
    }
    let ratios = rows.iter().filter(|row| row.ratio.is_some() && row.ratio_predicted.is_some());
    assert_eq!(ratios.count(), 4 + 1, "of copies to one cartridge, and of cartridges to text");

    let folder = tempfile::tempdir().unwrap();
    shape::write(folder.path(), &rows).unwrap();
    let text = std::fs::read_to_string(folder.path().join("shape.csv")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 31);
    let header = "device,dtype,shape,layers,of_layers,scale,heads,kv_heads,head_dim,what,case,\
                  predicted_ms,measured_ms,min_ms,max_ms,runs,bytes,flops,bound,roof_fraction,\
                  gb_per_s,tflop_per_s,sequences,tokens_per_s,ratio,ratio_predicted,peak_mib,note";
    assert_eq!(lines[0], header);
    let decode = lines.iter().find(|line| line.contains("batch=8 context=16")).unwrap();
    assert!(decode.contains(",f32,tiny,2,3,64,4,2,16,decode,batch=8 context=16,"), "{decode}");
}

#[test]
fn capacity_counts_the_sequences_that_fit() {
    // 2 layers, keys and values of 2 heads of 16 in f32: 512 bytes a token. Scaled by 64 the text has 1,235
    // tokens and the answer 2, together 78 blocks of 16; the cartridge has 32, and a block beside it.
    let costs = Costs::new(&tiny(), DType::F32);
    let Lengths { text, cartridge, answer, .. } = Lengths::scaled(64);
    assert_eq!((text, cartridge, answer), (1235, 32, 2));
    let with_text = Holding { sequence_bytes: 512 * 78 * 16, sequences: 3 };
    let with_cartridge = Holding { sequence_bytes: 512 * (32 + 16), sequences: 81 };
    assert_eq!(shape::holding(&costs, 2_000_000, 0, text + answer), with_text);
    assert_eq!(shape::holding(&costs, 2_000_000, cartridge, answer), with_cartridge);

    let rows = measured(&plan(Placement::default(), &[Part::Capacity]));
    assert_eq!(counts(&rows), [("roof", 2), ("capacity", 2)]);
    assert_eq!((rows[2].sequences, rows[3].sequences), (Some(3), Some(81)));
    let ratio = rows[3].tokens_per_s.unwrap() / rows[2].tokens_per_s.unwrap();
    assert!((rows[3].ratio.unwrap() / ratio - 1.0).abs() < 1e-9);
}

#[test]
fn what_cannot_be_measured_says_why() {
    let mut plan = plan(Placement::default(), &[Part::Capacity]);
    plan.kv_bytes = Some(100_000);
    let rows = measured(&plan);
    let [text, cartridges] = &rows[2..] else { panic!("{rows:?}") };
    assert!(text.note.starts_with("not measured: "), "{}", text.note);
    assert_eq!((text.sequences, text.measured_ms, text.roof_fraction), (Some(0), None, None));
    assert_eq!(cartridges.sequences, Some(4));
    assert!(cartridges.measured_ms.is_some());
    assert_eq!((cartridges.ratio, cartridges.ratio_predicted), (None, None));
}

/// The kernels of a GPU behind the same steps.
#[test]
fn serving_is_measured_on_a_gpu() {
    let mut plan =
        plan(kernels_support::placement(DType::BF16), &[Part::Cartridge, Part::Capacity]);
    (plan.scale, plan.kv_bytes) = (1024, Some(200_000));
    let rows = measured(&plan);
    assert_eq!(counts(&rows), [("roof", 2), ("cartridge", 8), ("capacity", 2)]);
    for row in &rows {
        assert!(row.measured_ms.is_some(), "{row:?}");
        assert_eq!(row.dtype, "bf16");
    }
}

#[test]
fn the_dump_holds_an_attention_and_its_gradients() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("attention.safetensors");
    shape::dump(&path, &tiny(), &Placement::default()).unwrap();
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let numbers = |name: &str| -> Vec<f64> {
        let tensor: &Tensor = &tensors[name];
        tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    let [q, k, v] = ["q", "k", "v"].map(numbers);
    let [prefix_k, prefix_v] = ["prefix_keys", "prefix_values"].map(numbers);
    let ends: Vec<usize> = numbers("cu_seqlens").iter().map(|end| *end as usize).collect();
    let prefix = tensors["prefix_keys"].dim(1).unwrap();
    let (heads, kv_heads, dim) = (4, 2, 16);
    let mut worst = 0f64;
    let out = numbers("out");
    for pair in ends.windows(2) {
        for (row, head) in (pair[0]..pair[1]).flat_map(|row| (0..heads).map(move |h| (row, h))) {
            let kv_head = head / (heads / kv_heads);
            let own = |t: usize| (t * kv_heads + kv_head) * dim;
            let shared = |t: usize| (kv_head * prefix + t) * dim;
            let keys =
                (0..prefix).map(|t| (&prefix_k[shared(t)..][..dim], &prefix_v[shared(t)..][..dim]));
            let keys =
                keys.chain((pair[0]..=row).map(|t| (&k[own(t)..][..dim], &v[own(t)..][..dim])));
            let query = &q[(row * heads + head) * dim..][..dim];
            let (mut sum, mut mean) = (0f64, vec![0f64; dim]);
            for (key, value) in keys {
                let score: f64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                let weight = (score / (dim as f64).sqrt()).exp();
                sum += weight;
                mean.iter_mut().zip(value).for_each(|(mean, v)| *mean += weight * v);
            }
            let got = &out[(row * heads + head) * dim..][..dim];
            let off = got.iter().zip(&mean).map(|(got, mean)| (got - mean / sum).abs());
            worst = off.fold(worst, f64::max);
        }
    }
    assert!(worst < 1e-5, "{worst}");
    for name in ["q", "k", "v", "prefix_keys", "prefix_values", "out"] {
        let grad = &tensors[&format!("grad_{name}")];
        assert_eq!(grad.dims(), tensors[name].dims(), "{name}");
        assert!(numbers(&format!("grad_{name}")).iter().any(|g| g.abs() > 1e-3), "{name}");
    }
}

fn bench(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cartouche"));
    command.args([&["bench"], args].concat()).output().unwrap()
}

#[test]
fn the_command_refuses_what_contradicts_itself() {
    for (args, expected) in [
        (&["--shape", "llama-4"][..], "llama-3.2-1b"),
        (&["--shape", "llama-3.2-1b", "--layers", "17"], "has 16"),
        (&["--shape", "llama-3.2-1b", "--clients", "8"], "--clients"),
        (&["--layers", "2"], "--shape"),
        (&["--shape", "llama-3.2-1b", "--only", "everything"], "capacity"),
    ] {
        let output = bench(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(expected), "{args:?}: {error}");
        assert!(!error.contains("panicked"), "{error}");
    }
}

#[test]
fn the_command_measures_a_named_shape() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (out, dump) = (path("out"), path("attention.safetensors"));
    let args = ["--shape", "llama-3.2-1b", "--layers", "1", "--scale", "512", "--device", "cpu"];
    let rest = ["--only", "attention", "--out", &out, "--dump", &dump];
    let output = bench(&[&args[..], &rest].concat());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("the first 1 of 16 layers"), "{text}");
    assert!(text.contains("all lengths divided by 512"), "{text}");
    assert!(text.contains("all 14 figures measured"), "{text}");
    let csv = std::fs::read_to_string(Path::new(&out).join("shape.csv")).unwrap();
    assert_eq!(csv.lines().count(), 15);
    assert!(Path::new(&dump).exists());
}
