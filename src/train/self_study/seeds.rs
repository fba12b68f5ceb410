//! Seed prompts: what the model is told to write a message about. The kinds are those of the paper.

use std::path::Path;

use clap::ValueEnum;
use rand::Rng;
use serde::{Deserialize, Serialize};

use super::{Purpose, SelfStudyError, random};
use crate::limits::MAX_SEED_PROMPTS_BYTES;

/// What a seed prompt makes the model ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum SeedKind {
    /// Facts of the text in a data format
    Structuring,
    /// A summary of a part
    Summarization,
    /// A question the text answers
    Question,
    /// A task of somebody who works with the text
    UseCase,
    /// Something new made of the text
    Creative,
    /// The lines of --seed-prompts
    Own,
}

/// A seed prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seed {
    pub kind: SeedKind,
    pub text: String,
}

/// Ends every prompt of ours. Short: small models lose the task over more.
const FORM: &str = "Name what it is about. Write only the message itself.";

impl SeedKind {
    /// The kinds that have prompts of ours.
    pub const BUILT_IN: [Self; 5] =
        [Self::Structuring, Self::Summarization, Self::Question, Self::UseCase, Self::Creative];

    /// The built-in prompts of this kind.
    pub fn seeds(self) -> Vec<Seed> {
        let texts: &[&str] = match self {
            Self::Structuring => &[
                "Write a message of a user who wants some of the facts of the text above as JSON. Say which \
                 facts, and which keys the answer should have.",
                "Write a message of a user who wants some of the facts of the text above as YAML. Say which \
                 facts.",
                "Write a message of a user who wants part of the text above as a table with named columns. \
                 Say which part, and the columns.",
                "Write a message of a user who wants everything the text above says about one subject as a \
                 list in plain text. Name the subject.",
                "Write a message of a user who wants some of the facts of the text above in XML or TOML. Say \
                 which facts, and in which of the two.",
            ],
            Self::Summarization => &[
                "Write a message of a user who asks for a summary of one part of the text above. Name the \
                 part.",
                "Write a message of a user who wants to know in a few sentences what the text above says \
                 about one of its subjects.",
                "Write a message of a user who asks for the most important points of the text above on one \
                 subject, and says how long the answer may be.",
            ],
            Self::Question => &[
                "Write one question that the text above answers. Ask about a detail: a name, a number, a \
                 date, a place or a term.",
                "Write one question whose answer takes two or more facts of the text above together.",
                "Write one question about why or how something in the text above is as it is.",
                "Write one question that compares two things of the text above.",
                "Write one question that tests whether somebody has read the text above with care.",
                "Write one short question, as somebody in a hurry would type it, that the text above answers.",
            ],
            Self::UseCase => &[
                "Think of somebody who needs the text above for their work, and of one thing they have to \
                 get done with it. Write the message in which they ask for help.",
                "Think of a decision that depends on what the text above says. Write the message of a user \
                 who has to take it and asks what to do.",
                "Think of a mistake that somebody could make who does not know the text above. Write the \
                 message of a user who is about to make it and asks for advice.",
            ],
            Self::Creative => &[
                "Write a message of a user who wants something made of the text above that is not in it: a \
                 story, a dialogue, a poem, a quiz or a letter. Say what about.",
                "Write a message of a user who asks to have something of the text above explained to a \
                 child, or by a comparison with everyday things. Name it.",
                "Write a message of a user who asks what would be different if one fact of the text above \
                 were another. Name the fact.",
            ],
            Self::Own => &[],
        };
        let seed = |text: &&str| Seed { kind: self, text: format!("{text} {FORM}") };
        texts.iter().map(seed).collect()
    }
}

/// The seed prompts of a file: one on each line that is not blank.
///
/// # Errors
/// [`SelfStudyError`] when it cannot be read, is too large or has none.
pub fn own_seeds(path: &Path) -> Result<Vec<Seed>, SelfStudyError> {
    let io = |source| SelfStudyError::Io { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(io)?.len() > MAX_SEED_PROMPTS_BYTES {
        return Err(SelfStudyError::SeedsTooLarge { path: path.to_owned() });
    }
    let text = std::fs::read_to_string(path).map_err(io)?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let seeds: Vec<Seed> =
        lines.map(|line| Seed { kind: SeedKind::Own, text: line.to_owned() }).collect();
    match seeds.is_empty() {
        true => Err(SelfStudyError::SeedsEmpty { path: path.to_owned() }),
        false => Ok(seeds),
    }
}

/// The seed of conversation `index` in its `attempt`-th try: kinds take turns, within one it is drawn.
pub(super) fn draw(seeds: &[Seed], seed: u64, index: usize, attempt: u32) -> Option<&Seed> {
    let mut kinds: Vec<SeedKind> = Vec::new();
    for seed in seeds {
        if !kinds.contains(&seed.kind) {
            kinds.push(seed.kind);
        }
    }
    let kind = *kinds.get((index + attempt as usize) % kinds.len().max(1))?;
    let of_kind: Vec<&Seed> = seeds.iter().filter(|seed| seed.kind == kind).collect();
    let drawn = random(seed, Purpose::Seed, index, attempt).next_u64() % of_kind.len() as u64;
    of_kind.get(drawn as usize).copied()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn all() -> Vec<Seed> {
        SeedKind::BUILT_IN.into_iter().flat_map(SeedKind::seeds).collect()
    }

    #[test]
    fn every_kind_takes_its_turn_and_every_prompt_is_drawn() {
        let seeds = all();
        let drawn: Vec<&Seed> = (0..500).map(|i| draw(&seeds, 7, i, 0).unwrap()).collect();
        for kind in SeedKind::BUILT_IN {
            assert_eq!(drawn.iter().filter(|seed| seed.kind == kind).count(), 100);
        }
        let texts: HashSet<&str> = drawn.iter().map(|seed| &*seed.text).collect();
        assert_eq!(texts.len(), seeds.len());
        let again: Vec<&Seed> = (0..500).map(|i| draw(&seeds, 7, i, 0).unwrap()).collect();
        let other: Vec<&Seed> = (0..500).map(|i| draw(&seeds, 8, i, 0).unwrap()).collect();
        assert!(drawn == again && drawn != other);
        assert_ne!(drawn[0].kind, draw(&seeds, 7, 0, 1).unwrap().kind, "another try, another kind");
        assert_eq!(draw(&[], 7, 0, 0), None);
    }

    #[test]
    fn a_file_of_seed_prompts_has_one_on_each_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seeds.txt");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            own_seeds(&path)
        };
        let seeds = read("Ask about ships.\r\n\n  Ask about light.").unwrap();
        let texts: Vec<&str> = seeds.iter().map(|seed| &*seed.text).collect();
        assert_eq!(texts, ["Ask about ships.", "Ask about light."]);
        assert!(seeds.iter().all(|seed| seed.kind == SeedKind::Own));
        assert!(matches!(read("\n \n"), Err(SelfStudyError::SeedsEmpty { .. })));
        let large = "x".repeat(MAX_SEED_PROMPTS_BYTES as usize + 1);
        assert!(matches!(read(&large), Err(SelfStudyError::SeedsTooLarge { .. })));
        assert!(matches!(own_seeds(dir.path()), Err(SelfStudyError::Io { .. })));
    }
}
