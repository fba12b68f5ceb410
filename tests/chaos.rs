//! A server under everything at once: streams, disconnects, slow readers, bursts over the queue limits, bad
//! bodies, cartridge files that come, go and break, and restarts. Every request must be answered, and rightly:
//! a request that finishes has the tokens it gets alone.
//!
//! Runs for 10 seconds, or `CARTOUCHE_CHAOS_SECONDS` (`.ci/run`: 120), with the seed `CARTOUCHE_CHAOS_SEED`.

mod api_support;
mod chaos_support;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use api_support::Server;
use cartouche::{
    api::{ApiOptions, ListenOptions, Shutdown, serve},
    demo,
    engine::EngineOptions,
};
use chaos_support::{
    client::{Answer, Ending, Manner, ending, exchange},
    requests::{References, Request, below, once_in},
};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde_json::Value;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle, time::sleep};

const CLIENTS: usize = 16;
/// Nothing may take longer; finds what hangs.
const WATCHDOG: Duration = Duration::from_secs(60);
/// Cartridges a request may attach, whose files nobody touches. The file of `flip` is one of the first two's
/// contents, or broken, or not there.
const LISTS: [&[&str]; 4] = [&[], &["harbour-log"], &["expedition"], &["expedition", "alpha"]];

/// One life of the server.
#[derive(Clone)]
struct Current {
    address: SocketAddr,
    /// Set before it is told to stop: from then on nobody need be there to answer.
    stopping: Arc<AtomicBool>,
}

struct Run {
    references: References,
    current: watch::Receiver<Current>,
    until: Instant,
    started: Mutex<usize>,
    /// Requests by how they ended.
    ended: Mutex<BTreeMap<String, usize>>,
    failures: Mutex<Vec<String>>,
}

impl Run {
    fn ended(&self, how: impl Into<String>) {
        *self.ended.lock().unwrap().entry(how.into()).or_default() += 1;
    }

    fn fails(&self, why: String) {
        self.ended("WRONG");
        self.failures.lock().unwrap().push(why);
    }
}

fn limits() -> EngineOptions {
    EngineOptions {
        // 1024 tokens or so: sequences must give way to each other.
        kv_bytes: 4 << 20,
        max_running_sequences: 12,
        prefill_tokens_per_step: 128,
        max_queued_sequences: 20,
        max_queued_tokens: 6000,
        max_unread_events: 64,
        ..EngineOptions::default()
    }
}

fn listening(stall: Duration, drain: Duration) -> ListenOptions {
    ListenOptions { client_stall: stall, drain }
}

struct Life {
    server: Server,
    current: Current,
    shutdown: Shutdown,
    task: JoinHandle<()>,
}

impl Life {
    async fn start(dir: &Path, drain: Duration) -> Self {
        let dir = Some(dir.to_owned());
        let server = Server::with_cartridge_dir(ApiOptions::default(), limits(), dir);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = Shutdown::default();
        let options = listening(Duration::from_millis(1000), drain);
        let (router, state) = (server.router.clone(), server.state.clone());
        let task = tokio::spawn(serve(listener, router, state, options, shutdown.clone()));
        let current = Current { address, stopping: Arc::default() };
        Self { server, current, shutdown, task }
    }

    /// Stops it in one of two ways; then nothing may be left of any request.
    async fn stop(self, at_once: bool) {
        self.current.stopping.store(true, Ordering::SeqCst);
        match at_once {
            true => self.shutdown.at_once(),
            false => self.shutdown.drain(),
        }
        tokio::time::timeout(WATCHDOG, self.task).await.expect("the server stops").unwrap();
        let state = &self.server.state;
        let since = Instant::now();
        loop {
            let (engine, registry) = (state.engine.stats(), state.registry.stats());
            let held = engine.running + engine.waiting + engine.waiting_tokens + engine.used_blocks;
            if held + registry.leases + state.in_flight.count() == 0 {
                return;
            }
            assert!(since.elapsed() < WATCHDOG, "not back to rest: {engine:?} {registry:?}");
            sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Sends one request and judges the answer.
async fn ask(run: &Run, current: &Current, request: &Request, manner: Manner, flip: bool) {
    *run.started.lock().unwrap() += 1;
    let body = request.body.to_string();
    let exchange = exchange(current.address, "POST", request.path, &body, manner);
    let Ok(answer) = tokio::time::timeout(WATCHDOG, exchange).await else {
        return run.fails(format!("no answer within {WATCHDOG:?}: {manner:?} {body}"));
    };
    let stopping = current.stopping.load(Ordering::SeqCst);
    let slow = manner.is_slow();
    match answer {
        Answer::HungUp => run.ended("hung up"),
        Answer::Nothing(_) if stopping => run.ended("server gone"),
        // Its connection is cut once nothing can be written to it for the time set.
        Answer::Cut(_) if slow => run.ended("stalled"),
        Answer::Complete { status: 200, body: reply, .. } => match ending(&reply, request.stream) {
            Ending::Finished(got) => match run.references.check(request, &got) {
                Ok(()) => run.ended("finished"),
                Err(why) => run.fails(format!("{why} for {body}")),
            },
            Ending::Failed(code) if code == "shutting_down" && stopping => run.ended(code),
            Ending::Failed(code) if code == "slow_reader" => run.ended(code),
            Ending::Failed(code) => run.fails(format!("{code} for {body}")),
            Ending::Broken(why) => run.fails(format!("{why} for {body}")),
        },
        Answer::Complete { status, retry_after, body: reply } => {
            let reply: Value = serde_json::from_str(&reply).unwrap_or_default();
            let code = reply["error"]["code"].as_str().unwrap_or("none").to_owned();
            let fits = match (status, code.as_str()) {
                (429, "queue_full") => retry_after.is_some_and(|s| (1..=60).contains(&s)),
                (503, "shutting_down") => stopping && retry_after.is_some(),
                (503, "cartridge_busy") => flip && retry_after.is_some(),
                (400, "cartridge_invalid") | (404, "cartridge_not_found") => flip,
                _ => false,
            };
            match fits {
                true => {
                    run.ended(format!("{status} {code}"));
                    // Far sooner than it was told to, and still not at once.
                    sleep(Duration::from_millis(50)).await;
                }
                false => run.fails(format!("{status} {reply} for {body}")),
            }
        }
        other => run.fails(format!("{other:?} with {manner:?} for {body}")),
    }
}

/// Sends what is no request, or looks around.
async fn pry(run: &Run, current: &Current, rng: &mut ChaCha8Rng) {
    *run.started.lock().unwrap() += 1;
    let (method, path, body, expected) = match below(rng, 8) {
        0 => ("POST", "/v1/completions", r#"{"prompt": "#, 400),
        1 => ("POST", "/v1/chat/completions", r#"{"messages": 3}"#, 400),
        2 => ("POST", "/v1/completions", r#"{"prompt": "a", "priority": "soon"}"#, 400),
        3 => ("POST", "/v1/completions", r#"{"prompt": "a", "max_tokens": 99999}"#, 400),
        4 => ("GET", "/v1/nothing", "", 404),
        5 => ("GET", "/v1/cartridges", "", 200),
        6 => ("GET", "/health/live", "", 200),
        _ => ("GET", "/metrics", "", 200),
    };
    let exchange = exchange(current.address, method, path, body, Manner::Patient);
    let answer = tokio::time::timeout(WATCHDOG, exchange).await;
    let stopping = current.stopping.load(Ordering::SeqCst);
    match answer {
        Ok(Answer::Complete { status, .. }) if status == expected => run.ended("pried"),
        Ok(Answer::Complete { status: 429, .. }) if method == "POST" => run.ended("pried"),
        Ok(Answer::Complete { status: 503, .. }) if stopping => run.ended("pried"),
        Ok(Answer::Nothing(_)) if stopping => run.ended("server gone"),
        other => run.fails(format!("{other:?} for {method} {path} {body}")),
    }
}

async fn client(run: Arc<Run>, mut rng: ChaCha8Rng) {
    while Instant::now() < run.until {
        let current = run.current.borrow().clone();
        if current.stopping.load(Ordering::SeqCst) {
            sleep(Duration::from_millis(20)).await;
        }
        if once_in(&mut rng, 10) {
            pry(&run, &current, &mut rng).await;
            continue;
        }
        let flip = once_in(&mut rng, 4);
        let list = if flip { &["flip"][..] } else { LISTS[below(&mut rng, LISTS.len())] };
        let request = Request::random(&mut rng, list);
        let pause = Duration::from_millis(below(&mut rng, 30) as u64);
        match below(&mut rng, 12) {
            0 => {
                let bytes = below(&mut rng, 8000);
                ask(&run, &current, &request, Manner::HangsUpAfter(bytes), flip).await;
            }
            1 | 2 => ask(&run, &current, &request, Manner::Leaves(pause), flip).await,
            3 => {
                let manner = Manner::Slow(500 + below(&mut rng, 4000), pause / 2);
                ask(&run, &current, &request, manner, flip).await;
            }
            4 if once_in(&mut rng, 5) => {
                // Longer than the server waits, if it finds out.
                let manner = Manner::Deaf(Duration::from_secs(4));
                ask(&run, &current, &request.heavy(), manner, flip).await;
            }
            5 if once_in(&mut rng, 3) => {
                let burst = (0..24).map(|_| Request::random(&mut rng, list)).collect::<Vec<_>>();
                let asked = burst.iter().map(|r| ask(&run, &current, r, Manner::Patient, flip));
                futures_util::future::join_all(asked).await;
            }
            _ => ask(&run, &current, &request, Manner::Patient, flip).await,
        }
    }
}

/// Replaces, breaks and removes the file of the cartridge `flip`.
async fn flip(dir: PathBuf, until: Instant, mut rng: ChaCha8Rng) {
    let folder = dir.join("flip");
    let path = folder.join("cartridge.safetensors");
    while Instant::now() < until {
        let new: &[u8] = match below(&mut rng, 6) {
            0 => b"no cartridge",
            1 => &demo::DOCUMENTS[0].cartridge[..1000],
            2 => {
                let _ = std::fs::remove_file(&path);
                sleep(Duration::from_millis(30)).await;
                continue;
            }
            good => demo::DOCUMENTS[good % 2].cartridge,
        };
        if once_in(&mut rng, 4) {
            // In place, perhaps while it is read.
            std::fs::write(&path, new).unwrap();
        } else {
            // As files should be replaced: complete, under their name, at once.
            let fresh = folder.join("fresh.tmp");
            std::fs::write(&fresh, new).unwrap();
            std::fs::rename(&fresh, &path).unwrap();
        }
        sleep(Duration::from_millis(20 + below(&mut rng, 200) as u64)).await;
    }
}

fn number(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(default, |text| text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_request_is_answered_and_rightly() {
    let seconds = number("CARTOUCHE_CHAOS_SECONDS", 10);
    let seed = number("CARTOUCHE_CHAOS_SEED", 1);
    let rng = |stream: u64| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        rng
    };
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("flip")).unwrap();
    for document in demo::DOCUMENTS {
        let folder = dir.path().join(document.name);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("cartridge.safetensors"), document.cartridge).unwrap();
    }
    let since = Instant::now();
    let references = References::compute(dir.path(), &LISTS).await;
    let prepared = since.elapsed().as_secs();

    let mut life = Life::start(dir.path(), Duration::from_secs(5)).await;
    let (sender, current) = watch::channel(life.current.clone());
    let until = Instant::now() + Duration::from_secs(seconds);
    let run = Arc::new(Run {
        references,
        current,
        until,
        started: Mutex::default(),
        ended: Mutex::default(),
        failures: Mutex::default(),
    });
    let clients: Vec<_> =
        (0..CLIENTS).map(|i| tokio::spawn(client(Arc::clone(&run), rng(10 + i as u64)))).collect();
    let flipping = tokio::spawn(flip(dir.path().to_owned(), until, rng(1)));

    let (mut chance, mut restarts, mut preemptions, mut hits) = (rng(2), 0, 0, 0);
    let each = Duration::from_secs(seconds) / (3 + seconds as u32 / 15);
    let mut add = |life: &Life| {
        let stats = life.server.state.engine.stats();
        preemptions += stats.preemptions;
        hits += stats.prefix_hit_tokens;
    };
    while Instant::now() + each < until {
        sleep(each).await;
        add(&life);
        life.stop(once_in(&mut chance, 3)).await;
        restarts += 1;
        let drain = Duration::from_millis(below(&mut chance, 2000) as u64);
        life = Life::start(dir.path(), drain).await;
        sender.send_replace(life.current.clone());
    }
    for client in clients {
        tokio::time::timeout(4 * WATCHDOG, client).await.expect("clients end").unwrap();
    }
    flipping.await.unwrap();
    add(&life);
    life.stop(false).await;

    let (started, ended) = (*run.started.lock().unwrap(), run.ended.lock().unwrap().clone());
    println!(
        "chaos: {started} requests in {seconds} s (prepared in {prepared} s), seed {seed}, {restarts} \
         restarts, {preemptions} preemptions, {hits} prefix tokens reused: {ended:?}"
    );
    let failures = run.failures.lock().unwrap();
    assert!(
        failures.is_empty(),
        "{} wrong, e.g. {:#?}",
        failures.len(),
        &failures[..failures.len().min(5)]
    );
    assert_eq!(started, ended.values().sum::<usize>(), "every request has an end");
    for expected in ["finished", "hung up", "429 queue_full", "pried"] {
        assert!(
            ended.contains_key(expected),
            "nothing {expected}: the test tests less than it says"
        );
    }
    assert!(restarts > 0);
    assert!(preemptions > 0, "no sequence gave way to another");
    assert!(hits > 0, "nothing was shared");
}
