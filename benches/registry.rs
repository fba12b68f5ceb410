//! The registry: what a warm use costs, and a cold load against hashing the same file.
//!
//!     cargo bench --bench registry                 # everything
//!     cargo bench --bench registry -- warm         # by name
//!
//! The cold load reads a file that is in the page cache, checks it against the model, hashes it, and lays it
//! out for attention, until it could be lent: bf16 in the file, f32 in memory, as on the CPU. It is compared
//! with `cat FILE | sha256sum` and with reading and hashing in this process; `CARTOUCHE_BENCH_MIB` sets the
//! size of the file (default 256).

use std::{
    fs::File,
    hint::black_box,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Tensor};
use cartouche::cartridge::*;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sha2::{Digest, Sha256};
use tokio::runtime::Runtime;

/// As of Llama-3.2-3B: 112 KiB for each token in bf16.
const SHAPE: KvShape = KvShape { layers: 28, kv_heads: 8, head_dim: 128 };

fn mib() -> usize {
    std::env::var("CARTOUCHE_BENCH_MIB").ok().and_then(|mib| mib.parse().ok()).unwrap_or(256)
}

fn registry(dir: &Path, shape: KvShape) -> Arc<Registry> {
    Registry::new(RegistryOptions {
        dir: Some(dir.to_owned()),
        shape,
        model: "bench".into(),
        rope_theta: None,
        rope_scaling: None,
        max_positions: 1 << 20,
        device: Device::Cpu,
        dtype: DType::F32,
        byte_budget: 8 << 30,
        host_budget: 0,
        max_file_bytes: 8 << 30,
        revalidate: Duration::from_millis(cartouche::limits::DEFAULT_REVALIDATE_MILLISECONDS),
    })
}

fn cartridge(shape: KvShape, tokens: usize) -> Cartridge {
    let dims = (shape.kv_heads, tokens, shape.head_dim);
    let tensor = || {
        let numbers = Tensor::randn(0f32, 1f32, dims, &Device::Cpu).unwrap();
        numbers.to_dtype(DType::BF16).unwrap()
    };
    let layer = || LayerKv { keys: tensor(), values: tensor(), bias: None };
    let layers = (0..shape.layers).map(|_| layer()).collect();
    Cartridge::new(layers, 1, Provenance::default()).unwrap()
}

fn local(id: &str, force_redownload: bool) -> CartridgeRef {
    CartridgeRef { id: id.to_owned(), source: Source::Local, force_redownload }
}

/// Of a resident whose file was looked at a moment ago, which is nearly every use there is.
fn warm(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let shape = KvShape { layers: 2, kv_heads: 2, head_dim: 64 };
    let runtime = Runtime::new().unwrap();
    let mut group = criterion.benchmark_group("warm acquire");
    for residents in [1, 500] {
        let registry = registry(dir.path(), shape);
        let ids: Vec<_> =
            (0..residents).map(|i| local(&format!("org/cartridge-{i}"), false)).collect();
        for r in &ids {
            let path = dir.path().join(format!("{}/cartridge.safetensors", r.id.replace('/', "-")));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            write_safetensors(&path, &cartridge(shape, 16)).unwrap();
        }
        group.bench_function(format!("{residents} residents"), |bencher| {
            bencher.iter_custom(|count| {
                runtime.block_on(async {
                    let started = Instant::now();
                    for i in 0..count as usize {
                        black_box(registry.acquire(&ids[i % ids.len()]).await.unwrap());
                    }
                    started.elapsed()
                })
            })
        });
    }
}

fn cold(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let tokens = (mib() << 20) / (4 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim);
    let made = cartridge(SHAPE, tokens);
    let path = |id: &str, file: &str| -> PathBuf {
        std::fs::create_dir_all(dir.path().join(id)).unwrap();
        dir.path().join(id).join(file)
    };
    let plain = path("safetensors", "cartridge.safetensors");
    write_safetensors(&plain, &made).unwrap();
    let torch = path("torch", "cartridge.pt");
    write_torch(&torch, &made, TorchStyle::default(), Naming::default()).unwrap();
    drop(made);
    let bytes = std::fs::metadata(&plain).unwrap().len();

    let runtime = Runtime::new().unwrap();
    let mut group = criterion.benchmark_group(format!("{} MiB", mib()));
    group.sample_size(10).throughput(Throughput::Bytes(bytes));
    group.bench_function("cat | sha256sum", |bencher| bencher.iter(|| cat_and_hash(&plain)));
    group.bench_function("read and hash", |bencher| bencher.iter(|| read_and_hash(&plain)));
    for id in ["safetensors", "torch"] {
        group.bench_function(format!("cold load, {id}"), |bencher| {
            bencher.iter_custom(|count| {
                let mut total = Duration::ZERO;
                for _ in 0..count {
                    // Nothing but the page cache is warm.
                    let registry = registry(dir.path(), SHAPE);
                    let started = Instant::now();
                    let lease = runtime.block_on(registry.acquire(&local(id, false))).unwrap();
                    total += started.elapsed();
                    drop((lease, registry));
                }
                total
            })
        });
    }
}

fn cat_and_hash(path: &Path) {
    let mut cat = Command::new("cat").arg(path).stdout(Stdio::piped()).spawn().unwrap();
    let hash = Command::new("sha256sum").stdin(cat.stdout.take().unwrap()).output().unwrap();
    assert!(cat.wait().unwrap().success() && hash.status.success());
}

fn read_and_hash(path: &Path) {
    let (mut file, mut hash) = (File::open(path).unwrap(), Sha256::new());
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => break,
            read => hash.update(&buffer[..read]),
        }
    }
    black_box(hash.finalize());
}

criterion_group!(benches, warm, cold);
criterion_main!(benches);
