//! Server-sent events: updates become chunks as they come. A stream ends with the finish of every choice
//! and `[DONE]`, or with an error event and no `[DONE]`, or because the client went away.
//!
//! Events are written straight into the bytes that are sent; those that are there at the same time go out
//! together. Nothing is asked of the engine before the connection asks for more.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::header::{CACHE_CONTROL, CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use tokio::time::{Instant, Sleep};
use tokio_stream::Stream;

use super::{error::ApiError, generate::Update, updates::Updates};
use crate::limits;

/// Comments are sent this often while nothing else is, so that proxies keep a waiting request open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Turns the updates of one route into its chunks.
pub trait Encoder: Send + Unpin + 'static {
    /// Chunks of one update.
    fn update(&mut self, prompt: usize, update: Update, events: &mut Events);
    /// Chunks after the last update.
    fn finish(&mut self, events: &mut Events);
}

/// Events in the form they are sent in.
#[derive(Debug, Default)]
pub struct Events(Vec<u8>);

impl Events {
    /// One event with a JSON text, which has no line breaks.
    pub fn json(&mut self, value: &impl Serialize) {
        let start = self.0.len();
        self.0.extend_from_slice(b"data: ");
        match serde_json::to_writer(&mut self.0, value) {
            Ok(()) => self.0.extend_from_slice(b"\n\n"),
            // None of our types fails; half an event must not be sent.
            Err(_) => self.0.truncate(start),
        }
    }

    fn done(&mut self) {
        self.0.extend_from_slice(b"data: [DONE]\n\n");
    }
}

/// The response of a streamed request.
pub fn respond<E: Encoder>(updates: Updates, encoder: E) -> Response {
    let chunks = Chunks {
        updates: Some(updates),
        encoder,
        size: 0,
        sent: Instant::now(),
        keep_alive: Box::pin(tokio::time::sleep(KEEP_ALIVE)),
    };
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-cache")];
    (headers, Body::from_stream(chunks)).into_response()
}

struct Chunks<E> {
    /// `None` after the end.
    updates: Option<Updates>,
    encoder: E,
    /// Bytes of the last write: the next is likely as large.
    size: usize,
    sent: Instant,
    keep_alive: Pin<Box<Sleep>>,
}

impl<E: Encoder> Chunks<E> {
    /// Everything that is there to be sent, up to what one write should hold.
    fn take(&mut self, cx: &mut Context<'_>) -> Events {
        let mut events = Events::default();
        while let Some(updates) = &mut self.updates
            && events.0.len() < limits::STREAM_WRITE_BYTES
        {
            let Poll::Ready(item) = updates.poll_next(cx) else { break };
            if events.0.is_empty() {
                events.0.reserve(self.size);
            }
            match item {
                Some(Ok((prompt, update))) => self.encoder.update(prompt, update, &mut events),
                Some(Err(error)) => self.end(&mut events, Some(&error)),
                None => self.end(&mut events, None),
            }
        }
        events
    }

    fn end(&mut self, events: &mut Events, error: Option<&ApiError>) {
        match error {
            Some(error) => events.json(&error.body()),
            None => {
                self.encoder.finish(events);
                events.done();
            }
        }
        self.updates = None;
    }

    /// Whether nothing was sent for so long that a comment is due. The timer is set when it fires, not at
    /// every event.
    fn is_quiet(&mut self, cx: &mut Context<'_>) -> bool {
        while self.keep_alive.as_mut().poll(cx).is_ready() {
            let due = self.sent + KEEP_ALIVE;
            let now = Instant::now();
            let quiet = now >= due;
            self.keep_alive.as_mut().reset(if quiet { now + KEEP_ALIVE } else { due });
            if quiet {
                return true;
            }
        }
        false
    }
}

impl<E: Encoder> Stream for Chunks<E> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.updates.is_none() {
            return Poll::Ready(None);
        }
        let events = this.take(cx).0;
        let bytes = if !events.is_empty() {
            this.size = events.len();
            Bytes::from(events)
        } else if this.updates.is_none() {
            return Poll::Ready(None);
        } else if this.is_quiet(cx) {
            Bytes::from_static(b":\n\n")
        } else {
            return Poll::Pending;
        };
        this.sent = Instant::now();
        Poll::Ready(Some(Ok(bytes)))
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;
    use crate::engine::EngineError;

    struct Plain;

    impl Encoder for Plain {
        fn update(&mut self, _: usize, update: Update, events: &mut Events) {
            if let Update::Delta { text, .. } = update {
                events.json(&text);
            }
        }

        fn finish(&mut self, events: &mut Events) {
            events.json(&"end");
        }
    }

    fn body(items: Vec<Result<Update, EngineError>>) -> Body {
        respond(Updates::of(items), Plain).into_body()
    }

    /// The `data:` lines of a stream over these updates.
    async fn events(items: Vec<Result<Update, EngineError>>) -> Vec<String> {
        let bytes = body(items).collect().await.unwrap().to_bytes();
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
        assert_eq!(events[0], "\"a\"");
        let error: serde_json::Value = serde_json::from_str(&events[1]).unwrap();
        assert_eq!(error["error"]["code"], "non_finite_logits");
        assert_eq!(error["detail"], error["error"]["message"]);
    }

    #[tokio::test]
    async fn a_complete_stream_ends_with_done() {
        let events = events(vec![delta("a\nb"), delta("c")]).await;
        assert_eq!(events, [r#""a\nb""#, "\"c\"", "\"end\"", "[DONE]"]);
    }

    #[tokio::test]
    async fn what_is_there_together_is_sent_together_within_a_bound() {
        let few = body(vec![delta("a"), delta("b")]).frame().await.unwrap().unwrap();
        let few = few.into_data().unwrap();
        assert_eq!(&few[..], b"data: \"a\"\n\ndata: \"b\"\n\ndata: \"end\"\n\ndata: [DONE]\n\n");
        let long = "x".repeat(limits::STREAM_WRITE_BYTES / 4);
        let mut many = body((0..40).map(|_| delta(&long)).collect());
        let mut frames = 0;
        while let Some(frame) = many.frame().await {
            assert!(frame.unwrap().into_data().unwrap().len() < 2 * limits::STREAM_WRITE_BYTES);
            frames += 1;
        }
        assert!(frames >= 8, "{frames}");
    }
}
