//! What of the model's writing is a user's message.

/// Bytes of a message at least: below, there is no question in it.
const MIN_BYTES: usize = 8;

/// Why a text is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unusable {
    Short,
    Unfinished,
}

/// The message in `text`: without reasoning before it, white space and quotation marks around it.
/// `is_finished` says whether the model came to an end.
pub(super) fn clean(text: &str, is_finished: bool) -> Result<&str, Unusable> {
    if !is_finished {
        return Err(Unusable::Unfinished);
    }
    let text = text.trim();
    let text = match text.strip_prefix("<think>") {
        Some(thought) => thought.split_once("</think>").ok_or(Unusable::Unfinished)?.1.trim(),
        None => text,
    };
    let quoted = [('"', '"'), ('\u{201c}', '\u{201d}')].into_iter().find_map(|(open, close)| {
        let inner = text.strip_prefix(open)?.strip_suffix(close)?;
        // Quotation marks that belong to two quotations stay.
        (!inner.contains([open, close])).then_some(inner.trim())
    });
    let text = quoted.unwrap_or(text);
    if text.len() < MIN_BYTES { Err(Unusable::Short) } else { Ok(text) }
}

/// What two messages that say the same have in common.
pub(super) fn sameness(text: &str) -> String {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_message_is_left() {
        for (text, wanted) in [
            ("  Who keeps it?\n", Ok("Who keeps it?")),
            ("\"Who keeps it?\"", Ok("Who keeps it?")),
            ("\u{201c} Who keeps it? \u{201d}", Ok("Who keeps it?")),
            ("\"Ondar\" or \"Velby\"", Ok("\"Ondar\" or \"Velby\"")),
            ("<think>\nHm.\n</think>\n\nWho keeps it?", Ok("Who keeps it?")),
            ("<think>Hm. Who keeps it?", Err(Unusable::Unfinished)),
            ("\"\"", Err(Unusable::Short)),
            (" \n", Err(Unusable::Short)),
            ("Why?", Err(Unusable::Short)),
            (
                "\u{8c01}\u{7ba1}\u{706f}\u{5854}\u{ff1f}",
                Ok("\u{8c01}\u{7ba1}\u{706f}\u{5854}\u{ff1f}"),
            ),
        ] {
            assert_eq!(clean(text, true), wanted, "{text:?}");
        }
        assert_eq!(clean("Who keeps it?", false), Err(Unusable::Unfinished));
    }

    #[test]
    fn messages_that_differ_in_marks_and_case_say_the_same() {
        assert_eq!(sameness("Who keeps  the light?"), sameness("who keeps the light"));
        assert_ne!(sameness("Who keeps the light?"), sameness("Who keeps the lights?"));
        assert_eq!(sameness("?!"), "");
    }
}
