//! The updates of all prompts of one HTTP request, merged. They are taken from the engine only as the reply
//! asks for them: nothing piles up here for a client that reads slowly. Dropping [`Updates`] (the client went
//! away) cancels everything that still runs in the engine.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use futures_util::stream;
use tokio_stream::Stream;
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::{
    error::ApiError,
    generate::{Assembly, Update},
    life::Life,
};
use crate::engine::{EngineError, TokenStream};

type Item = Result<Update, EngineError>;

/// Updates of several prompts, each in order, in the order they come.
pub struct Updates {
    prompts: Vec<Reader>,
    /// The prompt that is asked first, so that each gets its turn.
    turn: usize,
    /// Resolves when the server wants every request to end.
    stopped: Pin<Box<WaitForCancellationFutureOwned>>,
    life: Life,
}

/// The updates of one prompt; `None` after their end.
struct Reader {
    updates: Option<Pin<Box<dyn Stream<Item = Item> + Send>>>,
    /// When each choice had its last token.
    last: Vec<Option<Instant>>,
}

impl Updates {
    pub fn new(streams: Vec<(TokenStream, Assembly)>, life: Life) -> Self {
        let prompts = streams.into_iter().map(|(stream, assembly)| Reader {
            updates: Some(Box::pin(read(stream, assembly))),
            last: Vec::new(),
        });
        let prompts = prompts.collect();
        Self { prompts, turn: 0, stopped: Box::pin(life.ticket().all().stopped()), life }
    }

    /// Updates that were made beforehand.
    #[cfg(test)]
    pub fn of(items: Vec<Item>) -> Self {
        let life = Life::detached();
        let updates: Pin<Box<dyn Stream<Item = Item> + Send>> = Box::pin(tokio_stream::iter(items));
        let prompts = vec![Reader { updates: Some(updates), last: Vec::new() }];
        Self { prompts, turn: 0, stopped: Box::pin(life.ticket().all().stopped()), life }
    }

    /// The next update and the index of its prompt; `None` when every choice has finished. After an error
    /// there is nothing to ask for.
    pub async fn next(&mut self) -> Option<Result<(usize, Update), ApiError>> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// [`Self::next`] for streams.
    pub fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<(usize, Update), ApiError>>> {
        let Poll::Ready(item) = self.poll_prompts(cx) else {
            std::task::ready!(self.stopped.as_mut().poll(cx));
            return Poll::Ready(Some(Err(self.fail(EngineError::ShuttingDown))));
        };
        Poll::Ready(match item {
            None => {
                self.life.finished();
                None
            }
            Some((_, Err(error))) => Some(Err(self.fail(error))),
            Some((prompt, Ok(update))) => {
                self.observe(prompt, &update);
                Some(Ok((prompt, update)))
            }
        })
    }

    /// The next item of any prompt.
    fn poll_prompts(&mut self, cx: &mut Context<'_>) -> Poll<Option<(usize, Item)>> {
        let count = self.prompts.len();
        let mut open = false;
        for prompt in (self.turn..count).chain(0..self.turn.min(count)) {
            let reader = &mut self.prompts[prompt];
            let Some(updates) = &mut reader.updates else { continue };
            match updates.as_mut().poll_next(cx) {
                Poll::Ready(Some(item)) => {
                    self.turn = (prompt + 1) % count;
                    return Poll::Ready(Some((prompt, item)));
                }
                Poll::Ready(None) => reader.updates = None,
                Poll::Pending => open = true,
            }
        }
        if open { Poll::Pending } else { Poll::Ready(None) }
    }

    fn fail(&mut self, error: EngineError) -> ApiError {
        // The other prompts have no reply to go into.
        self.prompts.clear();
        let error = ApiError::from(error);
        self.life.failed(&error);
        error
    }

    fn observe(&mut self, prompt: usize, update: &Update) {
        match update {
            Update::Prompt { cached_tokens, .. } => self.life.prompt_done(*cached_tokens),
            Update::Delta { choice, token, finish, .. } => {
                if token.is_some() {
                    let now = Instant::now();
                    let last = &mut self.prompts[prompt].last;
                    if last.len() <= *choice {
                        last.resize(choice + 1, None);
                    }
                    if let Some(before) = last[*choice].replace(now) {
                        self.life.metrics.inter_token(now.saturating_duration_since(before));
                    }
                    self.life.token(now);
                }
                if let Some(finish) = finish {
                    self.life.metrics.choice_finished(finish.reason);
                }
            }
        }
    }
}

/// Reads one prompt to its end; ends after the first error.
fn read(stream: TokenStream, assembly: Assembly) -> impl Stream<Item = Item> + Send {
    stream::unfold(Some((stream, assembly)), |state| async move {
        let (mut stream, mut assembly) = state?;
        while !assembly.is_done() {
            let update = match stream.next().await {
                Some(event) => assembly.on_event(event),
                None => Err(EngineError::Internal("the token stream ended early".to_owned())),
            };
            let update = match update {
                Ok(None) => continue,
                Ok(Some(update)) => update,
                Err(error) => return Some((Err(error), None)),
            };
            if let Update::Delta { choice, token: Some(_), finish: Some(_), .. } = &update {
                stream.cancel_choice(*choice);
            }
            return Some((Ok(update), Some((stream, assembly))));
        }
        None
    })
}
