//! Drives one level of load against one target: a closed loop of clients, or an open loop of arrivals.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hyper::body::Bytes;
use indicatif::ProgressBar;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::client::Sending;
use super::workload::Which;
use super::{Amount, Connection, Endpoint, Load, Record, Workload, cpu_seconds, perform};

/// Pause of a client after a failed request, so that a refusing server is not flooded.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(100);

/// Turns true when the user wants to stop.
pub type Stop = watch::Receiver<bool>;

/// What every request of a level needs.
#[derive(Debug, Clone)]
pub struct Job {
    pub endpoint: Endpoint,
    pub model: String,
    pub workload: Arc<Workload>,
    pub load: Load,
    pub amount: Amount,
    pub warmup: usize,
    pub sending: Sending,
    /// See [`Which::round`].
    pub round: usize,
}

/// What a level left behind.
#[derive(Debug, Default)]
pub struct Outcome {
    pub records: Vec<Record>,
    /// Stopped by the user; requests on their way were dropped.
    pub interrupted: bool,
    /// Processor seconds this process used while measuring.
    pub cpu_s: Option<f64>,
    /// Seconds from the first measured request to the end of the last.
    pub wall_s: f64,
}

impl Job {
    fn which(&self, client: usize, index: usize, warmup: bool) -> Which {
        let clients = match self.load {
            Load::Closed { clients } => clients,
            Load::Open { .. } => 1,
        };
        Which { round: self.round, warmup, client, clients, index }
    }

    /// Makes the body, which can take a while and is not part of any latency.
    fn body(&self, which: Which) -> Bytes {
        self.workload.body(&self.model, which)
    }

    async fn send(
        &self,
        connection: &mut Option<Connection>,
        body: Bytes,
        start: Instant,
        record: &mut Record,
    ) {
        let path = self.workload.options.api.path();
        perform(&self.endpoint, connection, path, body, start, self.sending, record).await;
    }

    /// A client sends, waits for the end of the answer, and sends again.
    async fn client(
        &self,
        client: usize,
        connection: &mut Option<Connection>,
        start: Instant,
        finished: &mpsc::UnboundedSender<Record>,
    ) {
        for index in 0.. {
            let over = match self.amount {
                Amount::Requests(count) => index >= count,
                Amount::Seconds(seconds) => start.elapsed().as_secs_f64() >= seconds,
            };
            if over {
                return;
            }
            let body = self.body(self.which(client, index, false));
            let mut record = Record::new(client, index, start.elapsed().as_secs_f64());
            self.send(connection, body, start, &mut record).await;
            let failed = record.failure.is_some();
            if finished.send(record).is_err() {
                return;
            }
            if failed {
                tokio::time::sleep(PAUSE_AFTER_FAILURE).await;
            }
        }
    }

    /// Opens the connections and sends the unmeasured requests. Their failures are left to the measured
    /// ones to show.
    async fn warm_up(self: &Arc<Self>) -> Vec<Option<Connection>> {
        let clients = self.which(0, 0, true).clients;
        let mut tasks = JoinSet::new();
        for client in 0..clients {
            let job = Arc::clone(self);
            tasks.spawn(async move {
                let mut connection = None;
                for index in 0..job.warmup {
                    let body = job.body(job.which(client, index, true));
                    let mut record = Record::new(client, index, 0.0);
                    job.send(&mut connection, body, Instant::now(), &mut record).await;
                }
                connection
            });
        }
        tasks.join_all().await
    }
}

/// Runs the level to its end, or until `stop`.
pub async fn drive(job: Job, progress: &ProgressBar, mut stop: Stop) -> Outcome {
    let job = Arc::new(job);
    let connections = tokio::select! {
        connections = job.warm_up() => connections,
        () = stopped(&mut stop) => return Outcome { interrupted: true, ..Outcome::default() },
    };
    let (sender, mut finished) = mpsc::unbounded_channel();
    let (cpu, start) = (cpu_seconds(), Instant::now());
    // Dropping the tasks drops the requests on their way.
    let mut tasks = JoinSet::new();
    match job.load {
        Load::Closed { .. } => {
            for (client, mut connection) in connections.into_iter().enumerate() {
                let (job, sender) = (Arc::clone(&job), sender.clone());
                tasks.spawn(async move {
                    job.client(client, &mut connection, start, &sender).await;
                });
            }
        }
        Load::Open { rate, max_outstanding } => {
            let arrivals = arrivals(rate, job.workload.options.seed, job.amount);
            let job = Arc::clone(&job);
            let idle = Mutex::new(connections.into_iter().flatten().collect());
            let open = OpenLoop { job, idle, permits: Semaphore::new(max_outstanding), start };
            tasks.spawn(Arc::new(open).run(arrivals, sender.clone()));
        }
    }
    drop(sender);
    let mut outcome = Outcome::default();
    loop {
        tokio::select! {
            record = finished.recv() => match record {
                Some(record) => outcome.records.push(record),
                None => break,
            },
            () = stopped(&mut stop) => {
                outcome.interrupted = true;
                break;
            }
        }
        progress.set_position(match job.amount {
            Amount::Requests(_) => outcome.records.len() as u64,
            Amount::Seconds(_) => start.elapsed().as_secs(),
        });
    }
    drop(tasks);
    outcome.wall_s = start.elapsed().as_secs_f64();
    outcome.cpu_s = cpu.zip(cpu_seconds()).map(|(before, after)| after - before);
    outcome
}

/// Resolves when the user wants to stop; never if nobody can say so any more.
async fn stopped(stop: &mut Stop) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Requests that start when they are due, not when others end.
struct OpenLoop {
    job: Arc<Job>,
    idle: Mutex<Vec<Connection>>,
    /// One per request that may be on its way; those over it wait in the order of their arrivals.
    permits: Semaphore,
    start: Instant,
}

impl OpenLoop {
    async fn run(self: Arc<Self>, arrivals: Vec<f64>, finished: mpsc::UnboundedSender<Record>) {
        let mut due = clock(arrivals, self.start);
        let mut requests = JoinSet::new();
        for index in 0.. {
            let body = self.job.body(self.job.which(0, index, false));
            let Some(intended_s) = due.recv().await else { break };
            let (open, finished) = (Arc::clone(&self), finished.clone());
            requests.spawn(async move {
                let Ok(_permit) = open.permits.acquire().await else { return };
                let mut connection = open.idle().pop();
                let mut record = Record::new(0, index, intended_s);
                open.job.send(&mut connection, body, open.start, &mut record).await;
                open.idle().extend(connection);
                // Nobody listens any more after a stop.
                let _ = finished.send(record);
            });
            while requests.try_join_next().is_some() {}
        }
        requests.join_all().await;
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Sends each time when it is due, from a thread of its own: tokio's timers round up to a millisecond.
fn clock(arrivals: Vec<f64>, start: Instant) -> mpsc::UnboundedReceiver<f64> {
    let (sender, receiver) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for due in arrivals {
            let wait =
                (start + Duration::from_secs_f64(due)).saturating_duration_since(Instant::now());
            std::thread::sleep(wait);
            if sender.send(due).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Seconds from the start at which requests are due: a Poisson process of `rate` per second, given how
/// many arrive in its time. That makes them independent and uniform, and a short level has the rate it
/// says. The same seed gives the same times.
pub fn arrivals(rate: f64, seed: u64, amount: Amount) -> Vec<f64> {
    let (count, seconds) = match amount {
        Amount::Requests(count) => (count, count as f64 / rate),
        Amount::Seconds(seconds) => (((rate * seconds).round() as usize).max(1), seconds),
    };
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = || (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
    let mut times: Vec<f64> = (0..count).map(|_| uniform() * seconds).collect();
    times.sort_unstable_by(f64::total_cmp);
    times
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_repeat_with_their_seed_and_have_the_spread_of_a_poisson_process() {
        let times = arrivals(8.0, 1, Amount::Requests(20_000));
        assert_eq!(times, arrivals(8.0, 1, Amount::Requests(20_000)));
        assert_ne!(times, arrivals(8.0, 2, Amount::Requests(20_000)));
        assert!(times.is_sorted());
        // Gaps of an exponential distribution: mean and standard deviation are both 1 / rate.
        let gaps: Vec<f64> = times.windows(2).map(|t| t[1] - t[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean * 8.0 - 1.0).abs() < 0.03, "{mean}");
        assert!((variance.sqrt() * 8.0 - 1.0).abs() < 0.03, "{variance}");
        let timed = arrivals(2.5, 1, Amount::Seconds(10.0));
        assert_eq!(timed.len(), 25);
        assert!(timed.iter().all(|t| (0.0..10.0).contains(t)));
        assert_eq!(arrivals(0.01, 1, Amount::Seconds(1.0)).len(), 1);
    }
}
