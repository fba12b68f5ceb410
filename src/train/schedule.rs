//! The learning rate over the updates.

use serde::{Deserialize, Serialize};

/// How the learning rate goes after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    #[default]
    Constant,
    /// Half a cosine from the full rate to the floor.
    Cosine,
    /// A straight line from the full rate to the floor.
    Linear,
}

/// Linear warm-up, then `decay` to a floor.
///
/// Update `t` (from 0) uses [`Schedule::lr`]`(t)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    pub lr: f64,
    pub decay: Decay,
    /// Updates of warm-up, from `warmup_min_lr` to `lr`.
    pub warmup_steps: u64,
    pub warmup_min_lr: f64,
    /// The floor, as a fraction of `lr`.
    pub alpha_f: f64,
    /// Updates in all; the floor is reached at the last.
    pub max_steps: u64,
    /// As the original trainers have it: each rate is used one update late, the first update uses the full
    /// one, and the floor is reached after the last.
    pub parity: bool,
}

impl Schedule {
    /// The learning rate of update `t`, counted from 0.
    pub fn lr(&self, t: u64) -> f64 {
        match (self.parity, t) {
            (false, t) => self.planned(t, 1),
            (true, 0) => self.lr,
            (true, t) => self.planned(t - 1, 0),
        }
    }

    /// `ahead`: how many updates before `max_steps` the floor is reached.
    fn planned(&self, t: u64, ahead: u64) -> f64 {
        let part = |t: u64, of: u64| (t as f64 / of.max(1) as f64).min(1.0);
        if t < self.warmup_steps {
            return self.warmup_min_lr
                + (self.lr - self.warmup_min_lr) * part(t, self.warmup_steps);
        }
        let floor = self.alpha_f * self.lr;
        let decaying = self.max_steps.saturating_sub(self.warmup_steps + ahead);
        let done = part(t - self.warmup_steps, decaying);
        let left = match self.decay {
            Decay::Constant => return self.lr,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            Decay::Linear => 1.0 - done,
        };
        floor + (self.lr - floor) * left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(decay: Decay, warmup_steps: u64, parity: bool) -> Vec<f64> {
        let schedule = Schedule {
            lr: 1.0,
            decay,
            warmup_steps,
            warmup_min_lr: 0.2,
            alpha_f: 0.1,
            max_steps: 9,
            parity,
        };
        (0..12).map(|t| schedule.lr(t)).collect()
    }

    #[test]
    fn warms_up_from_the_first_update_and_reaches_the_floor_at_the_last() {
        for decay in [Decay::Cosine, Decay::Linear] {
            let got = rates(decay, 4, false);
            for (got, want) in got.iter().zip([0.2, 0.4, 0.6, 0.8, 1.0]) {
                assert!((got - want).abs() < 1e-12, "{decay:?} {got} for {want}");
            }
            assert!((got[6] - 0.55).abs() < 1e-12, "half way is the middle: {}", got[6]);
            assert!(got[8..].iter().all(|lr| (lr - 0.1).abs() < 1e-12), "{got:?}");
        }
        assert!(rates(Decay::Constant, 0, false).iter().all(|lr| *lr == 1.0));
        assert_eq!(rates(Decay::Linear, 0, false)[0], 1.0);
    }

    /// `LinearWithWarmup` of the original trainer: 4 updates of warm-up, 5 of decay, written after the update.
    #[test]
    fn with_parity_rates_are_one_update_late_and_the_first_is_the_full_one() {
        let got = rates(Decay::Linear, 4, true);
        let want = [1.0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.82, 0.64, 0.46, 0.28, 0.1, 0.1];
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 1e-12, "{got} for {want}");
        }
        assert!(rates(Decay::Constant, 0, true).iter().all(|lr| *lr == 1.0));
    }

    #[test]
    fn one_update_in_all_uses_the_full_rate() {
        let schedule = Schedule {
            lr: 1.0,
            decay: Decay::Linear,
            warmup_steps: 0,
            warmup_min_lr: 0.0,
            alpha_f: 0.1,
            max_steps: 1,
            parity: false,
        };
        assert_eq!(schedule.lr(0), 1.0);
    }
}
