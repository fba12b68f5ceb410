//! Connections: accepting them, timeouts against clients that do not send or do not read, and the drain.
//!
//! `axum::serve` would accept without any of these bounds.

use std::{future::Future, io, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_io_timeout::TimeoutStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::AppState;
use crate::limits;

/// A full file table is waited out for this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Bounds on connections and on the drain.
#[derive(Debug, Clone, Copy)]
pub struct ListenOptions {
    /// A reply that cannot be written for this long ends its connection, which cancels its request.
    pub client_stall: Duration,
    /// Running requests may take this long to finish once a drain begins.
    pub drain: Duration,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self {
            client_stall: Duration::from_secs(limits::DEFAULT_CLIENT_STALL_SECONDS),
            drain: Duration::from_secs(limits::DEFAULT_DRAIN_SECONDS),
        }
    }
}

/// The two ways to stop a server. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    drain: CancellationToken,
    at_once: CancellationToken,
}

impl Shutdown {
    /// Takes no new requests; running ones may finish within the drain time.
    pub fn drain(&self) {
        self.drain.cancel();
    }

    /// Running requests are ended with an error now.
    pub fn at_once(&self) {
        self.at_once.cancel();
        self.drain.cancel();
    }
}

/// Serves until told to stop, then drains: new generation requests are refused with 503 while the health
/// routes still answer, running ones may finish; those that do not finish in time end with an error event or
/// a 503. Returns once their last bytes are sent, or [`limits::FLUSH_SECONDS`] later.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    state: Arc<AppState>,
    options: ListenOptions,
    shutdown: Shutdown,
) {
    let server = Server {
        listener,
        router,
        options,
        places: Arc::new(Semaphore::new(limits::MAX_CONNECTIONS)),
        connections: TaskTracker::new(),
        closing: CancellationToken::new(),
        cut: CancellationToken::new(),
    };
    let work = || async { tokio::join!(server.accept(), state.metrics.keep_up()) };
    tokio::select! {
        _ = work() => {}
        () = shutdown.drain.cancelled() => {}
    }
    state.ready.drain();
    let running = state.in_flight.count();
    tracing::info!(running, seconds = options.drain.as_secs(), "stopping: requests may finish");
    tokio::select! {
        // Probes and clients that have not heard yet get an answer instead of a refused connection.
        _ = work() => {}
        drained = timeout(options.drain, state.in_flight.empty()) => if drained.is_err() {
            let left = state.in_flight.count();
            tracing::warn!(left, "requests were still running after the drain time and are ended");
        },
        () = shutdown.at_once.cancelled() => tracing::warn!("stopping at once"),
    }
    state.in_flight.stop();
    let Server { listener, connections, closing, cut, .. } = server;
    drop(listener);
    closing.cancel();
    connections.close();
    if timeout(Duration::from_secs(limits::FLUSH_SECONDS), connections.wait()).await.is_err() {
        tracing::warn!(left = connections.len(), "clients do not read their last replies");
        cut.cancel();
        connections.wait().await;
    }
}

struct Server {
    listener: TcpListener,
    router: Router,
    options: ListenOptions,
    places: Arc<Semaphore>,
    connections: TaskTracker,
    /// Connections end with the reply they are at.
    closing: CancellationToken,
    /// Connections end.
    cut: CancellationToken,
}

impl Server {
    /// Accepts for ever.
    async fn accept(&self) {
        loop {
            let Ok(place) = Arc::clone(&self.places).acquire_owned().await else { return };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let connection = self.connection(stream, place);
                    self.connections.spawn(connection);
                }
                Err(error) if is_of_the_client(&error) => {}
                Err(error) => {
                    tracing::error!(%error, "no connection can be accepted; trying again");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// One connection to its end.
    fn connection(
        &self,
        stream: TcpStream,
        place: OwnedSemaphorePermit,
    ) -> impl Future<Output = ()> + Send + 'static {
        let service = TowerToHyperService::new(self.router.clone());
        let (closing, cut) = (self.closing.clone(), self.cut.clone());
        let stall = self.options.client_stall;
        async move {
            let _place = place;
            // Tokens are small and late ones are useless: each write goes out at once.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "TCP_NODELAY is not available");
            }
            let mut stream = TimeoutStream::new(stream);
            stream.set_write_timeout(Some(stall));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(limits::HEADER_READ_SECONDS))
                .serve_connection(TokioIo::new(Box::pin(stream)), service);
            let mut connection = std::pin::pin!(connection);
            let ended = tokio::select! {
                ended = &mut connection => ended,
                () = cut.cancelled() => return,
                () = closing.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    tokio::select! {
                        ended = &mut connection => ended,
                        () = cut.cancelled() => return,
                    }
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection ended early");
            }
        }
    }
}

/// Errors of one connection that was gone before it was accepted.
fn is_of_the_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}
