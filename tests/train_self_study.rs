//! Self-study as a user runs it, with the demo model. That model cannot ask: told by the built-in seed
//! prompts, it refuses. Seed prompts of the tests' own are questions, and its answers to them stand in for
//! messages of a user, which is enough to see that nothing is lost, repeated or cut on the way.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use cartouche::demo;
use cartouche::train::RunDir;
use cartouche::train::dataset::{Conversation, DatasetReader};

/// A folder that goes away.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name).display().to_string()
    }

    /// A command, in this folder.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cartouche"));
        // Nothing from the machine of whoever runs the tests.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CARTOUCHE_")) {
            command.env_remove(name);
        }
        command.current_dir(self.dir.path()).args(args);
        command
    }

    fn succeeds(&self, args: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.command(args).output().unwrap();
        assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
        String::from_utf8(stdout).unwrap()
    }

    fn fails(&self, args: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.command(args).output().unwrap();
        assert!(!status.success(), "{}", String::from_utf8_lossy(&stdout));
        let error = String::from_utf8_lossy(&stderr).into_owned();
        assert!(!error.contains("panicked"), "{error}");
        error
    }

    /// Seed prompts the demo model gives as many different answers to: a question for each fact of its log.
    fn seeds(&self) {
        let facts = demo::DOCUMENTS[0].text.lines().filter_map(|line| line.split(": ").nth(1));
        let questions: Vec<String> = facts.map(question).collect();
        assert!(questions.len() > 50, "{questions:?}");
        self.write("seeds.txt", &questions.join("\n"));
    }
}

fn conversations(path: &Path) -> Vec<Conversation> {
    DatasetReader::open(path).unwrap().map(|row| row.unwrap().1).collect()
}

/// Options by which the demo model writes messages.
const STUDY: &[&str] = &[
    "--document",
    "demo:harbour-log",
    "--seed-prompts",
    "seeds.txt",
    "--seed-kinds",
    "own",
    "--max-tokens-per-chunk",
    "2000",
    "--min-tokens-per-chunk",
    "2000",
    "--answer-tokens",
    "16",
    "--question-tokens",
    "32",
];

fn with<'a>(command: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&[command], STUDY, more].concat()
}

#[test]
fn a_model_that_cannot_ask_is_told_and_not_trained() {
    let place = Place::new();
    let error = place.fails(&[
        "train",
        "--document",
        "demo:harbour-log",
        "--num-samples",
        "16",
        "--run-dir",
        "run",
    ]);
    assert!(error.contains("the model cannot ask: of 16 messages"), "{error}");
    assert!(error.contains("said the same as another"), "{error}");
    assert!(error.contains("I do not know."), "{error}");
    assert!(error.contains("--conversations demo:NAME"), "{error}");
    // Nothing is left that other options would be refused for.
    assert_eq!(std::fs::read_dir(place.path("run")).unwrap().count(), 0);
}

/// A dataset in either format, and training in one go: the same conversations, the same packs, bit by bit.
#[test]
fn a_dataset_and_training_in_one_go_give_the_same_packs() {
    let place = Place::new();
    place.seeds();
    let samples = ["--num-samples", "24"];
    let out = |name: &'static str| [&samples[..], &["--out", name]].concat();
    place.succeeds(&with("synthesize", &out("set.jsonl")));
    place.succeeds(&with("synthesize", &[&out("set.parquet")[..], &["--threads", "1"]].concat()));
    let rows = conversations(&place.path("set.jsonl"));
    assert_eq!(rows, conversations(&place.path("set.parquet")));
    assert!(!place.path("set.jsonl.journal").exists());

    assert!((12..=24).contains(&rows.len()), "{}", rows.len());
    let asked: HashSet<&str> = rows.iter().map(|row| &*row.messages[0].content).collect();
    assert_eq!(asked.len(), rows.len(), "a question twice");
    for row in &rows {
        assert_eq!(row.messages.len(), 2);
        let answer = &row.messages[1];
        let tokens = answer.token_ids.as_ref().unwrap().len();
        assert_eq!(answer.top_logprobs.as_ref().unwrap().tokens() as usize, tokens);
        assert_eq!(row.metadata["seed_kind"], "own");
        assert_eq!(row.system_prompt, None, "the teacher had the whole document");
    }

    let steps = ["--max-optimizer-steps", "1", "--packed-seq-length", "256", "--run-dir"];
    place.succeeds(&with("train", &[&samples[..], &steps, &["in-process"]].concat()));
    let packs = |run: &str| RunDir::open(&place.path(run), 0).unwrap().packs().read().unwrap();
    let in_process = packs("in-process");
    assert_eq!(rows, conversations(&place.path("in-process/dataset.jsonl")));
    assert!(!place.path("in-process/packs.journal.jsonl").exists());
    for (file, run) in [("set.jsonl", "from-jsonl"), ("set.parquet", "from-parquet")] {
        let from = ["train", "--document", "demo:harbour-log", "--conversations", file];
        place.succeeds(&[&from[..], &steps, &[run]].concat());
        assert!(packs(run) == in_process, "{file}");
    }
}

/// Killed anywhere, synthesis goes on with what was finished, and ends with the same bytes.
#[test]
fn a_killed_synthesis_loses_only_what_was_not_finished() {
    let place = Place::new();
    place.seeds();
    let into = |out: &'static str| with("synthesize", &["--num-samples", "40", "--out", out]);
    place.succeeds(&into("whole.jsonl"));
    let journal = place.path("killed.jsonl.journal");
    let read = || std::fs::read_to_string(&journal).unwrap_or_default();
    let mut text = String::new();
    let mut kills = 0;
    // Once while it asks, once while it answers.
    for (what, wanted) in [("\"draft\"", 4), ("\"answer\"", 8)] {
        let mut child = place
            .command(&into("killed.jsonl"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let started = Instant::now();
        while read().matches(what).count() < wanted && child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < Duration::from_secs(120), "nothing is finished");
            std::thread::sleep(Duration::from_millis(1));
        }
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
        }
        child.wait().unwrap();
        if place.path("killed.jsonl").exists() || !journal.exists() {
            // It was faster than the kill: as it was before.
            let _ = std::fs::remove_file(place.path("killed.jsonl"));
            std::fs::write(&journal, &text).unwrap();
        } else {
            kills += 1;
            assert!(read().starts_with(text.rsplit_once('\n').map_or("", |(whole, _)| whole)));
            text = read();
        }
    }
    assert!(kills >= 1 && text.matches("\"draft\"").count() >= 4, "{kills} kills: {text}");

    // What a kill in the middle of a line leaves.
    std::fs::write(&journal, format!("{text}{{\"index\":3,\"ans")).unwrap();
    let error = place.fails(&[&into("killed.jsonl")[..], &["--seed", "7"]].concat());
    assert!(error.contains("killed.jsonl.journal") && error.contains("delete it"), "{error}");
    place.succeeds(&into("killed.jsonl"));
    let whole = std::fs::read(place.path("whole.jsonl")).unwrap();
    assert!(std::fs::read(place.path("killed.jsonl")).unwrap() == whole);
    assert!(!journal.exists());

    // It really goes on: an answer in the journal is not asked for again.
    let source = text.lines().next().unwrap();
    let draft = r#"{"attempt":0,"index":0,"draft":{"text":"Who wrote this?","is_finished":true}}"#;
    std::fs::write(place.path("marked.jsonl.journal"), format!("{source}\n{draft}\n")).unwrap();
    place.succeeds(&into("marked.jsonl"));
    let marked = conversations(&place.path("marked.jsonl"));
    assert_eq!(marked[0].messages[0].content, "Who wrote this?");
}

/// A document that does not fit the model's context: the teacher reads the chunk a question is about.
#[test]
fn a_long_document_is_taught_in_chunks() {
    let place = Place::new();
    // The same facts again and again, so that every chunk has them.
    let facts: Vec<&str> = demo::DOCUMENTS[0].text.lines().skip(2).take(16).collect();
    let text = format!("{}\n", facts.join("\n")).repeat(8);
    let document = place.write("long.txt", &text);
    let seeds: Vec<String> =
        facts.iter().filter_map(|fact| fact.split(": ").nth(1)).map(question).collect();
    let seeds = place.write("seeds.txt", &seeds.join("\n"));
    let study = [
        "--document",
        &document,
        "--seed-prompts",
        &seeds,
        "--seed-kinds",
        "own",
        "--min-tokens-per-chunk",
        "240",
        "--max-tokens-per-chunk",
        "280",
        "--conversations-per-chunk",
        "1",
        "--num-samples",
        "12",
        "--question-tokens",
        "24",
        "--answer-tokens",
        "16",
        "--kv-cache-mib",
        "2",
    ];
    let run = ["--max-optimizer-steps", "1", "--tokens", "16", "--run-dir", "run"];
    let said = place.succeeds(&[&["train"], &study[..], &run].concat());
    assert!(said.contains("the teacher reads the part"), "{said}");
    let rows = conversations(&place.path("run/dataset.jsonl"));
    assert!(rows.len() >= 6);
    for row in &rows {
        let at = |name: &str| row.metadata[name].as_u64().unwrap() as usize;
        let chunk = text[at("chunk_begin")..at("chunk_end")].trim();
        assert_eq!(row.system_prompt.as_deref(), Some(chunk));
    }
    let chunks: HashSet<_> = rows.iter().map(|row| row.system_prompt.as_deref()).collect();
    assert!(chunks.len() > 4, "{}", chunks.len());

    let error = place.fails(&[&["train"], &study[..], &["--teacher-context", "document"]].concat());
    assert!(error.contains("the document of") && error.contains("exceeds"), "{error}");
    let larger = ["--max-tokens-per-chunk", "680"];
    let mut too_large = study.to_vec();
    too_large.drain(8..10);
    let error = place.fails(&[&["train"], &too_large[..], &larger].concat());
    assert!(error.contains("a chunk of 680") && error.contains("max_tokens_per_chunk"), "{error}");
    // Questions of the user's are about all of it.
    let questions = "{\"messages\": [{\"role\": \"user\", \"content\": \"Who keeps Ondar?\"}]}\n";
    let questions = place.write("questions.jsonl", questions);
    let given = ["train", "--document", &document, "--conversations", &questions];
    let error = place.fails(&[&given[..], &["--kv-cache-mib", "2"]].concat());
    assert!(error.contains("row 1") && error.contains("leave out --conversations"), "{error}");
}

/// "the boat of Holness is Kestrel." as a question the demo model knows.
fn question(fact: &str) -> String {
    let words: Vec<&str> = fact.trim_end_matches('.').split(' ').collect();
    match words[..] {
        ["the", what, "of" | "above", subject, ..] => format!("What is the {what} of {subject}?"),
        ["at", subject, "the", what, ..] => format!("What is the {what} of {subject}?"),
        ["the", "ships", "from", subject, ..] => format!("What is the cargo of {subject}?"),
        ["the", "light", "at", subject, ..] => format!("Who is the keeper of {subject}?"),
        ["the", what, _, _, subject, ..] => format!("What is the {what} of {subject}?"),
        _ => format!("Tell me of {fact}"),
    }
}

#[test]
fn options_that_make_no_sense_are_refused_before_anything_is_asked() {
    let place = Place::new();
    place.seeds();
    place.write("blank.txt", "\n");
    let cases: &[(&[&str], &str)] = &[
        (
            &["--conversations", "demo:harbour-log", "--num-samples", "3"],
            "--num-samples is of self",
        ),
        (&["--limit", "3"], "--num-samples says"),
        (&["--num-samples", "0"], "0 conversations"),
        (&["--num-samples", "1000000"], "131072"),
        (&["--conversations-per-chunk", "0"], "at least 1"),
        (&["--min-tokens-per-chunk", "9", "--max-tokens-per-chunk", "8"], "9 to 8"),
        (&["--seed-kinds", "own"], "need each other"),
        (&["--seed-kinds", "poem"], "structuring"),
        (&["--seed-kinds", "question", "--seed-prompts", "seeds.txt"], "need each other"),
        (&["--seed-prompts", "blank.txt"], "one on each line"),
        (&["--seed-prompts", "missing.txt"], "missing.txt"),
        (&["--question-temperature=-1"], "question_temperature"),
        (&["--answer-temperature=-1"], "answer_temperature"),
        (&["--answer-temperature", "nan"], "must be a number"),
        (&["--question-tokens", "4000"], "4096"),
    ];
    for (args, said) in cases {
        let error = place.fails(
            &[&["synthesize", "--document", "demo:harbour-log", "--out", "x.jsonl"], *args]
                .concat(),
        );
        assert!(error.contains(said), "{args:?}: {error}");
        assert!(!place.path("x.jsonl.journal").exists(), "{args:?}");
    }
    let error = place.fails(&["synthesize", "--document", "demo:harbour-log", "--out", "x.csv"]);
    assert!(error.contains(".parquet or .jsonl"), "{error}");
    let error =
        place.fails(&["synthesize", "--document", "demo:harbour-log", "--out", "seeds.txt"]);
    assert!(error.contains(".parquet or .jsonl"), "{error}");
    place.write("there.jsonl", "");
    let error =
        place.fails(&["synthesize", "--document", "demo:harbour-log", "--out", "there.jsonl"]);
    assert!(error.contains("there already"), "{error}");
}
