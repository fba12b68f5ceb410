//! The generation requests that are being answered: a drain waits for them and then ends those that are
//! left, and `/metrics` shows routers which cartridges they hold.

use std::{
    collections::{BTreeSet, HashMap},
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

use super::error::ApiError;
use crate::{engine::EngineError, limits};

/// All requests in flight. Clones of the `Arc` share it.
#[derive(Debug, Default)]
pub struct InFlight {
    /// Only requests with cartridges.
    cartridges: Mutex<HashMap<u64, Held>>,
    next: AtomicU64,
    requests: TaskTracker,
    stop: CancellationToken,
}

#[derive(Debug)]
struct Held {
    ids: Vec<String>,
    running: bool,
}

/// Held while one request is being answered.
#[derive(Debug)]
pub struct Ticket {
    all: Arc<InFlight>,
    key: u64,
    _counted: TaskTrackerToken,
}

/// Ids of cartridges that requests in flight attend to; cut as [`limits`] says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct CartridgesInUse {
    /// Of requests that have their prompt computed.
    pub running: Vec<String>,
    /// Of requests that have not, and only of those.
    pub waiting: Vec<String>,
}

impl InFlight {
    pub fn enter(self: &Arc<Self>) -> Ticket {
        Ticket {
            all: Arc::clone(self),
            key: self.next.fetch_add(1, Ordering::Relaxed),
            _counted: self.requests.token(),
        }
    }

    /// Requests in flight.
    pub fn count(&self) -> usize {
        self.requests.len()
    }

    /// Waits until no request is in flight. For a server that takes no new ones.
    pub async fn empty(&self) {
        self.requests.close();
        self.requests.wait().await;
    }

    /// Ends every request in flight, and those that still come, with `shutting_down`.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    pub fn is_stopped(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Resolves once requests must end.
    pub fn stopped(&self) -> WaitForCancellationFutureOwned {
        self.stop.clone().cancelled_owned()
    }

    /// The result of `work`, or `shutting_down` when that comes first.
    pub async fn unless_stopped<T>(
        &self,
        work: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        tokio::select! {
            biased;
            result = work => result,
            () = self.stop.cancelled() => Err(EngineError::ShuttingDown.into()),
        }
    }

    /// Which cartridges are in use now.
    pub fn cartridges(&self) -> CartridgesInUse {
        let held = self.lock();
        let ids = |running: bool| -> BTreeSet<&str> {
            let held = held.values().filter(|held| held.running == running);
            held.flat_map(|held| &held.ids).map(String::as_str).collect()
        };
        let running = ids(true);
        let waiting: BTreeSet<&str> = &ids(false) - &running;
        CartridgesInUse { running: capped(running), waiting: capped(waiting) }
    }

    /// Held for a moment, without I/O.
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Held>> {
        self.cartridges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn capped(ids: BTreeSet<&str>) -> Vec<String> {
    let mut room = limits::MAX_METRIC_CARTRIDGE_BYTES;
    let fits = |id: &&str| {
        let fits = id.len() <= room;
        room = room.saturating_sub(id.len());
        fits
    };
    let ids = ids.into_iter().take(limits::MAX_METRIC_CARTRIDGES).take_while(fits);
    ids.map(str::to_owned).collect()
}

impl Ticket {
    /// Says which cartridges the request holds, while it waits.
    pub fn holds(&self, ids: Vec<String>) {
        if !ids.is_empty() {
            self.all.lock().insert(self.key, Held { ids, running: false });
        }
    }

    /// Says that the request waits no longer.
    pub fn runs(&self) {
        if let Some(held) = self.all.lock().get_mut(&self.key) {
            held.running = true;
        }
    }

    pub fn all(&self) -> &InFlight {
        &self.all
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.all.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(list: &[&str]) -> Vec<String> {
        list.iter().map(|&id| id.to_owned()).collect()
    }

    #[test]
    fn cartridges_are_listed_once_and_only_while_they_are_used() {
        let all = Arc::new(InFlight::default());
        let (first, second) = (all.enter(), all.enter());
        first.holds(ids(&["b", "a"]));
        second.holds(ids(&["a", "c"]));
        assert_eq!(all.cartridges().waiting, ["a", "b", "c"]);
        first.runs();
        let both = CartridgesInUse { running: ids(&["a", "b"]), waiting: ids(&["c"]) };
        assert_eq!((all.cartridges(), all.count()), (both, 2));
        drop((first, second));
        assert_eq!((all.cartridges(), all.count()), (CartridgesInUse::default(), 0));
    }

    #[test]
    fn lists_are_cut_by_count_and_by_bytes() {
        let all = Arc::new(InFlight::default());
        let many = all.enter();
        many.holds((0..1000).map(|i| format!("{i:04}")).collect());
        assert_eq!(all.cartridges().waiting.len(), limits::MAX_METRIC_CARTRIDGES);
        drop(many);
        let long = all.enter();
        long.holds((0..50).map(|i| format!("{i:0500}")).collect());
        let listed = all.cartridges().waiting;
        assert!(!listed.is_empty());
        assert!(listed.concat().len() <= limits::MAX_METRIC_CARTRIDGE_BYTES);
    }

    #[tokio::test]
    async fn a_stop_ends_work_and_an_empty_server_is_told() {
        let all = Arc::new(InFlight::default());
        let ticket = all.enter();
        let done = all.unless_stopped(async { Ok(3) }).await;
        assert_eq!(done, Ok(3));
        all.stop();
        let ended = all.unless_stopped(std::future::pending::<Result<(), ApiError>>()).await;
        assert_eq!(ended.unwrap_err().code, Some("shutting_down"));
        assert!(ticket.all().is_stopped());
        drop(ticket);
        all.empty().await;
    }
}
