//! Many requests to the engine at once.

use futures_util::stream::{FuturesUnordered, StreamExt};

use super::TrainError;
use crate::engine::{EngineError, EngineHandle, GenerateRequest, TokenStream};

/// Requests on their way at once: enough to fill a step, few enough for any queue.
const IN_FLIGHT: usize = 32;

/// Puts all `requests` to the engine and has `read` make something of each stream. `done` gets it under the
/// request's number as soon as it is there, in no fixed order. Blocks: not for async threads.
pub(super) fn side_by_side<T>(
    engine: &EngineHandle,
    requests: impl IntoIterator<Item = (usize, GenerateRequest)>,
    read: impl AsyncFn(usize, TokenStream) -> Result<T, EngineError>,
    mut done: impl FnMut(usize, T) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.map_err(|e| EngineError::Internal(e.to_string()))?;
    let mut requests = requests.into_iter();
    runtime.block_on(async {
        let read = &read;
        let mut running = FuturesUnordered::new();
        let mut held = None;
        loop {
            while running.len() < IN_FLIGHT {
                let Some((index, request)) = held.take().or_else(|| requests.next()) else { break };
                match engine.submit(GenerateRequest::clone(&request)) {
                    Ok(stream) => running.push(async move { (index, read(index, stream).await) }),
                    // Long prompts fill the queue before there are many of them.
                    Err(EngineError::QueueFull { .. } | EngineError::QueueTokensFull { .. })
                        if !running.is_empty() =>
                    {
                        held = Some((index, request));
                        break;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            match running.next().await {
                None => return Ok(()),
                Some((index, result)) => done(index, result?)?,
            }
        }
    })
}
