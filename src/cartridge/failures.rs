//! Remembers for a while which fetches failed, so that a source that cannot deliver is not asked at every
//! request.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::{CartridgeError, names::NameKey};
use crate::limits;

const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

#[derive(Default)]
pub(super) struct Failures {
    remembered: HashMap<NameKey, Failure>,
}

struct Failure {
    error: CartridgeError,
    /// In a row; each doubles the wait.
    count: u32,
    until: Instant,
}

impl Failures {
    /// The last failure, if it is too early for another try.
    pub fn get(&self, key: &NameKey, now: Instant) -> Option<CartridgeError> {
        let failure = self.remembered.get(key).filter(|failure| failure.until > now)?;
        let seconds = (failure.until - now).as_secs_f32().ceil();
        let note = format!(
            " (remembered: the source is asked again in {seconds} s, or at once with force_redownload)"
        );
        Some(failure.error.clone().with_note(&note))
    }

    /// A fetch ended.
    pub fn record(&mut self, key: &NameKey, result: &Result<(), CartridgeError>, now: Instant) {
        match result {
            Ok(()) => drop(self.remembered.remove(key)),
            // The source was not at fault, or was not asked.
            Err(CartridgeError::Busy { .. }) => {}
            Err(error) => self.remember(key, error, now),
        }
    }

    fn remember(&mut self, key: &NameKey, error: &CartridgeError, now: Instant) {
        let count = self.remembered.get(key).map_or(1, |failure| failure.count.saturating_add(1));
        if count == 1 && self.remembered.len() >= limits::MAX_REMEMBERED_FETCH_FAILURES {
            // What may be asked again soonest says least.
            let soonest = self.remembered.iter().min_by_key(|(_, failure)| failure.until);
            if let Some(key) = soonest.map(|(key, _)| key.clone()) {
                self.remembered.remove(&key);
            }
        }
        let doublings = (count - 1).min(LONGEST_WAIT.as_secs().ilog2() + 1);
        let wait = (FIRST_WAIT * 2u32.pow(doublings)).min(LONGEST_WAIT);
        let failure = Failure { error: error.clone(), count, until: now + wait };
        self.remembered.insert(key.clone(), failure);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Source;
    use super::*;

    fn failed() -> Result<(), CartridgeError> {
        Err(CartridgeError::NotFound { id: "a".into(), hint: "no such repository".into() })
    }

    fn key(name: usize) -> NameKey {
        NameKey { place: Source::Huggingface, name: name.to_string() }
    }

    #[test]
    fn waits_double_up_to_a_minute_and_a_success_forgets() {
        let (mut failures, mut now) = (Failures::default(), Instant::now());
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60, 60] {
            failures.record(&key(0), &failed(), now);
            let early = now + Duration::from_secs(seconds) - Duration::from_millis(1);
            let error = failures.get(&key(0), early).unwrap();
            assert!(error.to_string().contains("asked again in 1 s"), "{error}");
            assert!(matches!(error, CartridgeError::NotFound { .. }));
            now += Duration::from_secs(seconds);
            assert_eq!(failures.get(&key(0), now), None);
        }
        failures.record(&key(0), &Ok(()), now);
        failures.record(&key(0), &failed(), now);
        assert_eq!(failures.get(&key(0), now + Duration::from_secs(1)), None);
    }

    /// Registry case 8: remembered for ever or without bound.
    #[test]
    fn the_number_remembered_is_bounded_and_a_busy_server_is_no_failure() {
        let (mut failures, now) = (Failures::default(), Instant::now());
        let busy = CartridgeError::Busy { id: "a".into(), reason: "full".into() };
        failures.record(&key(0), &Err(busy), now);
        assert_eq!(failures.get(&key(0), now), None);
        let count = 2 * limits::MAX_REMEMBERED_FETCH_FAILURES;
        for i in 0..count {
            failures.record(&key(i), &failed(), now + Duration::from_nanos(i as u64));
        }
        assert_eq!(failures.remembered.len(), limits::MAX_REMEMBERED_FETCH_FAILURES);
        assert!(failures.get(&key(count - 1), now).is_some());
    }
}
