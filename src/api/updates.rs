//! The updates of all prompts of one HTTP request, merged, and the life of the request around them:
//! dropping [`Updates`] (the client went away) cancels everything that still runs in the engine.

use std::{
    task::{Context, Poll},
    time::Instant,
};

use tokio::{sync::mpsc, task::JoinSet};

use super::{
    error::ApiError,
    generate::{Assembly, Update},
    metrics,
};
use crate::engine::{EngineError, TokenStream};

/// Updates that may wait for a slow client before its request stops reading from the engine.
const WAITING_UPDATES: usize = 64;

type Item = (usize, Result<Update, EngineError>);

/// How a request ended, for its metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Finished,
    Failed,
    Cancelled,
}

/// Updates of several prompts, each in order, in the order they come.
pub struct Updates {
    receiver: mpsc::Receiver<Item>,
    /// Aborted when dropped, which drops the engine streams and so cancels their requests.
    _readers: JoinSet<()>,
    started: Instant,
    first_token: bool,
    outcome: Outcome,
}

impl Updates {
    /// Starts to read. `started`: when the request arrived, for the time to the first token.
    pub fn new(streams: Vec<(TokenStream, Assembly)>, started: Instant) -> Self {
        let (sender, receiver) = mpsc::channel(WAITING_UPDATES);
        let mut readers = JoinSet::new();
        for (prompt, (stream, assembly)) in streams.into_iter().enumerate() {
            readers.spawn(read(prompt, stream, assembly, sender.clone()));
        }
        Self {
            receiver,
            _readers: readers,
            started,
            first_token: false,
            outcome: Outcome::Cancelled,
        }
    }

    /// Updates that were made beforehand.
    #[cfg(test)]
    pub fn of(items: Vec<Result<Update, EngineError>>) -> Self {
        let (sender, receiver) = mpsc::channel(items.len().max(1));
        for item in items {
            sender.try_send((0, item)).unwrap();
        }
        Self {
            receiver,
            _readers: JoinSet::new(),
            started: Instant::now(),
            first_token: false,
            outcome: Outcome::Cancelled,
        }
    }

    /// The next update and the index of its prompt; `None` when every choice has finished.
    pub async fn next(&mut self) -> Option<(usize, Result<Update, ApiError>)> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// [`Self::next`] for streams.
    pub fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<(usize, Result<Update, ApiError>)>> {
        let item = std::task::ready!(self.receiver.poll_recv(cx));
        match &item {
            None if self.outcome == Outcome::Cancelled => self.outcome = Outcome::Finished,
            Some((_, Err(_))) => self.outcome = Outcome::Failed,
            Some((_, Ok(Update::Delta { token: Some(_), .. }))) if !self.first_token => {
                self.first_token = true;
                metrics::time_to_first_token(self.started.elapsed());
            }
            _ => {}
        }
        Poll::Ready(item.map(|(prompt, update)| (prompt, update.map_err(ApiError::from))))
    }
}

impl Drop for Updates {
    fn drop(&mut self) {
        let outcome = match self.outcome {
            Outcome::Finished => "finished",
            Outcome::Failed => "failed",
            Outcome::Cancelled => "cancelled",
        };
        metrics::generation_ended(outcome, self.started.elapsed());
    }
}

async fn read(
    prompt: usize,
    mut stream: TokenStream,
    mut assembly: Assembly,
    sender: mpsc::Sender<Item>,
) {
    while !assembly.is_done() {
        let update = match stream.next().await {
            Some(event) => assembly.on_event(event),
            None => Err(EngineError::Internal("the token stream ended early".to_owned())),
        };
        let update = match update {
            Ok(None) => continue,
            Ok(Some(update)) => Ok(update),
            Err(error) => Err(error),
        };
        if let Ok(Update::Delta { choice, token: Some(_), finish: Some(_), .. }) = &update {
            stream.cancel_choice(*choice);
        }
        let failed = update.is_err();
        if sender.send((prompt, update)).await.is_err() || failed {
            return;
        }
    }
}
