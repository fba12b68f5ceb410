use super::*;

fn tokenizer() -> Tokenizer {
    Tokenizer::from_bytes(crate::demo::model_file("tokenizer.json").unwrap()).unwrap()
}

fn options(stop: &[&str]) -> TextOptions {
    TextOptions {
        n: 1,
        stop: stop.iter().map(|s| (*s).to_owned()).collect(),
        include_stop: false,
        skip_special_tokens: true,
        eos_token_ids: vec![2],
        stop_token_ids: vec![16],
        min_tokens: 0,
    }
}

fn token(id: u32) -> SampledToken {
    SampledToken { id, logprob: -0.5, top: Vec::new() }
}

/// Feeds the tokens of `text` (and then `extra`), ends with `reason`; returns the text, the finish, and
/// the char offset of each token that was reported.
fn run(
    options: &TextOptions,
    text: &str,
    extra: &[u32],
    reason: FinishReason,
) -> (String, Finish, Vec<usize>) {
    let tokenizer = tokenizer();
    let mut ids = tokenizer.encode(text, false).unwrap();
    ids.extend(extra);
    let mut assembly = Assembly::new(&tokenizer, options, &[]);
    let events = ids
        .into_iter()
        .map(|id| Event::Token { choice: 0, token: token(id) })
        .chain([Event::Finished { choice: 0, reason }]);
    let (mut out, mut finish, mut offsets) = (String::new(), None, Vec::new());
    for event in events {
        let update = assembly.on_event(event).unwrap();
        assert!(finish.is_none() || update.is_none(), "an update after the finish");
        if let Some(Update::Delta { text, token, finish: f, .. }) = update {
            out += &text;
            offsets.extend(token.map(|(_, offset)| offset));
            finish = finish.or(f);
        }
    }
    assert!(assembly.is_done());
    (out, finish.unwrap(), offsets)
}

#[test]
fn text_ends_before_the_end_token() {
    let (text, finish, offsets) = run(&options(&[]), "Hello world", &[2], FinishReason::Stop);
    assert_eq!(text, "Hello world");
    assert_eq!(finish, Finish { reason: "stop", stop: Value::Null });
    assert_eq!(offsets.last(), Some(&11));
    // An end token that is the last one allowed is still `length`, as in Tokasaurus.
    let (text, finish, _) = run(&options(&[]), "Hello", &[2], FinishReason::Length);
    assert_eq!((text.as_str(), finish.reason), ("Hello", "length"));
}

#[test]
fn requested_stop_tokens_are_named_and_hidden() {
    let (text, finish, _) = run(&options(&[]), "Hello", &[16], FinishReason::Stop);
    assert_eq!((text.as_str(), finish), ("Hello", Finish { reason: "stop", stop: 16.into() }));
    let shown = TextOptions { include_stop: true, ..options(&[]) };
    assert_eq!(run(&shown, "Hello", &[16], FinishReason::Stop).0, "Hello.");
}

#[test]
fn stop_strings_end_the_choice_across_tokens() {
    for (stop, expected) in [("wor", "Hello "), ("o w", "Hell"), ("rld", "Hello wo")] {
        let (text, finish, _) =
            run(&options(&[stop]), "Hello world again", &[], FinishReason::Length);
        assert_eq!(text, expected);
        assert_eq!(finish, Finish { reason: "stop", stop: stop.into() });
        let shown = TextOptions { include_stop: true, ..options(&[stop]) };
        let (text, ..) = run(&shown, "Hello world again", &[], FinishReason::Length);
        assert_eq!(text, format!("{expected}{stop}"));
    }
}

#[test]
fn stop_strings_wait_for_min_tokens() {
    // "Hello", " w", "or", "l", "d", " w", "or", ...
    let patient = TextOptions { min_tokens: 5, ..options(&["wor"]) };
    let (text, finish, _) = run(&patient, "Hello world world", &[], FinishReason::Length);
    assert_eq!((text.as_str(), finish.reason), ("Hello world ", "stop"));
}

#[test]
fn a_completion_that_goes_on_keeps_its_context() {
    // The prompt ends inside a char; the completion's text begins with the whole char.
    let tokenizer = tokenizer();
    let ids = tokenizer.encode("aé", false).unwrap();
    let (last, context) = ids.split_last().unwrap();
    let mut assembly = Assembly::new(&tokenizer, &options(&[]), context);
    let update = assembly.on_event(Event::Token { choice: 0, token: token(*last) }).unwrap();
    assert!(matches!(update, Some(Update::Delta { text, .. }) if text == "é"));
}

fn llama2() -> Tokenizer {
    let path = format!("{}/tests/fixtures/tokenizers/llama2.json", env!("CARGO_MANIFEST_DIR"));
    let fixture: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    Tokenizer::from_bytes(fixture["tokenizer"].to_string().as_bytes()).unwrap()
}

/// Text of the pieces generated after `prompt`, and the finish.
fn go_on(prompt: &[u32], pieces: &[&str], stop: &[&str]) -> (String, Option<&'static str>) {
    let tokenizer = llama2();
    let options = TextOptions { eos_token_ids: vec![], stop_token_ids: vec![], ..options(stop) };
    let mut assembly = Assembly::new(&tokenizer, &options, prompt);
    let ids = pieces.iter().map(|piece| tokenizer.token_id(piece).unwrap());
    let events = ids
        .map(|id| Event::Token { choice: 0, token: token(id) })
        .chain([Event::Finished { choice: 0, reason: FinishReason::Length }]);
    let (mut out, mut end) = (String::new(), None);
    for event in events {
        if let Some(Update::Delta { text, finish, .. }) = assembly.on_event(event).unwrap() {
            out += &text;
            end = end.or(finish.map(|f| f.reason));
        }
    }
    (out, end)
}

#[test]
fn a_newline_that_ends_the_prompt_is_not_said_again() {
    let tokenizer = llama2();
    for prompt in ["hello world\n", "\n", "hello\n\n"] {
        let prompt = tokenizer.encode(prompt, true).unwrap();
        assert_eq!(tokenizer.token_string(*prompt.last().unwrap()), "<0x0A>");
        let (text, end) = go_on(&prompt, &["▁hello", "▁world"], &["\n"]);
        assert_eq!((text.as_str(), end), (" hello world", Some("length")));
        let (text, end) = go_on(&prompt, &["<0x0A>", "▁hello"], &[]);
        assert_eq!((text.as_str(), end), ("\n hello", Some("length")));
        let (text, end) = go_on(&prompt, &["h", "<0x0A>", "▁hello"], &["\n"]);
        assert_eq!((text.as_str(), end), ("h", Some("stop")));
        // Bytes that go on with the prompt's run, to a whole char, and to none.
        assert_eq!(go_on(&prompt, &["<0xC3>", "<0xA9>", "h"], &[]).0, "éh");
        assert_eq!(go_on(&prompt, &["<0xFF>", "h"], &[]).0, "\u{FFFD}h");
        assert_eq!(go_on(&prompt, &[], &[]).0, "");
    }
    let mut split = tokenizer.encode("hello\n", true).unwrap();
    split.push(tokenizer.token_id("<0xC3>").unwrap());
    assert_eq!(go_on(&split, &["<0xA9>", "h"], &[]).0, "éh", "a char the prompt left incomplete");
}

#[test]
fn an_echoed_prompt_shows_its_last_newline() {
    let tokenizer = llama2();
    let ids = tokenizer.encode("hello\n", false).unwrap();
    let mut detokenizer = Detokenizer::new(&tokenizer, true);
    let text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
    assert_eq!(text + &detokenizer.settle(), "hello\n");
    assert_eq!(detokenizer.settle(), "", "once");
    assert_eq!(detokenizer.push(tokenizer.token_id("▁world").unwrap()), " world");
}

#[test]
fn text_withheld_for_a_stop_string_is_released_at_the_end() {
    let (text, finish, _) = run(&options(&["d and"]), "Hello world", &[2], FinishReason::Stop);
    assert_eq!((text.as_str(), finish.reason), ("Hello world", "stop"));
}

#[test]
fn offsets_count_chars_not_bytes() {
    let (text, _, offsets) = run(&options(&[]), "é😀x", &[], FinishReason::Length);
    assert_eq!(text, "é😀x");
    // Two byte tokens of é, four of the emoji, one of x.
    assert_eq!(offsets, [0, 0, 1, 1, 1, 1, 2]);
}

#[test]
fn a_truncated_char_becomes_a_replacement_character() {
    let ids = tokenizer().encode("é", false).unwrap();
    let (text, finish, _) = run(&options(&[]), "a", &ids[..1], FinishReason::Length);
    assert_eq!((text.as_str(), finish.reason), ("a\u{FFFD}", "length"));
}

#[test]
fn choices_are_independent_and_late_tokens_are_dropped() {
    let tokenizer = tokenizer();
    let two = TextOptions { n: 2, ..options(&["l"]) };
    let mut assembly = Assembly::new(&tokenizer, &two, &[]);
    let mut send = |choice, text: &str| {
        let id = tokenizer.encode(text, false).unwrap()[0];
        assembly.on_event(Event::Token { choice, token: token(id) }).unwrap()
    };
    let Some(Update::Delta { text, finish, .. }) = send(0, "l") else { panic!() };
    assert_eq!((text.as_str(), finish.unwrap().reason), ("", "stop"));
    assert_eq!(send(0, "x"), None);
    assert!(matches!(send(1, "x"), Some(Update::Delta { choice: 1, finish: None, .. })));
    assert_eq!(send(7, "x"), None);
    assert!(!assembly.is_done());
    let failed = assembly.on_event(Event::Failed(EngineError::NonFiniteLogits));
    assert!(failed.is_err());
}
