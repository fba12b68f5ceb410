//! Every limit on what a client or a file can make grow, in one place.
//!
//! Each constant says its unit and what the caller is told when it is passed. Values that an operator
//! may want to change are defaults of the configuration and are named in `cartouche serve --help`.

use std::borrow::Cow;

/// Bytes of one HTTP request body; larger is answered with 413.
pub const MAX_BODY_BYTES: usize = 8 << 20;
/// Bytes of a body that is parsed on the async threads; a larger one goes to a thread of its own.
pub const MAX_INLINE_BODY_BYTES: usize = 64 << 10;
/// Values (list items, members, opened lists and objects) in one body; more is a 400. A value in memory
/// takes many times the two bytes it may have in JSON.
pub const MAX_JSON_VALUES: usize = 1 << 20;
/// Lists and objects inside each other in one body; more is a 400. The JSON parser's own limit, which holds only
/// for what is read.
pub const MAX_JSON_DEPTH: usize = 127;
/// Bytes of an error's message and of its `param`, which repeat what the client sent; the rest is cut.
pub const MAX_ERROR_TEXT_BYTES: usize = 1024;

/// At most [`MAX_ERROR_TEXT_BYTES`] of a text that repeats what a client or a file said, and a sign that more
/// followed.
pub fn clip(text: &str) -> Cow<'_, str> {
    if text.len() <= MAX_ERROR_TEXT_BYTES {
        return Cow::Borrowed(text);
    }
    let room = MAX_ERROR_TEXT_BYTES - "…".len();
    let end = (0..=room).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    Cow::Owned(format!("{}…", &text[..end]))
}

/// Bytes of a response header that repeats what the client sent; the rest is cut.
pub const MAX_ECHO_HEADER_BYTES: usize = 2048;
/// Choices (`n`) per request; more is a 400 that names `n`.
pub const MAX_CHOICES: usize = 64;
/// Stop strings per request; more is a 400 that names `stop`.
pub const MAX_STOP_STRINGS: usize = 16;
/// Bytes of one stop string; longer is a 400 that names `stop`.
pub const MAX_STOP_BYTES: usize = 1024;
/// Alternatives per position in `top_logprobs` / `logprobs` / `prompt_logprobs`, unless configured.
pub const DEFAULT_MAX_TOP_LOGPROBS: usize = 64;
/// Entries of `logit_bias`; more is a 400 that names it.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Cartridges one request may attach; more is a 400 that names `cartridges`.
pub const MAX_CARTRIDGES_PER_REQUEST: usize = 16;
/// Bytes of a cartridge id; longer is a 400 that names it.
pub const MAX_CARTRIDGE_ID_BYTES: usize = 512;
/// Messages in a chat request; more is a 400 that names `messages`.
pub const MAX_MESSAGES: usize = 4096;
/// Prompts in one completions request (a list of strings or of token lists).
pub const MAX_PROMPTS: usize = 256;
/// Sequences (choices of requests) waiting for the engine; a request over it is answered with 429.
pub const DEFAULT_MAX_QUEUED_SEQUENCES: usize = 1024;
/// Prompt tokens (times `n`) waiting for the engine; a request over it is answered with 429, unless nobody
/// else waits.
pub const DEFAULT_MAX_QUEUED_TOKENS: usize = 1 << 20;
/// Events (mostly tokens, of all choices together) one request may leave unread; past it the reader is too
/// slow and its request is ended with an error.
pub const DEFAULT_MAX_UNREAD_EVENTS: usize = 16_384;
/// Sequences (choices) decoded in one step.
pub const DEFAULT_MAX_RUNNING_SEQUENCES: usize = 64;
/// Prompt tokens prefilled in one step, over all sequences.
pub const DEFAULT_PREFILL_TOKENS_PER_STEP: usize = 512;
/// Fuel of one chat-template rendering (template instructions); past it the render is an error.
pub const CHAT_TEMPLATE_FUEL: u64 = 5_000_000;
/// Loops, blocks and macro calls of a chat template inside of one another; past it the render is an error. The
/// engine's own limit, 500, is more than a thread's stack holds.
pub const CHAT_TEMPLATE_DEPTH: usize = 100;
/// Bytes of one rendered prompt text.
pub const MAX_RENDERED_PROMPT_BYTES: usize = 64 << 20;

/// Bytes of a cartridge file, unless configured.
pub const DEFAULT_MAX_CARTRIDGE_FILE_BYTES: u64 = 8 << 30;
/// Bytes of `data.pkl` inside a `.pt` file.
pub const MAX_PICKLE_BYTES: u64 = 16 << 20;
/// Values a pickle may build (stack, memo and containers together).
pub const MAX_PICKLE_OBJECTS: usize = 1_000_000;
/// Records in the zip directory of a `.pt` file.
pub const MAX_ZIP_RECORDS: usize = 65_536;
/// Bytes of the zip directory of a `.pt` file; torch writes about a hundred for a tensor.
pub const MAX_ZIP_DIRECTORY_BYTES: u64 = 16 << 20;
/// Layers of a cartridge.
pub const MAX_CARTRIDGE_LAYERS: usize = 1024;
/// Bytes of a cartridge file beyond the numbers the budget has room for: headers, other entries.
pub const CARTRIDGE_FILE_SLACK_BYTES: u64 = 64 << 20;
/// Tokens of a cartridge.
pub const MAX_CARTRIDGE_TOKENS: usize = 1 << 22;
/// Bytes of a `config.yaml` beside a cartridge; a larger one is ignored with a warning (it is advisory).
pub const MAX_CONFIG_YAML_BYTES: u64 = 64 << 10;
/// Lists and maps opened by `[` or `{` in such a file, wherever these stand; one of more is ignored likewise.
pub const MAX_CONFIG_YAML_OPENINGS: usize = 1024;
/// Bytes of what a cartridge file says about its making (`model`, `rope_scaling`, `origin`; each): it stays in
/// memory with the cartridge. More is no cartridge; in a `config.yaml` it is read over.
pub const MAX_CARTRIDGE_FACT_BYTES: usize = 16 << 10;
/// Bytes of resident cartridges kept by the registry, unless configured.
pub const DEFAULT_CARTRIDGE_BUDGET_BYTES: u64 = 2 << 30;
/// Bytes of a request's `model`, which every chunk of a stream repeats; longer is a 400 that names it.
pub const MAX_MODEL_NAME_BYTES: usize = 1024;
/// Choices of one request over all of its prompts (`n` times prompts); more is a 400 that names `n`.
pub const MAX_CHOICES_PER_REQUEST: usize = 1024;
/// Log-probabilities one reply may show (tokens times alternatives, those of a prompt once per choice);
/// more is a 400 that says which fields to lower.
pub const MAX_LOGPROBS_PER_REQUEST: usize = 1 << 20;
/// Bytes of a safetensors header of a cartridge; a longer one is no cartridge.
pub const MAX_SAFETENSORS_HEADER_BYTES: u64 = 4 << 20;
/// Cartridge files read at the same time; further loads wait.
pub const MAX_CONCURRENT_CARTRIDGE_LOADS: usize = 4;
/// Bytes of loaded cartridges after which memory that was freed for them is given back to the system.
pub const GIVE_BACK_AFTER_BYTES: u64 = 128 << 20;
/// Cartridge loads under way or waiting; the next one is answered with 503 and `Retry-After`.
pub const MAX_PENDING_CARTRIDGE_LOADS: usize = 256;
/// Connections served at the same time; further ones wait to be accepted.
pub const MAX_CONNECTIONS: usize = 8192;
/// Seconds a connection may take to send the head of a request, idle time between requests included;
/// then it is closed.
pub const HEADER_READ_SECONDS: u64 = 60;
/// Seconds a client may take to send a whole body; past it the answer is 408.
pub const BODY_READ_SECONDS: u64 = 120;
/// Seconds without progress on a reply that a client could read, unless configured; then its connection is
/// closed, which cancels its request.
pub const DEFAULT_CLIENT_STALL_SECONDS: u64 = 60;
/// Seconds running requests get to finish once the server is told to stop, unless configured; then they are
/// ended with an error.
pub const DEFAULT_DRAIN_SECONDS: u64 = 30;
/// Seconds the last replies get to reach their clients when a drain is over; then connections are cut.
pub const FLUSH_SECONDS: u64 = 3;
/// Bytes of an `X-Request-Id` that is kept; a longer one, or one with other than visible ASCII, is replaced.
pub const MAX_REQUEST_ID_BYTES: usize = 128;
/// Cartridge ids in each list of `vllm:lora_requests_info`; the rest is left out.
pub const MAX_METRIC_CARTRIDGES: usize = 64;
/// Bytes of each of those lists.
pub const MAX_METRIC_CARTRIDGE_BYTES: usize = 4096;
/// Bytes of events put into one write of a stream, about; more wait for the next.
pub const STREAM_WRITE_BYTES: usize = 16 << 10;
/// Seconds a refused client is told to wait at most.
pub const MAX_RETRY_AFTER_SECONDS: u64 = 60;
/// Bytes of one server-sent event, or of one whole reply, that `cartouche bench` reads; more is an error.
pub const MAX_SSE_EVENT_BYTES: usize = 8 << 20;
/// Clients of one level of `cartouche bench`: each holds a connection.
pub const MAX_BENCH_CLIENTS: usize = 16_384;
/// Bytes of a dataset file; a larger one is an error that says to split it.
pub const MAX_DATASET_FILE_BYTES: u64 = 16 << 30;
/// Conversations of one dataset; more is an error.
pub const MAX_DATASET_ROWS: usize = 1 << 22;
/// Bytes of one line of a JSON-lines dataset; a longer one is an error of that row.
pub const MAX_DATASET_LINE_BYTES: usize = 32 << 20;
/// Tokens of one conversation; more is an error of its row.
pub const MAX_ELEMENT_TOKENS: usize = 1 << 20;
/// Tokens of a dataset in memory (4 bytes each); more is an error.
pub const MAX_DATASET_TOKENS: usize = 1 << 28;
/// Target entries of a dataset in memory (12 bytes each); more is an error.
pub const MAX_DATASET_TARGETS: usize = 1 << 29;
/// Conversations of one self-study; more is an error that names it.
pub const MAX_SELF_STUDY_SAMPLES: usize = 1 << 17;
/// Bytes of a file of seed prompts; more is an error that names it.
pub const MAX_SEED_PROMPTS_BYTES: u64 = 1 << 20;
/// Bytes of the footer of a Parquet file.
pub const MAX_PARQUET_FOOTER_BYTES: u64 = 64 << 20;
/// Nodes of the schema of a Parquet file: columns and groups of columns.
pub const MAX_PARQUET_SCHEMA_NODES: usize = 1024;
/// Levels of the schema of a Parquet file, through which the Parquet crate recurses.
pub const MAX_PARQUET_SCHEMA_DEPTH: usize = 32;
/// Bytes of one page header of a Parquet file, which may hold a smallest and a largest text.
pub const MAX_PARQUET_PAGE_HEADER_BYTES: usize = 64 << 10;
/// Values of a Parquet file, whatever its size. Repeated values take next to no room in a file, and some
/// forty bytes each in memory.
pub const MIN_PARQUET_VALUES: u64 = 4 << 20;
/// Values of a Parquet file for each of its bytes, beyond [`MIN_PARQUET_VALUES`].
pub const MAX_PARQUET_VALUES_PER_BYTE: u64 = 16;
/// API keys of one server; every request is compared with all of them. More is an error of the key file.
pub const MAX_API_KEYS: usize = 4096;
/// Bytes of a file of API keys; a larger one is refused.
pub const MAX_KEY_FILE_BYTES: u64 = 1 << 20;
/// Characters of an API key: a shorter one is refused where it is configured, a longer one opens nothing.
pub const MIN_API_KEY_BYTES: usize = 8;
/// See [`MIN_API_KEY_BYTES`].
pub const MAX_API_KEY_BYTES: usize = 512;
/// Bytes of the name of an API key.
pub const MAX_KEY_NAME_BYTES: usize = 128;
/// Patterns in the list of cartridges that one API key may name.
pub const MAX_SCOPE_PATTERNS: usize = 1024;
/// Bytes of a `cache_salt`; longer is a 400 that names it.
pub const MAX_CACHE_SALT_BYTES: usize = 512;
/// Seconds without a byte of an upload; past it the answer is 408 and what came is deleted.
pub const UPLOAD_STALL_SECONDS: u64 = 60;
/// Seconds an upload may take in all: 8 GiB at 20 Mbit/s.
pub const UPLOAD_SECONDS: u64 = 3600;
/// Bytes of an upload gathered before they are written.
pub const UPLOAD_WRITE_BYTES: usize = 1 << 20;
/// Bytes of a text field of an upload (`id`, `expected_generation`, `if_absent`).
pub const MAX_UPLOAD_FIELD_BYTES: usize = 4096;
/// Bytes of an upload as a form that may come without ending a part's head or adding to its content.
pub const MAX_UPLOAD_HEAD_BYTES: usize = 256 << 10;
/// Fetches from one remote source at the same time; further ones of it wait, those of others do not.
pub const MAX_CONCURRENT_FETCHES: usize = 4;
/// Fetches from one remote source under way or waiting; the next one is answered with 503 and `Retry-After`.
pub const MAX_PENDING_FETCHES: usize = 64;
/// Seconds a fetch waits for its turn while others of its source do not end; then those who wait for it are
/// answered with 503.
pub const FETCH_TURN_SECONDS: u64 = 30;
/// Failed fetches that are remembered; past it the one that may be tried again soonest is forgotten.
pub const MAX_REMEMBERED_FETCH_FAILURES: usize = 1024;
/// Ids of which the registry knows when their file was looked at last; past it all are looked at again.
pub const MAX_CHECKED_IDS: usize = 4096;
/// Milliseconds within which a file is not looked at again, unless configured: a file changed by another
/// program is served after that time at the latest.
pub const DEFAULT_REVALIDATE_MILLISECONDS: u64 = 1000;
/// Milliseconds after the start of a fetch in which `force_redownload` joins it; later ones have another
/// fetch follow it.
pub const FORCED_FETCH_JOIN_MILLISECONDS: u64 = 1000;
/// Uploads of cartridges under way; the next one is answered with 503 and `Retry-After`.
pub const MAX_CONCURRENT_UPLOADS: usize = 4;
/// Seconds after which an upload that nobody finished is removed from the cartridge directory.
pub const ABANDONED_UPLOAD_SECONDS: u64 = 24 * 60 * 60;
/// Bytes of host memory for cartridges that had to leave a GPU, unless configured.
pub const DEFAULT_HOST_CACHE_BYTES: u64 = 8 << 30;
/// Bytes of cartridges kept in the disk cache, unless configured; the least recently used leave first.
pub const DEFAULT_CARTRIDGE_CACHE_BYTES: u64 = 64 << 30;
/// Bytes of a record of the disk cache; a larger one counts as absent. It holds a `config.yaml`, escaped.
pub const MAX_CACHE_RECORD_BYTES: u64 = 8 << 20;
/// Seconds after which an interrupted download that nobody resumed, or a temporary file, is removed from
/// the disk cache.
pub const CACHE_LEFTOVER_SECONDS: u64 = 7 * 24 * 3600;
/// Seconds between two notes in the disk cache that a cartridge is in use.
pub const CACHE_USE_SECONDS: u64 = 60;
/// Seconds a process waits for another one that is changing the disk cache; then the load is told to retry.
pub const CACHE_LOCK_SECONDS: u64 = 60;
/// Seconds a source may take to accept a connection (name lookup, TCP, TLS), unless configured.
pub const DEFAULT_SOURCE_CONNECT_SECONDS: u64 = 10;
/// Seconds a source may send nothing, unless configured.
pub const DEFAULT_SOURCE_IDLE_SECONDS: u64 = 30;
/// Seconds one fetch of a cartridge may take in all, retries included, unless configured.
pub const DEFAULT_SOURCE_TOTAL_SECONDS: u64 = 3600;
/// Times one request is sent to a source that fails in passing (429, 5xx, a connection that is cut).
pub const MAX_SOURCE_TRIES: u32 = 5;
/// Milliseconds before the second of them; each further one waits twice as long.
pub const SOURCE_BACK_OFF_MILLIS: u64 = 500;
/// Redirects followed for one request.
pub const MAX_SOURCE_REDIRECTS: usize = 5;
/// Bytes of a reply of a source's API, such as the list of a repository's files.
pub const MAX_SOURCE_REPLY_BYTES: u64 = 16 << 20;
/// Pages of a W&B run's list of files (200 files each).
pub const MAX_WANDB_FILE_PAGES: usize = 50;
