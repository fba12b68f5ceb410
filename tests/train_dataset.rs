//! Dataset files: what Gen-2 writes, what we write, and what must be refused.

mod api_support;

use std::path::{Path, PathBuf};

use api_support::Server;
use cartouche::demo;
use cartouche::text::{ChatTemplate, Tokenizer};
use cartouche::train::dataset::{
    ChatFormat, Conversation, DatasetError, DatasetReader, ElementBuilder, ElementOptions, MassCut,
    Message, RowError, TargetMode, TopLogprobs, load_elements, write_parquet,
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/datasets").join(name)
}

fn rows(path: &Path) -> Vec<Result<(usize, Conversation), DatasetError>> {
    match DatasetReader::open(path) {
        Ok(reader) => reader.collect(),
        Err(e) => vec![Err(e)],
    }
}

fn conversations(path: &Path) -> Vec<Conversation> {
    rows(path).into_iter().map(|row| row.unwrap().1).collect()
}

/// The only error of a file.
fn refusal(path: &Path) -> DatasetError {
    let mut rows = rows(path);
    assert_eq!(rows.len(), 1, "{rows:?}");
    rows.remove(0).unwrap_err()
}

fn file(content: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), content).unwrap();
    file
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned(), ..Message::default() }
}

/// The rows of `scripts/fixtures/train_dataset.py`.
fn expected() -> [Conversation; 2] {
    let flat = |idx: &[i64], ids: &[i64], logprobs: &[f32], shape: &[i64]| {
        Some(TopLogprobs::flat(idx, ids, logprobs, Some(shape)).unwrap())
    };
    let (idx, ids, logprobs) = ([0, 0, 1, 3], [11, 40, 12, 2], [-0.5, -1.5, -0.25, -0.125]);
    let answer = Message {
        token_ids: Some(vec![11, 12, 13, 2]),
        top_logprobs: flat(&idx, &ids, &logprobs, &[4, 20]),
        ..message("assistant", "At six.")
    };
    let empty = Message {
        token_ids: Some(vec![]),
        top_logprobs: flat(&[], &[], &[], &[0, 20]),
        ..message("assistant", "")
    };
    [
        Conversation {
            messages: vec![message("user", "When does the harbour open?"), answer],
            system_prompt: Some("You know the harbour log.".to_owned()),
            kind: Some("todo".to_owned()),
            metadata: json!({"tool_calls": [], "seed_prompt": "Ask about times."}),
        },
        Conversation {
            messages: vec![message("user", "Grüße, 港"), empty],
            ..Conversation::default()
        },
    ]
}

#[test]
fn a_file_of_gen2_is_read() {
    assert_eq!(conversations(&fixture("gen2.parquet")), expected());
    let many = conversations(&fixture("row_groups_v2.parquet"));
    assert_eq!(many, [expected(), expected(), expected()].concat());
    let numbers: Vec<usize> =
        rows(&fixture("row_groups_v2.parquet")).into_iter().map(|r| r.unwrap().0).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
}

#[test]
fn parquet_that_is_not_read_says_what_to_do() {
    for (name, says) in [
        ("zstd.parquet", "write it with snappy"),
        ("no_messages.parquet", "no column `messages` (it has: text)"),
        ("text_messages.parquet", "row 1: messages is a string; it should be a list"),
        ("delta.parquet", "write it with plain"),
    ] {
        let e = refusal(&fixture(name)).to_string();
        assert!(e.contains(says) && e.contains(name), "{e}");
    }
    let e = refusal(file(b"PAR1").path()).to_string();
    assert!(e.contains("is no Parquet file"), "{e}");
}

/// No byte of a file may end the process, or make it wait or take memory without bound.
#[test]
fn damaged_parquet_gives_errors() {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let (mut refused, mut read) = (0, 0);
    for name in ["gen2.parquet", "row_groups_v2.parquet"] {
        let good = std::fs::read(fixture(name)).unwrap();
        for _ in 0..800 {
            let mut bytes = good.clone();
            for _ in 0..=random.next_u32() % 3 {
                let at = random.next_u32() as usize % bytes.len();
                bytes[at] = random.next_u32() as u8;
            }
            if random.next_u32() % 8 == 0 {
                bytes.truncate(random.next_u32() as usize % bytes.len());
            }
            let file = file(&bytes);
            let rows = rows(file.path());
            assert!(rows.len() <= 1 << 20);
            match rows.iter().any(Result::is_err) {
                true => refused += 1,
                false => read += 1,
            }
        }
    }
    // Some damage shows only as another letter; a reader that gave up at once would read nothing.
    assert!(refused > 150 && read > 150, "{refused} refused, {read} read");
}

/// Deep schemas recurse in the Parquet crate; ones that are too deep for a thread's stack must be refused.
#[test]
fn a_deep_schema_gives_an_error() {
    use parquet::file::writer::SerializedFileWriter;
    for depth in [10, 30, 31, 100] {
        let opened = "optional group metadata { ".repeat(depth);
        let schema = format!(
            "message schema {{ optional binary messages (STRING); {opened} optional int32 x; {} }}",
            "} ".repeat(depth)
        );
        let schema = parquet::schema::parser::parse_message_type(&schema).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let handle = file.reopen().unwrap();
        let writer = SerializedFileWriter::new(handle, schema.into(), Default::default()).unwrap();
        writer.close().unwrap();
        let e = refusal(file.path());
        match depth <= 30 {
            true => assert!(matches!(e, DatasetError::Empty { .. }), "{e}"),
            false => assert!(e.to_string().contains("levels"), "{e}"),
        }
    }
}

#[test]
fn json_lines_have_four_forms() {
    let flat = json!({"token_idx": [0, 0, 1], "token_id": [5, 6, 7], "logprobs": [-0.5, -1, -0.1],
        "shape": [2, 2]});
    let ids = json!([[5, 6], [7, -1]]);
    let logprobs = json!([[-0.5, -1.0], [-0.1, null]]);
    let answer = |more: Value| {
        let mut message = json!({"role": "assistant", "content": "x", "token_ids": [5, 7]});
        message.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"messages": [{"role": "user", "content": "q", "name": "u"}, message], "extra": 1})
    };
    let lines = [
        answer(json!({"top_logprobs": flat})),
        answer(json!({"top_logprobs": {"token_ids": ids, "logprobs": logprobs}})),
        answer(json!({"top_logprobs": {"top_logprob_ids": ids, "top_logprob_logprobs": logprobs}})),
        answer(json!({"top_logprob_ids": ids, "top_logprob_logprobs": logprobs})),
        answer(json!({"top_logprobs": null})),
    ];
    let text: String = lines.iter().map(|line| format!("{line}\n\n")).collect();
    let all = conversations(file(format!("\u{FEFF}{text}").as_bytes()).path());
    assert_eq!(all.len(), 5);
    for (index, conversation) in all.iter().enumerate() {
        let [question, answer] = &conversation.messages[..] else { panic!() };
        assert_eq!(*question, message("user", "q"));
        assert_eq!(answer.token_ids.as_deref(), Some(&[5, 7][..]));
        let top = answer.top_logprobs.as_ref();
        let entries = top.map(|top| top.entries().collect::<Vec<_>>());
        let wanted = vec![(0, 5, -0.5), (0, 6, -1.0), (1, 7, -0.1)];
        assert_eq!(entries, (index < 4).then_some(wanted), "row {index}");
    }
    let plain = r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"text":"b"}]}],
        "system_prompt":"s","type":"t","metadata":{"k":[1]}}"#;
    let plain = &conversations(file(plain.replace('\n', "").as_bytes()).path())[0];
    assert_eq!(plain.messages, [message("user", "ab")]);
    assert_eq!((plain.system_prompt.as_deref(), plain.kind.as_deref()), (Some("s"), Some("t")));
    assert_eq!(plain.metadata, json!({"k": [1]}));
}

#[test]
fn a_bad_row_is_named_and_costs_no_other() {
    let good = r#"{"messages":[{"role":"user","content":"q"}]}"#;
    let top = |top: &str| {
        format!(r#"{{"messages":[{{"role":"assistant","content":"x","top_logprobs":{top}}}]}}"#)
    };
    for (bad, says) in [
        ("nonsense", "is no conversation"),
        (r#"{"messages":[]}"#, "`messages` is empty"),
        ("{}", "missing field `messages`"),
        ("[]", "is no conversation"),
        (r#"{"messages":[{"content":"q"}]}"#, "message 0 has no `role`"),
        (r#"{"messages":[{"role":"user"}]}"#, "message 0 has neither"),
        (r#"{"messages":[{"role":"user","content":3}]}"#, "messages[0].content: expected a string"),
        (r#"{"messages":[{"role":"user","token_ids":[-4]}]}"#, "`token_ids` has -4"),
        (r#"{"messages":[{"role":"user","content":"q"}],"metadata":3}"#, "`metadata`"),
        (&format!("{good} {good}"), "more than one value"),
        (&top(r#"{"token_idx":[0],"token_id":[1,2],"logprobs":[-1,-1]}"#), "1 token_idx, 2"),
        (&top(r#"{"token_id":[1],"logprobs":[-1]}"#), "either token_idx"),
        (&top(r#"{"token_idx":[0],"token_id":[1],"logprobs":[0.5],"shape":[1,1]}"#), "0.5"),
        (&top("[]"), "top_logprobs"),
    ] {
        let file = file(format!("{good}\n\n{bad}\r\n{good}").as_bytes());
        let rows = rows(file.path());
        assert_eq!(rows.len(), 3, "{bad}");
        assert_eq!((rows[0].as_ref().unwrap().0, rows[2].as_ref().unwrap().0), (1, 4));
        let e = rows[1].as_ref().unwrap_err().to_string();
        assert!(e.contains("row 3: ") && e.contains(says), "{bad}: {e}");
    }
}

#[test]
fn a_line_without_end_is_not_taken_into_memory() {
    let good = r#"{"messages":[{"role":"user","content":"q"}]}"#;
    let long = " ".repeat(cartouche::limits::MAX_DATASET_LINE_BYTES + 9);
    let rows = rows(file(format!("{{{long}\n{good}\n").as_bytes()).path());
    assert!(matches!(rows[0], Err(DatasetError::Row { row: 1, error: RowError::LineTooLong, .. })));
    assert_eq!(rows[1].as_ref().unwrap().0, 2);
    assert_eq!(rows.len(), 2);
}

#[test]
fn files_without_rows_are_refused() {
    for content in ["", "\n\n"] {
        let e = refusal(file(content.as_bytes()).path());
        assert!(matches!(e, DatasetError::Empty { .. }), "{e}");
    }
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(refusal(folder.path()), DatasetError::NotAFile { .. }));
    assert!(matches!(refusal(&folder.path().join("none")), DatasetError::Io { .. }));
    let e = write_parquet(&folder.path().join("x.parquet"), &[]).unwrap_err();
    assert!(matches!(e, DatasetError::Empty { .. }), "{e}");
}

fn any_message() -> impl Strategy<Value = Message> {
    let entry = (0u32..4, 0i64..1000, -20.0f32..0.0);
    let top = prop::collection::vec(entry, 0..8).prop_map(|entries| {
        let idx: Vec<i64> = entries.iter().map(|e| e.0.into()).collect();
        let ids: Vec<i64> = entries.iter().map(|e| e.1).collect();
        let logprobs: Vec<f32> = entries.iter().map(|e| e.2).collect();
        TopLogprobs::flat(&idx, &ids, &logprobs, Some(&[4, 8])).unwrap()
    });
    let ids = prop::option::of(prop::collection::vec(any::<u32>(), 0..5));
    ("[a-z]{1,9}", ".{0,12}", ids, prop::option::of(top)).prop_map(
        |(role, content, token_ids, top_logprobs)| Message {
            role,
            content,
            token_ids,
            top_logprobs,
        },
    )
}

fn any_conversation() -> impl Strategy<Value = Conversation> {
    let text = || prop::option::of(".{0,9}");
    let metadata = prop_oneof![
        Just(Value::Null),
        (any::<i64>(), any::<bool>(), -1e9..1e9, ".{0,9}").prop_map(
            |(n, b, x, s): (i64, bool, f64, String)| json!({"n": n, "b": b, "x": x, "s": s}),
        ),
        ".{0,9}".prop_map(|s| json!({"s": s})),
        Just(json!({})),
    ];
    let messages = prop::collection::vec(any_message(), 1..5);
    (messages, text(), text(), metadata).prop_map(|(messages, system_prompt, kind, metadata)| {
        Conversation { messages, system_prompt, kind, metadata }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_is_written_is_read_again(all in prop::collection::vec(any_conversation(), 1..8)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dataset.parquet");
        write_parquet(&path, &all).unwrap();
        prop_assert_eq!(conversations(&path), all);
        prop_assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

#[test]
fn many_rows_make_several_row_groups() {
    let all: Vec<Conversation> = expected().into_iter().cycle().take(2501).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dataset.parquet");
    write_parquet(&path, &all).unwrap();
    let read = conversations(&path);
    assert_eq!(read.len(), all.len());
    // An empty list becomes text, as its members have no type.
    assert_eq!(read[0].metadata, json!({"tool_calls": "[]", "seed_prompt": "Ask about times."}));
    assert_eq!(read[2500].messages, all[2500].messages);
    // For `scripts/fixtures/train_dataset.py FILE`.
    if let Some(keep) = std::env::var_os("CARTOUCHE_KEEP_DATASET") {
        std::fs::copy(path, keep).unwrap();
    }
}

/// Training sees the tokens that a chat request with the same messages has.
#[tokio::test]
async fn elements_have_the_tokens_of_a_chat_request() {
    let tokenizer = Tokenizer::from_bytes(demo::model_file("tokenizer.json").unwrap()).unwrap();
    let config = demo::model_file("tokenizer_config.json").unwrap();
    let config: Value = serde_json::from_slice(config).unwrap();
    let template = ChatTemplate::from_config(&config, None).unwrap();
    let format = ChatFormat::detect(&tokenizer, template.as_ref()).unwrap();
    let mode = TargetMode::Tokens;
    let options = ElementOptions { mode, cut: MassCut::default(), vocab: tokenizer.vocab_size() };
    let builder = ElementBuilder::new(&tokenizer, format, options).unwrap();

    let messages = json!([
        {"role": "user", "content": "When did the harbour open?"},
        {"role": "assistant", "content": "At six."},
        {"role": "user", "content": "  Grüße, 港\n"},
        {"role": "assistant", "content": "None."},
    ]);
    let row = file(json!({"messages": messages, "system_prompt": "unseen"}).to_string().as_bytes());
    let elements = load_elements(row.path(), &builder, None).unwrap();
    let request = json!({"model": api_support::MODEL, "messages": messages, "max_tokens": 1,
        "add_generation_prompt": false, "continue_final_message": false, "return_token_ids": true});
    let reply = Server::shared().post("/v1/chat/completions", request).await.ok();
    assert_eq!(json!(elements[0].tokens), reply["prompt_token_ids"]);

    // Before each answer, the prompt of a request for it.
    let mut starts = elements[0].supervised.iter().map(|rows| rows.start as usize + 1);
    for count in [1, 3] {
        let messages = &messages.as_array().unwrap()[..count];
        let request = json!({"model": api_support::MODEL, "messages": messages, "max_tokens": 1,
            "return_token_ids": true});
        let reply = Server::shared().post("/v1/chat/completions", request).await.ok();
        let start = starts.next().unwrap();
        assert_eq!(json!(elements[0].tokens[..start]), reply["prompt_token_ids"]);
    }
}

#[test]
fn loading_stops_at_a_row_without_logprobs_and_at_the_limit() {
    let tokenizer = Tokenizer::from_bytes(demo::model_file("tokenizer.json").unwrap()).unwrap();
    let options = |mode, vocab| ElementOptions { mode, cut: MassCut::default(), vocab };
    let load = |options, limit| {
        let builder = ElementBuilder::new(&tokenizer, ChatFormat::Llama3, options).unwrap();
        load_elements(&fixture("gen2.parquet"), &builder, limit)
    };
    let e = load(options(TargetMode::Logits, 200_000), None).unwrap_err();
    let error = RowError::NoLogprobs;
    assert!(matches!(&e, DatasetError::Row { row: 2, error: found, .. } if *found == error), "{e}");
    assert!(e.to_string().contains("gen2.parquet: row 2: no message has log-prob"), "{e}");
    let one = load(options(TargetMode::Logits, 200_000), Some(1)).unwrap();
    assert_eq!((one.len(), one[0].row, one[0].targets.len()), (1, 1, 4));
    let e = load(options(TargetMode::Logits, 40), Some(1)).unwrap_err().to_string();
    assert!(
        e.contains("row 1: message 0: token id 128006") && e.contains("vocabulary of 40"),
        "{e}"
    );
    assert_eq!(load(options(TargetMode::Tokens, 200_000), None).unwrap().len(), 2);
}
