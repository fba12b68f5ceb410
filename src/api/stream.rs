//! Server-sent events: updates become chunks as they come. A stream ends with the finish of every choice
//! and `[DONE]`, or with an error event and no `[DONE]`, or because the client went away.

use std::{
    collections::VecDeque,
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::response::{
    IntoResponse, Response,
    sse::{Event, KeepAlive, Sse},
};
use tokio_stream::Stream;

use super::{error::ApiError, generate::Update, updates::Updates};

/// Comments are sent this often while nothing else is, so that proxies keep a waiting request open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Turns the updates of one route into its chunks (each a JSON text).
pub trait Encoder: Send + Unpin + 'static {
    /// Chunks of one update, appended.
    fn update(&mut self, prompt: usize, update: Update, chunks: &mut Vec<String>);
    /// Chunks after the last update.
    fn finish(&mut self, chunks: &mut Vec<String>);
}

/// The response of a streamed request.
pub fn respond<E: Encoder>(updates: Updates, encoder: E) -> Response {
    let chunks = Chunks { updates, encoder, ready: VecDeque::new(), ended: false };
    Sse::new(chunks).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

struct Chunks<E> {
    updates: Updates,
    encoder: E,
    ready: VecDeque<Event>,
    ended: bool,
}

impl<E: Encoder> Chunks<E> {
    fn queue(&mut self, chunks: Vec<String>) {
        self.ready.extend(chunks.into_iter().map(|json| Event::default().data(json)));
    }

    fn on_item(&mut self, item: Option<(usize, Result<Update, ApiError>)>) {
        let mut chunks = Vec::new();
        match item {
            Some((prompt, Ok(update))) => self.encoder.update(prompt, update, &mut chunks),
            Some((_, Err(error))) => {
                chunks.push(error.body().to_string());
                self.ended = true;
            }
            None => {
                self.encoder.finish(&mut chunks);
                chunks.push("[DONE]".to_owned());
                self.ended = true;
            }
        }
        self.queue(chunks);
    }
}

impl<E: Encoder> Stream for Chunks<E> {
    type Item = Result<Event, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Some(event) = this.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            if this.ended {
                return Poll::Ready(None);
            }
            let item = std::task::ready!(this.updates.poll_next(cx));
            this.on_item(item);
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;
    use crate::engine::EngineError;

    struct Plain;

    impl Encoder for Plain {
        fn update(&mut self, _: usize, update: Update, chunks: &mut Vec<String>) {
            if let Update::Delta { text, .. } = update {
                chunks.push(text);
            }
        }

        fn finish(&mut self, chunks: &mut Vec<String>) {
            chunks.push("end".to_owned());
        }
    }

    /// The `data:` lines of a stream over these updates.
    async fn events(items: Vec<Result<Update, EngineError>>) -> Vec<String> {
        let body = respond(Updates::of(items), Plain).into_body();
        let bytes = body.collect().await.unwrap().to_bytes();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        text.lines().filter_map(|l| l.strip_prefix("data: ")).map(str::to_owned).collect()
    }

    fn delta(text: &str) -> Result<Update, EngineError> {
        Ok(Update::Delta { choice: 0, text: text.to_owned(), token: None, finish: None })
    }

    #[tokio::test]
    async fn a_failure_after_the_first_piece_is_an_error_event_and_no_done() {
        let events = events(vec![delta("a"), Err(EngineError::NonFiniteLogits), delta("b")]).await;
        assert_eq!(events.len(), 2, "{events:?}");
        assert_eq!(events[0], "a");
        let error: serde_json::Value = serde_json::from_str(&events[1]).unwrap();
        assert_eq!(error["error"]["code"], "non_finite_logits");
        assert_eq!(error["detail"], error["error"]["message"]);
    }

    #[tokio::test]
    async fn a_complete_stream_ends_with_done() {
        assert_eq!(events(vec![delta("a"), delta("b")]).await, ["a", "b", "end", "[DONE]"]);
    }
}
