//! What was asked and answered so far, so that a killed run does not ask it again.
//!
//! A file of JSON lines: first what it is of, then one line for every question and every answer as it came.
//! What is asked next never depends on the order in which they came, so that a run that goes on ends with
//! what it would have ended with.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::TrainError;
use super::self_study::Draft;
use super::teacher::Answered;

/// Questions and answers, kept in memory and, if it has one, in a file.
#[derive(Debug, Default)]
pub struct Journal {
    place: Option<Place>,
    drafts: HashMap<(u32, usize), Draft>,
    answers: HashMap<usize, Answered>,
}

#[derive(Debug)]
struct Place {
    path: PathBuf,
    source: String,
    /// Made with the first line, so that a run that never asked leaves nothing.
    file: Option<File>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Source { source: String },
    Draft { attempt: u32, index: usize, draft: Draft },
    Answer { index: usize, answer: Answered },
}

impl Journal {
    /// Goes on with the file at `path`, or begins it. `source` stands for everything that decides what is
    /// asked and answered.
    ///
    /// # Errors
    /// [`TrainError::Resume`] when the file is of another source; [`TrainError::Io`].
    pub fn open(path: &Path, source: &str) -> Result<Self, TrainError> {
        let mut journal = Self::default();
        let file = match OpenOptions::new().read(true).append(true).open(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            file => Some(file.map_err(|e| io("open", path, e))?),
        };
        if let Some(file) = &file {
            let whole = journal.read(path, file, source)?;
            // A kill can leave the beginning of a line.
            file.set_len(whole).map_err(|e| io("write", path, e))?;
        }
        journal.place = Some(Place { path: path.to_owned(), source: source.to_owned(), file });
        Ok(journal)
    }

    /// Takes the lines over; returns how many bytes of the file they are.
    fn read(&mut self, path: &Path, file: &File, source: &str) -> Result<u64, TrainError> {
        let (mut whole, mut text) = (0, Vec::new());
        let mut lines = BufReader::new(file);
        loop {
            text.clear();
            let read = lines.read_until(b'\n', &mut text).map_err(|e| io("read", path, e))?;
            if !text.ends_with(b"\n") {
                return Ok(whole);
            }
            let line = serde_json::from_slice(&text);
            match line {
                Ok(Line::Source { source: of }) if whole == 0 && of == source => {}
                Ok(Line::Draft { attempt, index, draft }) if whole > 0 => {
                    self.drafts.insert((attempt, index), draft);
                }
                Ok(Line::Answer { index, answer }) if whole > 0 => {
                    self.answers.insert(index, answer);
                }
                _ => {
                    let reason =
                        "it was begun with another document, model, or other options of the data";
                    return Err(TrainError::Resume {
                        path: path.to_owned(),
                        reason: reason.to_owned(),
                    });
                }
            }
            whole += read as u64;
        }
    }

    pub(super) fn draft(&self, attempt: u32, index: usize) -> Option<&Draft> {
        self.drafts.get(&(attempt, index))
    }

    pub(super) fn add_draft(
        &mut self,
        attempt: u32,
        index: usize,
        draft: Draft,
    ) -> Result<(), TrainError> {
        self.append(&Line::Draft { attempt, index, draft: draft.clone() })?;
        self.drafts.insert((attempt, index), draft);
        Ok(())
    }

    pub(super) fn answer(&self, index: usize) -> Option<&Answered> {
        self.answers.get(&index)
    }

    pub(super) fn add_answer(&mut self, index: usize, answer: Answered) -> Result<(), TrainError> {
        self.append(&Line::Answer { index, answer: answer.clone() })?;
        self.answers.insert(index, answer);
        Ok(())
    }

    /// Deletes the file: what it was for is kept elsewhere, or came to nothing.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn remove(&mut self) -> Result<(), TrainError> {
        match self.place.take() {
            Some(Place { path, file: Some(_), .. }) => {
                std::fs::remove_file(&path).map_err(|e| io("remove", &path, e))
            }
            _ => Ok(()),
        }
    }

    fn append(&mut self, line: &Line) -> Result<(), TrainError> {
        let Some(Place { path, source, file }) = &mut self.place else { return Ok(()) };
        let file = match file {
            Some(file) => file,
            none => {
                let made = OpenOptions::new().append(true).create(true).open(&*path);
                none.insert(made.map_err(|e| io("make", path, e))?)
            }
        };
        if file.metadata().map_err(|e| io("read", path, e))?.len() == 0 {
            write(path, file, &Line::Source { source: source.clone() })?;
        }
        write(path, file, line)
    }
}

/// In one write, so that only a kill in the middle of it leaves half a line.
fn write(path: &Path, file: &mut File, line: &Line) -> Result<(), TrainError> {
    let text = serde_json::to_string(line).map_err(|e| io("write", path, e.into()))? + "\n";
    file.write_all(text.as_bytes()).map_err(|e| io("write", path, e))
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> TrainError {
    TrainError::Io { action, path: path.to_owned(), source }
}
