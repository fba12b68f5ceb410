//! Which cartridges a key may name.
//!
//! Ids are compared as the folders they lead to: `team/a` and `team-a` are one cartridge of the cartridge
//! directory, so one of them must not open a door that the other closes. Remote sources tell them apart, so
//! there an id must match as it is written too.

use crate::{
    cartridge::{Origin, Source, folder_name},
    limits,
};

/// A list of ids and patterns, or everything.
#[derive(Debug, Clone, Default)]
pub struct Scope(Option<Vec<Pattern>>);

#[derive(Debug, Clone)]
struct Pattern {
    /// Pieces with anything between them: as they are written, and of a folder's name.
    written: Vec<String>,
    folder: Vec<String>,
}

impl Scope {
    /// Of ids, in which `*` stands for any run of characters, slashes too.
    ///
    /// # Errors
    /// What is wrong with which pattern.
    pub fn new(patterns: &[String]) -> Result<Self, String> {
        if patterns.len() > limits::MAX_SCOPE_PATTERNS {
            return Err(format!("holds more than {} patterns", limits::MAX_SCOPE_PATTERNS));
        }
        patterns.iter().map(|pattern| Pattern::new(pattern)).collect::<Result<_, _>>().map(Self::of)
    }

    fn of(patterns: Vec<Pattern>) -> Self {
        Self(Some(patterns))
    }

    /// Whether there is nothing it leaves out.
    pub fn is_all(&self) -> bool {
        self.0.is_none()
    }

    /// Whether a request may name `id` in `source`.
    pub fn allows(&self, id: &str, source: Source) -> bool {
        self.shows(id, source.into())
    }

    /// Whether a cartridge that lies there may be shown.
    pub fn shows(&self, id: &str, origin: Origin) -> bool {
        let Some(patterns) = &self.0 else { return true };
        let is_remote = !matches!(origin, Origin::Memory | Origin::Local);
        let is_matched = |folder: &str, pattern: &Pattern| {
            matches(&pattern.folder, folder) && (!is_remote || matches(&pattern.written, id))
        };
        // An id that can name nothing is nobody's.
        folder_name(id).is_ok_and(|folder| patterns.iter().any(|p| is_matched(&folder, p)))
    }
}

impl Pattern {
    fn new(pattern: &str) -> Result<Self, String> {
        let wrong = |reason: &str| format!("`{pattern}`: {reason}");
        if pattern.is_empty() {
            return Err(wrong("an empty pattern matches nothing"));
        }
        let piece = |piece: &str| {
            if piece.trim() != piece {
                // It would be trimmed, and the pattern would match more than it says.
                return Err(wrong("white space beside `*` or at an end"));
            }
            if piece.is_empty() { Ok(String::new()) } else { name_of(piece).map_err(|e| wrong(&e)) }
        };
        let folder = pattern.split('*').map(piece).collect::<Result<_, _>>()?;
        Ok(Self { written: pattern.split('*').map(str::to_owned).collect(), folder })
    }
}

fn matches(pieces: &[String], name: &str) -> bool {
    let Some((first, rest)) = pieces.split_first() else { return false };
    let Some((last, middle)) = rest.split_last() else { return name == first };
    let Some(mut name) = name.strip_prefix(first.as_str()) else { return false };
    for piece in middle {
        // The earliest place leaves most for what follows.
        let Some(at) = name.find(piece.as_str()) else { return false };
        name = &name[at + piece.len()..];
    }
    name.ends_with(last.as_str())
}

fn name_of(piece: &str) -> Result<String, String> {
    folder_name(piece).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(patterns: &[&str]) -> Scope {
        Scope::new(&patterns.iter().map(|&p| p.to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn patterns_match_whole_ids() {
        for (pattern, inside, outside) in [
            ("notes", vec!["notes"], vec!["note", "notes2", "my-notes", "Notes", ""]),
            ("team-a/*", vec!["team-a/x", "team-a/x/y", "team-a-x"], vec!["team-a", "team-b/x"]),
            ("*", vec!["x", "org/x@rev"], vec!["", ".", " "]),
            ("org/*@main", vec!["org/x@main"], vec!["org/x", "org/x@dev", "org/x@main2"]),
            ("a*b*c", vec!["abc", "aXbXc", "abcbc"], vec!["ab", "acb", "abcd", "xabc"]),
            ("v1.*", vec!["v1.2"], vec!["v12"]),
        ] {
            let scope = scope(&[pattern]);
            for id in inside {
                assert!(scope.allows(id, Source::Local), "{pattern} leaves {id:?} out");
            }
            for id in outside {
                assert!(!scope.allows(id, Source::Local), "{pattern} lets {id:?} in");
            }
        }
        assert!(Scope::default().is_all() && Scope::default().allows("", Source::Local));
        assert!(!scope(&[]).allows("x", Source::Local), "an empty list is not everything");
    }

    #[test]
    fn an_id_that_leads_to_a_folder_of_others_stays_outside() {
        let scope = scope(&["team-a/*"]);
        for id in ["team-a/../team-b/x", "../team-b/x", "team-b/team-a/x", "/team-a/x", "team_a/x"]
        {
            let folder = folder_name(id).unwrap();
            assert!(
                !scope.allows(id, Source::Local) || folder.starts_with("team-a-"),
                "{id} is {folder}"
            );
        }
        assert!(!scope.allows("team-b/x", Source::Local));
    }

    #[test]
    fn whatever_is_allowed_by_one_name_of_a_folder_is_allowed_by_all() {
        let names = ["a/b", "a-b", "a\\b"];
        for pattern in ["a/b", "a-b", "a/*", "*/b"] {
            assert!(
                names.iter().all(|id| scope(&[pattern]).allows(id, Source::Local)),
                "{pattern}"
            );
        }
    }

    #[test]
    fn remote_ids_match_as_they_are_written() {
        let scope = scope(&["org/a-b", "team/*"]);
        for source in [Source::Huggingface, Source::Wandb, Source::Http] {
            assert!(scope.allows("org/a-b", source) && scope.allows("team/x", source));
            for id in ["org-a/b", "org-a-b", "team-x", "team/../org/x", "team/"] {
                let local = scope.allows(id, Source::Local);
                assert!(!scope.allows(id, source) || (local && id.starts_with("team/")), "{id}");
            }
            assert!(!scope.allows("org-a/b", source));
        }
        assert!(scope.allows("org-a/b", Source::Local), "one folder");
        assert!(scope.shows("team-x", Origin::Local) && !scope.shows("team-x", Origin::Wandb));
    }

    #[test]
    fn useless_patterns_are_refused() {
        for pattern in ["", " a", "team *", "*a ", "_"] {
            assert!(Scope::new(&[pattern.to_owned()]).is_err(), "{pattern:?}");
        }
        assert!(Scope::new(&vec!["a".to_owned(); limits::MAX_SCOPE_PATTERNS + 1]).is_err());
    }
}
