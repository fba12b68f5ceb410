//! Makes inputs, runs them, and makes those that fail smaller.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    env, fs,
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc, Once,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use memmap2::MmapMut;
use rand::{RngExt, SeedableRng, seq::IndexedRandom};

use crate::{
    count::{Cost, counted},
    mutate::Random,
    sandbox,
    targets::{Outcome, Target},
};

/// Inputs for each target unless said otherwise: enough to see that the targets work.
const DEFAULT_INPUTS: u64 = 2_000;
/// As large as the threads of the server that read what strangers send.
const STACK_BYTES: usize = 2 << 20;
/// Inputs that took a new way, kept to be changed further.
const MAX_POOL: usize = 400;
/// Runs that making an input smaller may take.
const MAX_SHRINK_RUNS: usize = 3_000;
/// One input that takes so long never ends.
const STUCK: Duration = Duration::from_secs(120);

/// What a run of a target came to.
#[derive(Default)]
struct Tally {
    inputs: u64,
    accepted: u64,
    kinds: BTreeMap<(bool, String), u64>,
    /// The most, over all inputs: bytes held, and work as a share of what is allowed, in thousandths.
    peak: u64,
    work: u64,
    slowest: Duration,
}

/// Runs a target on seeds and their mutations. Panics with the smallest input found that fails.
pub fn fuzz(target: Target) {
    quiet_panics();
    let seeds = (target.seeds)();
    assert!(!seeds.is_empty(), "no seeds");
    let inputs = number("CARTOUCHE_FUZZ_INPUTS", DEFAULT_INPUTS);
    let seed = number("CARTOUCHE_FUZZ_SEED", 1);
    let replay = env::var("CARTOUCHE_FUZZ_REPLAY").ok().map(|path| fs::read(path).unwrap());
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    fs::create_dir_all(&folder).unwrap();
    let mut current = Current::new(&folder.join(format!("{}.current", target.name)));
    let began = Instant::now();
    let beat = Watch::start(target.name);
    let run = move || {
        PANIC.set(Some(String::new()));
        warm_up(&target, &seeds);
        let is_locked_in = if target.needs_system { false } else { sandbox::enter().is_ok() };
        let mut tally = Tally::default();
        let result = match replay {
            Some(input) => one(&target, &input, &mut current).map(drop).map_err(|e| (input, e)),
            None => all(&target, &seeds, (inputs, seed), &mut current, &mut tally, &beat),
        };
        (result, tally, is_locked_in, current)
    };
    let thread = std::thread::Builder::new().name(target.name.to_owned()).stack_size(STACK_BYTES);
    let (result, tally, is_locked_in, current) = thread.spawn(run).unwrap().join().unwrap();
    fs::remove_file(current.path).unwrap();
    if let Err((input, reason)) = result {
        let path = folder.join(format!("{}.failed", target.name));
        fs::write(&path, &input).unwrap();
        let shown = input.iter().take(2048).map(|byte| format!("{byte:02x}")).collect::<String>();
        let text = String::from_utf8_lossy(&input[..input.len().min(600)]).into_owned();
        panic!(
            "{}: {reason}\n{} bytes, in {}:\n{shown}\n{text:?}",
            target.name,
            input.len(),
            path.display()
        );
    }
    report(&target, &tally, began.elapsed(), is_locked_in);
}

/// What is made once, a tokenizer for instance, is made before the thread is locked in. Freeing some
/// megabytes has the allocator ask the system, once, how it may give memory back.
fn warm_up(target: &Target, seeds: &[Vec<u8>]) {
    drop(std::hint::black_box(vec![vec![1u8; 64 << 10]; 128]));
    for seed in seeds {
        let _ = catch_unwind(AssertUnwindSafe(|| (target.run)(seed)));
    }
}

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|e| panic!("{name}: {e}")))
}

type Failure = (Vec<u8>, String);

fn all(
    target: &Target,
    seeds: &[Vec<u8>],
    (inputs, seed): (u64, u64),
    current: &mut Current,
    tally: &mut Tally,
    beat: &Watch,
) -> Result<(), Failure> {
    let mut random = Random::seed_from_u64(seed);
    let mut pool = seeds.to_vec();
    for i in 0..inputs {
        let input = match seeds.get(i as usize) {
            Some(seed) => seed.clone(),
            None => {
                // What took a new way is mostly refused: half of the inputs start from sound ones.
                let from = if random.random_bool(0.5) { seeds } else { &pool[..] };
                let mut input = from.choose(&mut random).cloned().unwrap_or_default();
                for _ in 0..[1, 1, 1, 2, 3, 8][random.random_range(0..6)] {
                    (target.mutate)(&mut input, &mut random);
                }
                input
            }
        };
        let started = Instant::now();
        beat.begin();
        let (outcome, cost) = match one(target, &input, current) {
            Ok(result) => result,
            Err(reason) => return Err(shrink(target, input, reason, current)),
        };
        let allowed = target.bounds.work.at(input.len());
        tally.work = tally.work.max((cost.total + outcome.steps) * 1000 / allowed);
        tally.peak = tally.peak.max(cost.peak);
        tally.slowest = tally.slowest.max(started.elapsed());
        tally.inputs += 1;
        tally.accepted += u64::from(outcome.accepted);
        let count = tally.kinds.entry((outcome.accepted, outcome.kind)).or_default();
        *count += 1;
        // Another way through the code: a place to go on from.
        if *count <= 3 && i as usize >= seeds.len() {
            if pool.len() < MAX_POOL {
                pool.push(input);
            } else {
                let at = random.random_range(seeds.len().min(MAX_POOL - 1)..MAX_POOL);
                pool[at] = input;
            }
        }
    }
    Ok(())
}

/// Runs one input. An error is why it is a failure.
fn one(target: &Target, input: &[u8], current: &mut Current) -> Result<(Outcome, Cost), String> {
    current.set(input);
    let (result, cost) = counted(|| catch_unwind(AssertUnwindSafe(|| (target.run)(input))));
    if let Some(call) = if target.needs_system { None } else { sandbox::refused() } {
        return Err(format!("system call {call}: reading an input touches nothing"));
    }
    let outcome = result.map_err(|_| PANIC.with_borrow(|last| last.clone().unwrap_or_default()))?;
    let allowed = target.bounds.memory.at(input.len());
    if cost.peak > allowed {
        return Err(format!("{} bytes held at a time, {allowed} allowed", cost.peak));
    }
    let (work, allowed) = (cost.total + outcome.steps, target.bounds.work.at(input.len()));
    if work > allowed {
        return Err(format!("work of {work} bytes and steps, {allowed} allowed"));
    }
    Ok((outcome, cost))
}

/// Cuts parts off for as long as what is left fails too.
fn shrink(
    target: &Target,
    mut input: Vec<u8>,
    mut reason: String,
    current: &mut Current,
) -> Failure {
    let (mut runs, mut width) = (0, input.len().div_ceil(2));
    while width > 0 && runs < MAX_SHRINK_RUNS {
        let (mut at, before) = (0, input.len());
        while at < input.len() && runs < MAX_SHRINK_RUNS {
            let end = (at + width).min(input.len());
            let shorter = [&input[..at], &input[end..]].concat();
            runs += 1;
            match one(target, &shorter, current) {
                Err(again) => (input, reason) = (shorter, again),
                Ok(_) => at = end,
            }
        }
        if input.len() == before {
            width /= 2;
        }
    }
    (input, reason)
}

thread_local! {
    /// On threads that run inputs: what the last panic said, and where.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Libraries panic by the thousand on hostile input, where the panic is caught and an error.
fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let is_target = PANIC.with_borrow_mut(|last| match last {
                Some(text) => {
                    *text = panic.to_string();
                    true
                }
                None => false,
            });
            if !is_target {
                before(panic);
            }
        }));
    });
}

/// The input at hand, in a file that outlives the process whatever ends it.
struct Current {
    path: PathBuf,
    map: MmapMut,
}

const MAX_CURRENT: usize = 1 << 20;

impl Current {
    fn new(path: &Path) -> Self {
        let file =
            fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
        let file = file.unwrap();
        file.set_len(MAX_CURRENT as u64).unwrap();
        // SAFETY: nobody else changes the file, whose length is not changed while it is mapped.
        let map = unsafe { MmapMut::map_mut(&file) }.unwrap();
        Self { path: path.to_owned(), map }
    }

    /// Eight bytes of length, then the input.
    fn set(&mut self, input: &[u8]) {
        let length = input.len().min(MAX_CURRENT - 8);
        self.map[..8].copy_from_slice(&(length as u64).to_le_bytes());
        self.map[8..8 + length].copy_from_slice(&input[..length]);
    }
}

/// Ends the process when an input never ends, since no thread can be ended from outside.
struct Watch {
    /// Milliseconds since the start at which the input at hand began; `u64::MAX` when none is.
    began: Arc<AtomicU64>,
    start: Instant,
}

impl Watch {
    fn start(target: &'static str) -> Self {
        let (began, start) = (Arc::new(AtomicU64::new(u64::MAX)), Instant::now());
        let watched = Arc::downgrade(&began);
        std::thread::spawn(move || {
            while let Some(began) = watched.upgrade() {
                let began = Duration::from_millis(began.load(Ordering::Relaxed));
                if start.elapsed().checked_sub(began).is_some_and(|running| running > STUCK) {
                    eprintln!(
                        "{target}: one input takes more than {STUCK:?}, see {target}.current"
                    );
                    std::process::abort();
                }
                std::thread::sleep(Duration::from_millis(500));
            }
        });
        Self { began, start }
    }

    fn begin(&self) {
        self.began.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }
}

fn report(target: &Target, tally: &Tally, time: Duration, is_locked_in: bool) {
    let (accepted, refused): (Vec<_>, Vec<_>) = tally.kinds.keys().partition(|(ok, _)| *ok);
    let share = 100.0 * tally.accepted as f64 / tally.inputs.max(1) as f64;
    let line = format!(
        "{},{},{share:.1},{},{},{},{:.3},{},{:.0},{:.1}",
        target.name,
        tally.inputs,
        accepted.len(),
        refused.len(),
        tally.peak,
        tally.work as f64 / 1000.0,
        if is_locked_in { "yes" } else { "no" },
        tally.slowest.as_secs_f64() * 1000.0,
        time.as_secs_f64(),
    );
    println!("{line}");
    let Ok(folder) = env::var("CARTOUCHE_FUZZ_REPORT") else { return };
    let folder = Path::new(&folder);
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join(format!("{}.csv", target.name)), line + "\n").unwrap();
    let mut kinds = fs::File::create(folder.join(format!("{}.kinds", target.name))).unwrap();
    for ((accepted, kind), count) in &tally.kinds {
        let verdict = if *accepted { "accepted" } else { "refused" };
        writeln!(kinds, "{count}\t{verdict}\t{}", kind.replace(|c: char| c.is_control(), " "))
            .unwrap();
    }
}
