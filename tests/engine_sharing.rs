//! What requests share, and how they give way: prefix cache, choices, priorities, limits.

mod common;
mod engine_support;

use cartouche::engine::{CacheSalt, EngineError, EngineOptions, Event, GenerateRequest, Priority};
use common::ModelFixture;
use engine_support::{Outcome, collect, greedy, kv_bytes, start_engine, wait_until};

fn fixture() -> ModelFixture {
    common::model_fixtures(|name| name == "llama").remove(0)
}

fn options() -> EngineOptions {
    EngineOptions { kv_bytes: 1 << 20, prefill_tokens_per_step: 64, ..EngineOptions::default() }
}

/// `length` tokens that begin like those of every other length with the same `salt`.
fn prompt(length: u32, salt: u32) -> Vec<u32> {
    (0..length).map(|i| (i * 7 + salt * 3 + i * i % 5) % 90).collect()
}

fn seeded(mut request: GenerateRequest, seed: u64) -> GenerateRequest {
    request.sampling.temperature = 0.9;
    request.sampling.seed = Some(seed);
    request
}

/// Everything but how much was cached.
fn same(mut a: Outcome, mut b: Outcome) -> bool {
    (a.cached_tokens, b.cached_tokens) = (0, 0);
    a.ids_of_all() == b.ids_of_all() && a.reasons == b.reasons && a.prompt.len() == b.prompt.len()
}

#[test]
fn a_reply_is_the_same_with_and_without_the_cache() {
    let fixture = fixture();
    let with = start_engine(&fixture, &options());
    let without = start_engine(&fixture, &EngineOptions { prefix_cache: false, ..options() });
    let leases = fixture.cartridges("prefix24");
    for round in 0..3 {
        for (i, length) in [16, 17, 33, 50].into_iter().enumerate() {
            for cartridges in [vec![], leases.clone()] {
                let mut request = greedy(&prompt(length, 0), 20);
                request.cartridges = cartridges;
                if i % 2 == 1 {
                    request = seeded(request, i as u64);
                }
                let cached = collect(with.submit(request.clone()).unwrap(), 1).unwrap();
                let plain = collect(without.submit(request).unwrap(), 1).unwrap();
                assert_eq!(plain.cached_tokens, 0);
                if round > 0 {
                    let full = (length as usize - 1) / 16 * 16;
                    assert_eq!(cached.cached_tokens, full, "all but the last token, whole blocks");
                }
                assert!(same(cached, plain));
            }
        }
    }
    wait_until(&without, |s| (s.used_blocks, s.cached_blocks) == (0, 0));
    wait_until(&with, |s| s.used_blocks == 0 && s.cached_blocks > 0);
    let stats = with.stats();
    assert!(stats.prefix_hit_tokens > 0 && stats.prefix_hit_tokens < stats.prefix_queried_tokens);
    assert_eq!(without.stats().prefix_hit_tokens, 0);
}

#[test]
fn generated_tokens_are_found_again_as_a_prompt() {
    let fixture = fixture();
    let engine = start_engine(&fixture, &options());
    let first = prompt(20, 0);
    let reply = collect(engine.submit(greedy(&first, 30)).unwrap(), 1).unwrap();
    let mut next = first;
    next.extend(reply.ids(0));
    next.extend([1, 2, 3]);
    let reply = collect(engine.submit(greedy(&next, 4)).unwrap(), 1).unwrap();
    assert_eq!(reply.cached_tokens, 48, "the last generated token was never computed");
}

#[test]
fn the_same_tokens_after_other_cartridges_are_computed() {
    let fixture = fixture();
    let engine = start_engine(&fixture, &options());
    let (five, more) = (fixture.cartridges("prefix5"), fixture.cartridges("prefix24"));
    let both = |a: &[_], b: &[_]| [a, b].concat();
    let orders = [vec![], five.clone(), more.clone(), both(&five, &more), both(&more, &five)];
    for expected in [0, 32] {
        for cartridges in &orders {
            let mut request = greedy(&prompt(40, 0), 12);
            request.cartridges = cartridges.clone();
            let alone = start_engine(&fixture, &options()).submit(request.clone()).unwrap();
            let got = collect(engine.submit(request).unwrap(), 1).unwrap();
            assert_eq!(got.cached_tokens, expected);
            assert!(same(got, collect(alone, 1).unwrap()));
        }
    }
}

#[test]
fn scoring_a_prompt_computes_all_of_it() {
    let fixture = fixture();
    let engine = start_engine(&fixture, &options());
    let mut request = greedy(&prompt(40, 0), 4);
    request.logprobs.prompt_top = Some(2);
    let first = collect(engine.submit(request.clone()).unwrap(), 1).unwrap();
    let second = collect(engine.submit(request).unwrap(), 1).unwrap();
    assert_eq!((second.prompt.len(), second.cached_tokens), (40, 0));
    assert_eq!(first, second);
}

#[test]
fn choices_share_their_prompt() {
    let fixture = fixture();
    for prefix_cache in [true, false] {
        let engine = start_engine(&fixture, &EngineOptions { prefix_cache, ..options() });
        let mut request = seeded(greedy(&prompt(60, 1), 10), 7);
        request.n = 4;
        let got = collect(engine.submit(request.clone()).unwrap(), 4).unwrap();
        assert_eq!(engine.stats().prefix_hit_tokens, 3 * 48);
        // One step for the prompt, one for the rest of the three others' prompts, ten for their tokens.
        assert!(engine.stats().steps <= 12, "{:?}", engine.stats());
        assert_eq!(got.cached_tokens, 0);
        // Apart from what they share they are what they would be alone.
        let narrow = EngineOptions { max_running_sequences: 1, prefix_cache: false, ..options() };
        let alone = start_engine(&fixture, &narrow).submit(request).unwrap();
        assert!(same(got, collect(alone, 4).unwrap()));
    }
}

#[test]
fn another_choice_computes_the_prompt_when_the_first_is_cancelled() {
    let fixture = fixture();
    let engine = start_engine(&fixture, &EngineOptions { prefill_tokens_per_step: 1, ..options() });
    let mut request = greedy(&prompt(60, 1), 8);
    request.n = 3;
    let stream = engine.submit(request).unwrap();
    stream.cancel_choice(0);
    let got = collect(stream, 3).unwrap();
    assert_eq!((got.tokens[1].len(), got.tokens[2].len()), (8, 8));
    wait_until(&engine, |stats| (stats.used_blocks, stats.waiting) == (0, 0));
}

#[test]
fn preempted_sequences_sample_nothing_twice() {
    let fixture = fixture();
    for prefix_cache in [true, false] {
        let kv_bytes = kv_bytes(&fixture, 6);
        let engine = start_engine(&fixture, &EngineOptions { kv_bytes, prefix_cache, ..options() });
        let requests: Vec<GenerateRequest> = (0..8)
            .map(|i| {
                let mut request = seeded(greedy(&prompt(10 + i * 3, i), 40), u64::from(i));
                request.sampling.frequency_penalty = 0.5;
                request.sampling.repetition_penalty = 1.2;
                request.n = 1 + i as usize % 2;
                request
            })
            .collect();
        let streams: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
        for (request, stream) in requests.into_iter().zip(streams) {
            let n = request.n;
            let alone = start_engine(&fixture, &options()).submit(request).unwrap();
            assert!(same(collect(stream, n).unwrap(), collect(alone, n).unwrap()));
        }
        assert!(engine.stats().preemptions > 0);
        wait_until(&engine, |stats| stats.used_blocks == 0 && stats.running == 0);
    }
}

#[test]
fn batch_yields_to_interactive_and_goes_on_where_it_was() {
    let fixture = fixture();
    let engine = start_engine(&fixture, &EngineOptions { max_running_sequences: 1, ..options() });
    let mut batch = seeded(greedy(&prompt(20, 0), 100), 3);
    batch.priority = Priority::Batch;
    let alone = start_engine(&fixture, &options()).submit(batch.clone()).unwrap();
    let alone = collect(alone, 1).unwrap();
    // Usually the first round; a batch request may be done before the interactive one comes.
    for _ in 0..50 {
        let mut stream = engine.submit(batch.clone()).unwrap();
        assert!(matches!(stream.blocking_next(), Some(Event::PromptDone { .. })));
        collect(engine.submit(greedy(&prompt(20, 5), 2)).unwrap(), 1).unwrap();
        let preempted = engine.stats().preemptions > 0;
        assert_eq!(collect(stream, 1).unwrap().ids(0), alone.ids(0));
        if preempted {
            return;
        }
    }
    panic!("interactive requests waited for batch ones");
}

#[test]
fn the_queue_is_bounded_in_prompt_tokens() {
    let fixture = fixture();
    let limited = EngineOptions { max_running_sequences: 1, max_queued_tokens: 50, ..options() };
    let engine = start_engine(&fixture, &limited);
    let large = engine.submit(greedy(&prompt(60, 0), 60)).expect("nobody waits");
    let mut pair = greedy(&prompt(20, 1), 60);
    pair.n = 2;
    let mut accepted = Vec::new();
    let refused = loop {
        match engine.submit(pair.clone()) {
            Ok(stream) => accepted.push(stream),
            Err(error) => break error,
        }
        assert!(accepted.len() < 50);
    };
    match refused {
        EngineError::QueueTokensFull { waiting: 20 | 40 | 60, limit: 50 } => {}
        other => panic!("{other}"),
    }
    assert_eq!(collect(large, 1).unwrap().tokens[0].len(), 60);
    drop(accepted);
    wait_until(&engine, |stats| (stats.waiting_tokens, stats.waiting) == (0, 0));
    assert!(engine.submit(pair).is_ok());
}

#[test]
fn who_does_not_read_is_cancelled_and_others_are_not() {
    let fixture = fixture();
    let limited = EngineOptions { max_unread_events: 10, ..options() };
    let engine = start_engine(&fixture, &limited);
    let mut lazy = greedy(&prompt(20, 0), 40);
    lazy.n = 2;
    let lazy = engine.submit(lazy).unwrap();
    wait_until(&engine, |stats| stats.steps > 3 && stats.running + stats.waiting == 0);
    assert!(engine.stats().used_blocks == 0 && engine.stats().steps < 20);
    match collect(lazy, 2).unwrap_err() {
        EngineError::SlowReader { limit: 10 } => {}
        other => panic!("{other}"),
    }
    // The limit is on what is unread, not on what is asked for.
    let roomy = EngineOptions { max_unread_events: 45, ..options() };
    let engine = start_engine(&fixture, &roomy);
    assert_eq!(collect(engine.submit(greedy(&[1], 44)).unwrap(), 1).unwrap().ids(0).len(), 44);
}

/// Another salt finds nothing, whatever it sends; the same salt finds all; and the answers are the same.
#[test]
fn blocks_are_shared_within_a_salt_only() {
    let fixture = fixture();
    let engine = start_engine(&fixture, &options());
    let salts = [
        None,
        CacheSalt::new(Some("a"), None),
        CacheSalt::new(Some("b"), None),
        CacheSalt::new(Some("a"), Some("b")),
    ];
    let leases = fixture.cartridges("prefix24");
    for expected in [0, 32] {
        for cache_salt in salts {
            let mut request = greedy(&prompt(40, 0), 12);
            request.cartridges = leases.clone();
            let plain = start_engine(&fixture, &options()).submit(request.clone()).unwrap();
            request.cache_salt = cache_salt;
            let got = collect(engine.submit(request).unwrap(), 1).unwrap();
            assert_eq!(got.cached_tokens, expected, "{cache_salt:?}");
            assert!(same(got, collect(plain, 1).unwrap()));
        }
    }
    assert_eq!(engine.stats().prefix_hit_tokens, 4 * 32);
}
