//! What cartridges do to answers while files change and memory is short: registry and engine together.

mod common;
mod engine_support;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use cartouche::cartridge::*;
use cartouche::engine::{EngineHandle, EngineOptions};
use common::ModelFixture;
use engine_support::{Outcome, collect, greedy, start_engine};
use rand::{RngExt, SeedableRng};

const TOKENS: usize = 20;

struct Served {
    engine: EngineHandle,
    registry: Arc<Registry>,
    shape: KvShape,
    dir: tempfile::TempDir,
}

impl Served {
    /// An engine with a warm prefix cache and a registry with room for `cartridges`.
    fn new(cartridges: u64) -> Self {
        let fixture: ModelFixture = common::model_fixtures(|name| name == "llama").remove(0);
        let options = EngineOptions { kv_bytes: 1 << 20, ..EngineOptions::default() };
        let engine = start_engine(&fixture, &options);
        let info = engine.info();
        let shape = info.kv_shape;
        let bytes = 2 * shape.layers * shape.kv_heads * TOKENS * shape.head_dim * 4;
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::new(RegistryOptions {
            dir: Some(dir.path().to_owned()),
            shape,
            model: "llama".into(),
            rope_theta: None,
            rope_scaling: None,
            max_positions: info.max_context,
            device: Device::Cpu,
            dtype: DType::F32,
            byte_budget: cartridges * bytes as u64,
            host_budget: 0,
            max_file_bytes: 1 << 24,
            revalidate: std::time::Duration::ZERO,
        });
        Self { engine, registry, shape, dir }
    }

    fn cartridge(&self, seed: u64) -> Cartridge {
        let KvShape { layers, kv_heads, head_dim } = self.shape;
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let mut tensor = || {
            let count = kv_heads * TOKENS * head_dim;
            let numbers = (0..count).map(|_| random.random_range(-2f32..2.)).collect::<Vec<_>>();
            Tensor::from_vec(numbers, (kv_heads, TOKENS, head_dim), &Device::Cpu).unwrap()
        };
        let layers =
            (0..layers).map(|_| LayerKv { keys: tensor(), values: tensor(), bias: None }).collect();
        Cartridge::new(layers, 1, Provenance::default()).unwrap()
    }

    /// Replaces the file by rename.
    fn put(&self, id: &str, seed: u64) {
        let path = self.dir.path().join(id).join("cartridge.safetensors");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        write_safetensors(&path, &self.cartridge(seed)).unwrap();
    }

    async fn answer(&self, id: &str, force_redownload: bool) -> Outcome {
        let wanted = CartridgeRef { id: id.into(), source: Source::Local, force_redownload };
        let lease = self.registry.acquire(&wanted).await.unwrap();
        self.answer_with(lease).await
    }

    async fn answer_with(&self, lease: Lease) -> Outcome {
        let mut request = greedy(&(1..40).collect::<Vec<_>>(), 8);
        request.cartridges = vec![lease];
        let stream = self.engine.submit(request).unwrap();
        let mut outcome =
            tokio::task::spawn_blocking(|| collect(stream, 1)).await.unwrap().unwrap();
        outcome.cached_tokens = 0;
        outcome
    }
}

/// Defect 0.5 #1 and row 16: the manager's "loaded" flag outlived the memory, and the next user read what had
/// come to lie there.
#[tokio::test]
async fn an_evicted_cartridge_answers_as_at_its_first_use() {
    let served = Served::new(2);
    let ids: Vec<String> = (0..5).map(|i| format!("c{i}")).collect();
    let mut first = Vec::new();
    for (seed, id) in ids.iter().enumerate() {
        served.put(id, seed as u64);
        first.push(served.answer(id, false).await);
    }
    for (i, a) in first.iter().enumerate() {
        assert!(first[..i].iter().all(|b| a != b), "{i} answers like another one");
    }
    for _ in 0..3 {
        for (id, first) in ids.iter().zip(&first) {
            assert_eq!(&served.answer(id, false).await, first, "{id}");
        }
    }
    assert!(served.registry.stats().evictions >= 15);
}

/// Defects 0.5 #2 and #3, rows 13 and 17, case 5: the new numbers reach the model, whatever prompts were
/// cached with the old ones; who runs with those goes on with them.
#[tokio::test]
async fn a_forced_reload_changes_answers_though_the_prompt_is_cached() {
    let served = Served::new(4);
    served.put("a", 1);
    let local = CartridgeRef { id: "a".into(), source: Source::Local, force_redownload: false };
    let old = served.registry.acquire(&local).await.unwrap();
    let with_old = served.answer("a", false).await;
    assert_eq!(served.answer("a", false).await, with_old);
    served.put("a", 2);
    let with_new = served.answer("a", true).await;
    assert_ne!(with_new, with_old);
    assert_eq!(served.answer("a", false).await, with_new);
    assert_eq!(served.answer_with(old).await, with_old);
    // The old content under another name finds the blocks of the old prompts, and no others.
    served.put("b", 1);
    assert_eq!(served.answer("b", false).await, with_old);
    let fresh = Served::new(4);
    fresh.put("a", 2);
    assert_eq!(fresh.answer("a", false).await, with_new, "as without anything cached");
}
