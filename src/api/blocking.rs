//! Work that takes its time (large bodies, tokenising, large replies): on threads of its own, as many at once
//! as there are cores, so that neither the async threads nor memory pay for a crowd of large requests.

use std::{sync::LazyLock, thread::available_parallelism};

use tokio::sync::Semaphore;

use super::error::ApiError;

static SLOTS: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new(available_parallelism().map_or(1, usize::from)));

/// Runs `work` on a blocking thread once a slot is free. The slot is held until the work is done, also when
/// nobody waits for it any more: a thread cannot be stopped.
pub async fn run<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let failed = || ApiError::internal("the request could not be processed");
    let slot = SLOTS.acquire().await.map_err(|_| failed())?;
    let work = move || {
        let _slot = slot;
        work()
    };
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(failed()))
}

/// Runs `work` as [`run`] does if it is heavy, and right here if not.
pub async fn run_if<T: Send + 'static>(
    is_heavy: bool,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if is_heavy { run(work).await } else { work() }
}
