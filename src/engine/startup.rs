//! Starts an engine of given sizes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use super::EngineError;
use super::blocks::{BLOCK_TOKENS, blocks_for};
use super::core::Core;
use super::handle::{EngineHandle, EngineInfo, Shared};
use super::kv_cache::KvCache;
use super::scheduler::SchedulerLimits;
use crate::limits;
use crate::model::Decoder;

/// Sizes of an engine.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Bytes the KV cache may use. Cartridges are not part of it.
    pub kv_bytes: u64,
    pub max_running_sequences: usize,
    pub prefill_tokens_per_step: usize,
    pub max_queued_sequences: usize,
    /// Prompt tokens (times `n`) that may wait. A request that is larger by itself is still taken when
    /// nobody waits.
    pub max_queued_tokens: usize,
    /// Keep the blocks of finished sequences for prompts that begin the same way. Without it only the
    /// choices of one request share blocks, while they run.
    pub prefix_cache: bool,
    /// Events one request, all its choices together, may leave unread before it is cancelled.
    pub max_unread_events: usize,
    /// Sequences that must share a cartridge for attention to read it once for all of them.
    pub group_min_sequences: usize,
    /// Prefill without cartridges and stored tokens by FlashAttention, on a GPU.
    #[cfg(feature = "flash-attn")]
    pub flash_attn: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            kv_bytes: 1 << 30,
            max_running_sequences: limits::DEFAULT_MAX_RUNNING_SEQUENCES,
            prefill_tokens_per_step: limits::DEFAULT_PREFILL_TOKENS_PER_STEP,
            max_queued_sequences: limits::DEFAULT_MAX_QUEUED_SEQUENCES,
            max_queued_tokens: limits::DEFAULT_MAX_QUEUED_TOKENS,
            prefix_cache: true,
            max_unread_events: limits::DEFAULT_MAX_UNREAD_EVENTS,
            group_min_sequences: 2,
            #[cfg(feature = "flash-attn")]
            flash_attn: false,
        }
    }
}

/// Starts the engine thread. It ends when every [`EngineHandle`] is dropped and its work is done; the
/// returned handle waits for that.
pub fn start(
    decoder: Decoder,
    options: &EngineOptions,
) -> Result<(EngineHandle, JoinHandle<()>), EngineError> {
    start_with(decoder, options, |_| {})
}

/// Like [`start`]; `prepare` may change the engine before it runs.
pub(super) fn start_with(
    decoder: Decoder,
    options: &EngineOptions,
    prepare: impl FnOnce(&mut Core) + Send + 'static,
) -> Result<(EngineHandle, JoinHandle<()>), EngineError> {
    let config = decoder.config();
    let shape = config.kv_shape();
    let block_bytes = KvCache::block_bytes(shape, decoder.dtype());
    // More blocks than all running sequences can fill are useful to the prefix cache only.
    let running = options.max_running_sequences.saturating_mul(blocks_for(config.max_positions));
    let useful = if options.prefix_cache { u32::MAX as usize } else { running };
    let blocks = ((options.kv_bytes / block_bytes) as usize).min(useful);
    if blocks == 0 || options.max_running_sequences == 0 || options.prefill_tokens_per_step == 0 {
        return Err(EngineError::InvalidRequest {
            field: "kv_cache_bytes",
            reason: format!(
                "{} bytes hold no block of {BLOCK_TOKENS} tokens ({block_bytes} bytes), or another \
                 engine limit is 0",
                options.kv_bytes
            ),
        });
    }
    let info = Arc::new(EngineInfo {
        max_context: config.max_positions,
        kv_tokens: blocks * BLOCK_TOKENS,
        kv_bytes: blocks as u64 * block_bytes,
        vocab_size: config.vocab_size,
        kv_shape: shape,
        kv_dtype: decoder.dtype(),
        max_queued_sequences: options.max_queued_sequences,
        max_queued_tokens: options.max_queued_tokens,
        prefix_cache: options.prefix_cache,
        max_running_sequences: options.max_running_sequences,
    });
    let shared = Arc::new(Shared::default());
    shared.gauges.total_blocks.store(blocks, Ordering::Relaxed);
    let (submissions, receiver) = std::sync::mpsc::channel();
    let limits = SchedulerLimits {
        max_running: options.max_running_sequences,
        prefill_tokens: options.prefill_tokens_per_step,
    };
    #[cfg_attr(not(feature = "flash-attn"), expect(unused_mut))]
    let mut cache = KvCache::new(shape, blocks, decoder.device(), decoder.dtype())
        .map_err(|e| EngineError::Internal(format!("no memory for the KV cache: {e}")))?;
    #[cfg(feature = "flash-attn")]
    cache.set_flash_attn(options.flash_attn);
    let thread = {
        let (shared, options) = (Arc::clone(&shared), options.clone());
        std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
            let _pool = join_own_pool();
            let mut core = Core::new(decoder, cache, blocks, limits, &options, receiver, shared);
            prepare(&mut core);
            core.run();
        })
    };
    let thread = thread.map_err(|e| EngineError::Internal(format!("no engine thread: {e}")))?;
    Ok((EngineHandle { submissions, info, shared }, thread))
}

/// Makes this thread one of as many computing threads as the process is set to use. Work of a step is then
/// begun here at once, instead of being handed to a pool that has to wake up, with this thread idle.
fn join_own_pool() -> Option<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(rayon::current_num_threads())
        .thread_name(|i| format!("engine-{i}"))
        .use_current_thread()
        .build();
    pool.inspect_err(|error| tracing::warn!(%error, "computing in the shared thread pool")).ok()
}
