//! Single flight: one piece of work per name at a time, whose result all that asked share.

use std::{future::Future, sync::Arc, time::Instant};

use dashmap::{DashMap, Entry};
use tokio::sync::watch;

use super::names::NameKey;

/// The work under way, by name. Each piece runs in a task of its own, so that it outlives a caller that
/// gives up.
pub(super) struct Flights<T> {
    under_way: DashMap<NameKey, Flight<T>>,
    limit: usize,
}

#[derive(Clone)]
pub(super) struct Flight<T> {
    pub began: Instant,
    result: watch::Receiver<Option<T>>,
}

impl<T: Clone> Flight<T> {
    /// `None` if the work ended without a result: it panicked, or the process is going away.
    pub async fn wait(mut self) -> Option<T> {
        self.result.wait_for(Option::is_some).await.ok().and_then(|result| result.clone())
    }
}

impl<T: Clone + Send + Sync + 'static> Flights<T> {
    /// At most about `limit` pieces of work at a time.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { under_way: DashMap::new(), limit })
    }

    /// Joins the work on `key`, or starts it (then `true` comes with it). An error is how many pieces are
    /// under way, which is too many for another.
    pub fn join<W>(
        self: &Arc<Self>,
        key: &NameKey,
        work: impl FnOnce() -> W,
    ) -> Result<(Flight<T>, bool), usize>
    where
        W: Future<Output = T> + Send + 'static,
    {
        let count = self.under_way.len();
        match self.under_way.entry(key.clone()) {
            Entry::Occupied(flight) => Ok((flight.get().clone(), false)),
            Entry::Vacant(_) if count >= self.limit => Err(count),
            Entry::Vacant(slot) => {
                let (sender, result) = watch::channel(None);
                let flight = Flight { began: Instant::now(), result };
                slot.insert(flight.clone());
                let landing = Landing { flights: Arc::clone(self), key: key.clone() };
                let work = work();
                tokio::spawn(async move {
                    let result = work.await;
                    drop(landing);
                    sender.send_replace(Some(result));
                });
                Ok((flight, true))
            }
        }
    }
}

/// Ends a flight, however its task ends.
struct Landing<T> {
    flights: Arc<Flights<T>>,
    key: NameKey,
}

impl<T> Drop for Landing<T> {
    fn drop(&mut self) {
        self.flights.under_way.remove(&self.key);
    }
}
