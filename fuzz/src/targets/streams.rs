//! Token ids to text, piece by piece, through stop strings: the same as the whole text at once.

use std::cell::OnceCell;

use cartouche::text::{Detokenizer, StopMatcher, Tokenizer};
use rand::RngExt;

use super::{Bounds, Linear, Outcome, Target, templates::tokenizer};
use crate::mutate::{self, Random};

pub const TARGET: Target = Target {
    name: "detokenizer_and_stops",
    seeds,
    mutate,
    run,
    // For each token a window of at most 64 tokens and a run of bytes is decoded, in some ten steps of a decoder.
    bounds: Bounds {
        memory: Linear { base: 256 << 10, per_byte: 2000 },
        work: Linear { base: 4 << 20, per_byte: 1 << 20 },
    },
    needs_system: false,
};

const NAMES: [&str; 4] = ["byte_level", "llama2", "metaspace", "no_decoder"];
/// Longer completions show nothing new.
const MAX_TOKENS: usize = 400;

thread_local! {
    static TOKENIZERS: OnceCell<Vec<Tokenizer>> = const { OnceCell::new() };
}

fn with<T>(which: usize, run: impl FnOnce(&Tokenizer) -> T) -> T {
    TOKENIZERS.with(|cell| {
        run(&cell.get_or_init(|| NAMES.into_iter().map(tokenizer).collect())[which % NAMES.len()])
    })
}

/// An input: flags, up to four stop strings with their lengths, ids of two bytes.
struct Input {
    flags: u8,
    stops: Vec<String>,
    ids: Vec<u32>,
}

impl Input {
    fn parse(data: &[u8]) -> Self {
        let (&flags, mut rest) = data.split_first().unwrap_or((&0, &[]));
        let mut stops = Vec::new();
        for _ in 0..flags >> 4 & 3 {
            let Some((&length, tail)) = rest.split_first() else { break };
            let (text, tail) = tail.split_at(usize::from(length % 24).min(tail.len()));
            stops.push(String::from_utf8_lossy(text).into_owned());
            rest = tail;
        }
        let vocab = with(usize::from(flags), Tokenizer::vocab_size) as u32;
        let ids = rest.as_chunks::<2>().0.iter().take(MAX_TOKENS);
        // A few ids beyond the vocabulary too.
        let ids = ids.map(|id| u32::from(u16::from_le_bytes(*id)) % (vocab + 3)).collect();
        Self { flags, stops, ids }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let texts =
        ["Hello there, STOP now.\n\n", "naïve café – 日本語 😀👩‍👩‍👧 ", "<s>a  b\tc</s>\u{FFFD}é"];
    let mut seeds = Vec::new();
    for which in 0..NAMES.len() {
        for text in texts {
            let ids = with(which, |t| t.encode(text, true)).unwrap_or_default();
            let mut seed = vec![which as u8 | 0x20, 4];
            seed.extend(b"STOP\x03\xC3\xA9\n");
            seed.extend(ids.iter().flat_map(|id| (*id as u16).to_le_bytes()));
            seeds.push(seed);
        }
    }
    seeds
}

fn mutate(data: &mut Vec<u8>, random: &mut Random) {
    match random.random_range(0..6) {
        0 if data.len() > 2 => data[0] = random.random(),
        // Runs of ids near each other: bytes of a char, special tokens.
        1 => {
            let first: u16 = random.random_range(0..290);
            let run = (0..random.random_range(1..12)).map(|_| first + random.random_range(0..4));
            let run: Vec<u8> = run.flat_map(u16::to_le_bytes).collect();
            let at = data.len() - data.len().min(2 * random.random_range(0..20));
            data.splice(at..at, run);
        }
        // A stop string that is a part of the text.
        2 if !data.is_empty() => {
            let input = Input::parse(data);
            let text = with(usize::from(input.flags), |t| t.decode(&input.ids, false));
            let text = text.unwrap_or_default();
            let part = mutate::part(text.len(), random);
            if let Some(stop) = text.get(part).filter(|s| s.len() < 24) {
                data[0] = data[0] & 0xCF | 0x10;
                data.splice(1..1, stop.bytes());
                data.insert(1, stop.len() as u8);
            }
        }
        _ => mutate::bytes(data, random),
    }
}

fn run(data: &[u8]) -> Outcome {
    let Input { flags, stops, ids } = Input::parse(data);
    let skip_special = flags & 8 != 0;
    with(usize::from(flags), |tokenizer| {
        let whole = tokenizer.decode(&ids, skip_special);
        let mut detokenizer = Detokenizer::new(tokenizer, skip_special);
        let mut matcher = StopMatcher::new(stops.clone());
        let (mut pieces, mut shown, mut matched) = (String::new(), String::new(), None);
        let mut take = |text: String| {
            pieces += &text;
            let push = matcher.push(&text);
            assert!(matched.is_none() || (push.emit.is_empty() && push.matched.is_none()));
            shown += &push.emit;
            matched = matched.or(push.matched);
        };
        ids.iter().for_each(|id| take(detokenizer.push(*id)));
        take(detokenizer.finish());
        assert_eq!(detokenizer.finish(), "");
        shown += &matcher.finish();
        if let Ok(whole) = &whole {
            assert_eq!(&pieces, whole, "pieces are not the text");
        }
        let (expected, found) = search(&stops, &pieces);
        match found {
            None => assert_eq!((&*shown, matched), (expected, None)),
            Some(stop) => {
                // `finish` gives nothing after a match.
                assert_eq!(shown, expected);
                assert_eq!(matched.map(|i| &stops[i]), Some(&stops[stop]));
            }
        }
        let name = NAMES[usize::from(flags) % NAMES.len()];
        Outcome::accepted(format!(
            "{name}, skip {skip_special}, stop {:?}, replaced {}",
            matched.is_some(),
            pieces.contains('\u{FFFD}')
        ))
        .after(ids.len() as u64)
    })
}

/// The definition: the stop that ends first, of those the longest; the text before it.
fn search<'a>(stops: &[String], text: &'a str) -> (&'a str, Option<usize>) {
    let found = stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty());
    let found = found.filter_map(|(i, stop)| text.find(&**stop).map(|at| (at + stop.len(), at, i)));
    match found.min() {
        Some((_, at, i)) => (&text[..at], Some(i)),
        None => (text, None),
    }
}
