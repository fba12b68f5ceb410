//! Stop strings in a stream of text.
//!
//! The match that is *complete first* wins, so the result is the same however the text is cut into
//! chunks and a match is always reported by the push that completes it. Of several that complete at
//! the same char the longest wins (it hides all of them). Text that may still become part of a stop
//! is withheld.

/// What one [`StopMatcher::push`] yields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopPush {
    /// Text that may be shown: it holds no stop string, whole or begun.
    pub emit: String,
    /// Index of the stop string found (in the list given to [`StopMatcher::new`]). Generation ends
    /// here.
    pub matched: Option<usize>,
}

/// Finds the first stop string in a stream and withholds text that may be the beginning of one.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<Automaton>,
    /// The end of the text so far that is a prefix of some stop.
    held: String,
    done: bool,
}

/// One Knuth-Morris-Pratt automaton: constant amortised work per byte, whatever a client sends as
/// stop.
#[derive(Clone, Debug)]
struct Automaton {
    pattern: Vec<u8>,
    /// `fallback[i]`: length of the longest proper border of `pattern[..=i]`.
    fallback: Vec<usize>,
    /// Bytes of the pattern that the text read so far ends with.
    matched: usize,
}

impl Automaton {
    fn new(pattern: String) -> Self {
        let pattern = pattern.into_bytes();
        let mut fallback = vec![0; pattern.len()];
        let mut border = 0;
        for i in 1..pattern.len() {
            while border > 0 && pattern[i] != pattern[border] {
                border = fallback[border - 1];
            }
            border += usize::from(pattern[i] == pattern[border]);
            fallback[i] = border;
        }
        Self { pattern, fallback, matched: 0 }
    }

    /// Reads one byte; true when the pattern is complete. An empty pattern never is.
    fn step(&mut self, byte: u8) -> bool {
        if self.pattern.is_empty() {
            return false;
        }
        while self.matched > 0 && self.pattern[self.matched] != byte {
            self.matched = self.fallback[self.matched - 1];
        }
        self.matched += usize::from(self.pattern[self.matched] == byte);
        self.matched == self.pattern.len()
    }
}

impl StopMatcher {
    /// A matcher for `stops`. The caller refuses empty stop strings; one that comes through never
    /// matches.
    pub fn new(stops: Vec<String>) -> Self {
        let stops = stops.into_iter().map(Automaton::new).collect();
        Self { stops, held: String::new(), done: false }
    }

    /// Reads the next chunk. After a match, later chunks are ignored and yield nothing.
    pub fn push(&mut self, text: &str) -> StopPush {
        if self.done {
            return StopPush::default();
        }
        let start = self.held.len();
        self.held.push_str(text);
        for (offset, byte) in text.bytes().enumerate() {
            if let Some((index, length)) = self.step(byte) {
                self.done = true;
                let mut emit = std::mem::take(&mut self.held);
                // A pattern is whole UTF-8, so its first byte begins a char: this cut is on a
                // boundary.
                emit.truncate(start + offset + 1 - length);
                return StopPush { emit, matched: Some(index) };
            }
        }
        let keep = self.stops.iter().map(|s| s.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        StopPush { emit: std::mem::replace(&mut self.held, rest), matched: None }
    }

    /// The text still withheld, when the stream ends without a match.
    pub fn finish(&mut self) -> String {
        self.done = true;
        std::mem::take(&mut self.held)
    }

    /// Feeds one byte to every automaton; index and length of the longest stop that ends here.
    fn step(&mut self, byte: u8) -> Option<(usize, usize)> {
        let mut found: Option<(usize, usize)> = None;
        for (index, stop) in self.stops.iter_mut().enumerate() {
            let length = stop.pattern.len();
            if stop.step(byte) && found.is_none_or(|(_, best)| length > best) {
                found = Some((index, length));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matcher(stops: &[&str]) -> StopMatcher {
        StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect())
    }

    /// All that is emitted for these chunks, and the match.
    fn run(stops: &[&str], chunks: &[&str]) -> (String, Option<usize>) {
        let mut m = matcher(stops);
        let mut out = String::new();
        for chunk in chunks {
            let push = m.push(chunk);
            out += &push.emit;
            if push.matched.is_some() {
                return (out, push.matched);
            }
        }
        out += &m.finish();
        (out, None)
    }

    /// The definition, on the whole text: smallest end, then smallest start.
    fn search(stops: &[&str], text: &str) -> (String, Option<usize>) {
        let found = stops.iter().enumerate().filter(|(_, s)| !s.is_empty());
        let best = found.filter_map(|(i, s)| text.find(s).map(|at| (at + s.len(), at, i))).min();
        match best {
            Some((_, at, i)) => (text[..at].to_owned(), Some(i)),
            None => (text.to_owned(), None),
        }
    }

    #[test]
    fn withholds_a_possible_beginning_and_releases_it() {
        let mut m = matcher(&["STOP"]);
        assert_eq!(m.push("go S").emit, "go ");
        assert_eq!(m.push("TO").emit, "");
        assert_eq!(m.push("RE").emit, "STORE");
        assert_eq!(m.push("ST").emit, "");
        assert_eq!(m.finish(), "ST");
        assert_eq!(m.finish(), "");
    }

    #[test]
    fn a_stop_longer_than_any_chunk() {
        let stop = "<|the very end|>";
        let text = format!("ab{stop}cd");
        let chunks: Vec<String> = text.chars().map(String::from).collect();
        let chunks: Vec<&str> = chunks.iter().map(String::as_str).collect();
        assert_eq!(run(&[stop], &chunks), ("ab".into(), Some(0)));
    }

    #[test]
    fn a_stop_that_is_a_prefix_of_another_ends_first() {
        assert_eq!(run(&["abc", "ab"], &["xabc"]), ("x".into(), Some(1)));
        assert_eq!(run(&["abc", "ab"], &["xab", "c"]), ("x".into(), Some(1)));
        // Ending together: the longer one hides both.
        assert_eq!(run(&["c", "abc"], &["xabc"]), ("x".into(), Some(1)));
    }

    #[test]
    fn self_overlapping_and_multibyte_stops() {
        assert_eq!(run(&["aab"], &["aa", "aa", "b!"]), ("aa".into(), Some(0)));
        assert_eq!(run(&["é\n"], &["caf", "è é", "\n"]), ("cafè ".into(), Some(0)));
        // The bytes of € begin like those of ‚: nothing is cut inside a char.
        assert_eq!(run(&["‚"], &["a€"]), ("a€".into(), None));
    }

    #[test]
    fn nothing_comes_after_a_match_and_no_stops_hold_nothing() {
        let mut m = matcher(&["."]);
        assert_eq!(m.push("a.b"), StopPush { emit: "a".into(), matched: Some(0) });
        assert_eq!(m.push("c."), StopPush::default());
        assert_eq!(m.finish(), "");
        assert_eq!(matcher(&[]).push("abc").emit, "abc");
        assert_eq!(matcher(&[""]).push("abc").emit, "abc");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn any_chunking_is_the_whole_text_search(
            stops in prop::collection::vec("[abé]{1,5}", 0..4),
            chunks in prop::collection::vec("[abé]{0,6}", 0..12),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let chunks: Vec<&str> = chunks.iter().map(String::as_str).collect();
            let text = chunks.concat();
            prop_assert_eq!(run(&stops, &chunks), search(&stops, &text));
        }

        #[test]
        fn only_a_possible_beginning_is_withheld(
            stops in prop::collection::vec("[ab]{1,5}", 1..4), text in "[ab]{0,20}",
        ) {
            let refs: Vec<&str> = stops.iter().map(String::as_str).collect();
            let mut m = matcher(&refs);
            let push = m.push(&text);
            if push.matched.is_none() {
                let held = m.finish();
                prop_assert!(held.is_empty() || stops.iter().any(|s| s.starts_with(&held)));
                prop_assert_eq!(push.emit + &held, text);
            }
        }
    }
}
