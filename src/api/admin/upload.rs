//! Bytes on their way from a connection to a file: a piece at a time, never the whole of it in memory, and
//! not for ever.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::{Body, BodyDataStream, Bytes};
use tokio::time::{Instant, timeout_at};
use tokio_stream::Stream;

use crate::{
    api::{blocking, error::ApiError},
    cartridge::Upload,
    limits,
};

/// The time that an upload has: so much without a byte, and so much in all.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    stall: Duration,
    end: Instant,
}

impl Clock {
    pub fn start() -> Self {
        let end = Instant::now() + Duration::from_secs(limits::UPLOAD_SECONDS);
        Self { stall: Duration::from_secs(limits::UPLOAD_STALL_SECONDS), end }
    }

    /// What comes next, or 408.
    pub async fn wait<T>(&self, next: impl Future<Output = T>) -> Result<T, ApiError> {
        let stalled = Instant::now() + self.stall;
        timeout_at(stalled.min(self.end), next).await.map_err(|_| {
            let (limit, unit) = match stalled < self.end {
                true => (self.stall.as_secs(), "without a byte"),
                false => (limits::UPLOAD_SECONDS, "in all"),
            };
            ApiError::upload_timeout(limit, unit)
        })
    }
}

/// Writes what it is given to the upload, in large pieces and on threads that may block.
pub(super) struct Writer {
    upload: Upload,
    gathered: Vec<u8>,
}

impl Writer {
    pub fn new(upload: Upload) -> Self {
        Self { upload, gathered: Vec::new() }
    }

    pub async fn write(mut self, bytes: &[u8]) -> Result<Self, ApiError> {
        self.gathered.extend_from_slice(bytes);
        if self.gathered.len() < limits::UPLOAD_WRITE_BYTES { Ok(self) } else { self.flush().await }
    }

    /// The upload with everything written.
    pub async fn finish(self) -> Result<Upload, ApiError> {
        Ok(self.flush().await?.upload)
    }

    async fn flush(self) -> Result<Self, ApiError> {
        let Self { mut upload, mut gathered } = self;
        blocking::run(move || {
            upload.append(&gathered).map_err(super::about_id)?;
            gathered.clear();
            Ok(Self { upload, gathered })
        })
        .await
    }
}

/// A body whose reader cannot run ahead of whom it reads for: a multipart reader takes in all that is there
/// before it gives anything out, and looks for the end of a part's head for ever.
pub(super) struct Guarded {
    body: BodyDataStream,
    unread: Unread,
    /// Whether the last poll gave bytes; then the next gives none, so that they are looked at first.
    gave: bool,
}

/// Bytes that came since the reader last gave something out.
#[derive(Clone, Default)]
pub(super) struct Unread(Arc<AtomicUsize>);

impl Unread {
    pub fn none(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

impl Guarded {
    pub fn new(body: Body) -> (Self, Unread) {
        let unread = Unread::default();
        (Self { body: body.into_data_stream(), unread: unread.clone(), gave: false }, unread)
    }
}

impl Stream for Guarded {
    type Item = io::Result<Bytes>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if std::mem::take(&mut this.gave) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let Some(item) = ready!(Pin::new(&mut this.body).poll_next(cx)) else {
            return Poll::Ready(None);
        };
        this.gave = true;
        let bytes = item.map_err(io::Error::other)?;
        let unread = this.unread.0.fetch_add(bytes.len(), Ordering::Relaxed);
        // One piece is as large as the connection makes it.
        if unread > limits::MAX_UPLOAD_HEAD_BYTES {
            return Poll::Ready(Some(Err(io::Error::other("a part's head is too long"))));
        }
        Poll::Ready(Some(Ok(bytes)))
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;

    use super::*;

    /// A reader that takes all that is ready gets one piece at a time.
    #[tokio::test]
    async fn a_reader_cannot_run_ahead() {
        let pieces = (0..5).map(|i| Ok::<_, io::Error>(Bytes::from(vec![i; 3])));
        let (mut guarded, _) = Guarded::new(Body::from_stream(tokio_stream::iter(pieces)));
        let waker = std::task::Waker::noop();
        for i in 0..5 {
            let mut cx = Context::from_waker(waker);
            let Poll::Ready(Some(Ok(bytes))) = Pin::new(&mut guarded).poll_next(&mut cx) else {
                panic!("piece {i} is there");
            };
            assert_eq!(bytes, vec![i; 3]);
            assert!(Pin::new(&mut guarded).poll_next(&mut cx).is_pending());
        }
        assert!(guarded.next().await.is_none());
    }

    #[tokio::test]
    async fn what_is_read_and_leads_to_nothing_has_an_end() {
        let piece = || Ok::<_, io::Error>(Bytes::from(vec![0; limits::MAX_UPLOAD_HEAD_BYTES]));
        let endless = tokio_stream::iter(std::iter::repeat_with(piece));
        let (mut guarded, unread) = Guarded::new(Body::from_stream(endless));
        for _ in 0..10 {
            assert!(guarded.next().await.unwrap().is_ok());
            unread.none();
        }
        assert!(guarded.next().await.unwrap().is_ok());
        assert!(guarded.next().await.unwrap().is_ok());
        assert!(guarded.next().await.unwrap().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_has_so_much_time_between_bytes_and_so_much_in_all() {
        let clock = Clock::start();
        let error = clock.wait(std::future::pending::<()>()).await.unwrap_err();
        assert_eq!((error.status.as_u16(), error.code), (408, Some("body_timeout")));
        let step = Duration::from_secs(limits::UPLOAD_STALL_SECONDS - 1);
        let mut steps = 0;
        while clock.wait(tokio::time::sleep(step)).await.is_ok() {
            steps += 1;
        }
        assert!((steps * step.as_secs()).abs_diff(limits::UPLOAD_SECONDS) < 200, "{steps}");
    }
}
