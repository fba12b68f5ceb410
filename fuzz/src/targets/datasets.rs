//! Training data: JSON lines and Parquet files of conversations.

use std::{
    fs::{self, File},
    io::Write,
    path::PathBuf,
};

use cartouche::train::dataset::{Conversation, DatasetError, DatasetReader, write_jsonl};
use rand::RngExt;

use super::{Bounds, Linear, Outcome, Target, files, one_in};
use crate::mutate::{self, Random};

pub const JSON_LINES: Target = Target {
    name: "dataset_jsonl",
    seeds: json_lines,
    mutate: |data, random| mutate_lines(data, random),
    run: |data| run(data),
    bounds: Bounds {
        memory: Linear { base: 256 << 10, per_byte: 200 },
        work: Linear { base: 4 << 20, per_byte: 2000 },
    },
    needs_system: true,
};

pub const PARQUET: Target = Target {
    name: "dataset_parquet",
    seeds: || files("datasets"),
    mutate: |data, random| mutate::bytes(data, random),
    run: |data| run(data),
    // Repeated values take next to no room in a file: `MIN_PARQUET_VALUES` of them may come out of any.
    bounds: Bounds {
        memory: Linear { base: 1 << 30, per_byte: 4000 },
        work: Linear { base: 4 << 30, per_byte: 100_000 },
    },
    needs_system: true,
};

const KEYS: [&str; 20] = [
    "messages",
    "role",
    "content",
    "token_ids",
    "top_logprobs",
    "token_idx",
    "token_id",
    "logprobs",
    "shape",
    "top_logprob_ids",
    "top_logprob_logprobs",
    "system_prompt",
    "type",
    "metadata",
    "text",
    "user",
    "assistant",
    "a",
    "",
    "0",
];

fn json_lines() -> Vec<Vec<u8>> {
    let rows = [
        r#"{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Yo","token_ids":[5,6],"top_logprobs":{"token_idx":[0,0,1],"token_id":[5,7,6],"logprobs":[-0.1,-2.5,null],"shape":[2,20]}}],"system_prompt":"s","type":"t","metadata":{"a":[1]}}"#,
        r#"{"messages":[{"role":"assistant","content":[{"type":"text","text":"a"},{"text":"b"}],"token_ids":[1],"top_logprobs":{"token_ids":[[1,2]],"logprobs":[[-0.5,-1000]]}}]}"#,
        r#"{"messages":[{"role":"assistant","content":null,"token_ids":[1,2],"top_logprob_ids":[[1],[2]],"top_logprob_logprobs":[[-1],[-2]]}],"metadata":null}"#,
    ];
    let mut seeds: Vec<Vec<u8>> = rows.iter().map(|row| row.as_bytes().to_vec()).collect();
    seeds.push(format!("\u{feff}{}\r\n\n{}\n{}", rows[0], rows[1], rows[2]).into_bytes());
    seeds
}

/// Changes one line as JSON, or the lines as text.
fn mutate_lines(data: &mut Vec<u8>, random: &mut Random) {
    if random.random_range(0..6) == 0 {
        return mutate::bytes(data, random);
    }
    let mut lines: Vec<Vec<u8>> = data.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    let at = random.random_range(0..lines.len());
    match random.random_range(0..8) {
        0 => lines.push(lines[at].clone()),
        1 => drop(lines.remove(at)),
        _ => mutate::json(&mut lines[at], &KEYS, random),
    }
    *data = lines.join(&b'\n');
    data.truncate(32 << 10);
}

thread_local! {
    static FOLDER: tempfile::TempDir = folder();
}

/// In memory where there is such a place: hundreds of thousands of files are written.
fn folder() -> tempfile::TempDir {
    let memory = PathBuf::from("/dev/shm");
    let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    folder.expect("a folder")
}

fn run(data: &[u8]) -> Outcome {
    let (path, again) = FOLDER.with(|folder| (folder.path().join("a"), folder.path().join("b")));
    let file = File::create(&path).and_then(|mut file| file.write_all(data));
    file.expect("a file in the folder of the test");
    let reader = match DatasetReader::open(&path) {
        Ok(reader) => reader,
        Err(error) => return Outcome::refused(reason(&error)),
    };
    let (mut rows, mut wrong, mut last) = (Vec::new(), 0, None);
    for item in reader {
        match item {
            Ok((_, conversation)) => {
                check(&conversation);
                rows.push(conversation);
            }
            Err(error) => {
                wrong += 1;
                last = Some(error);
            }
        }
    }
    if let Some(error) = last
        && rows.is_empty()
    {
        return Outcome::refused(reason(&error));
    }
    if one_in(16, data) {
        write_jsonl(&again, &rows).expect("what was read can be written");
        let read: Result<Vec<_>, _> = DatasetReader::open(&again)
            .expect("what was written can be read")
            .map(|row| row.map(|(_, conversation)| conversation))
            .collect();
        assert_eq!(read.expect("what was written can be read"), rows);
        let _ = fs::remove_file(&again);
    }
    Outcome::accepted(format!("{} rows, {} wrong", rows.len().min(3), wrong.min(3)))
}

fn reason(error: &DatasetError) -> String {
    match error {
        DatasetError::Row { error, .. } => error.to_string(),
        DatasetError::Parquet { reason, .. } => reason.clone(),
        DatasetError::TooLarge { what, .. } => (*what).to_owned(),
        DatasetError::Empty { .. } => "empty".to_owned(),
        DatasetError::Io { source, .. } => source.kind().to_string(),
        DatasetError::NotAFile { .. } => "no file".to_owned(),
    }
}

/// What a row promises to whoever trains on it.
fn check(conversation: &Conversation) {
    assert!(!conversation.messages.is_empty());
    assert!(conversation.metadata.is_object() || conversation.metadata.is_null());
    for message in &conversation.messages {
        assert!(!message.role.is_empty());
        let Some(top) = &message.top_logprobs else { continue };
        assert!(
            top.positions().len() == top.ids().len() && top.ids().len() == top.logprobs().len()
        );
        assert!(top.positions().is_sorted());
        assert!(top.logprobs().iter().all(|logprob| *logprob <= 0.011 && *logprob > -1000.0));
        // That these are positions of the message is checked when its tokens are known.
        assert!(top.positions().iter().all(|at| *at < top.tokens()));
    }
}
