//! Python methods that chat templates call and minijinja's `pycompat` lacks or does differently.

use minijinja::value::{Kwargs, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

/// The environment's fallback for `value.method(...)`.
pub(super) fn call_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let ours = match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => string_method(text, method, args)?,
        (ValueKind::Map, _) if method == "copy" => Some(value.clone()),
        (ValueKind::Seq | ValueKind::Iterable, _) => list_method(value, method, args)?,
        _ => None,
    };
    match ours {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// White space as `str.strip` and `str.split` see it: Unicode's, and the ASCII separators 0x1C to
/// 0x1F.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1C}'..='\u{1F}').contains(&c)
}

fn invalid(reason: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<Value>,) = from_args(args)?;
            Value::from(strip(text, chars.as_ref(), method != "rstrip", method != "lstrip")?)
        }
        "split" | "rsplit" => {
            let (sep, max, kwargs): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
            let sep = kwargs.get::<Option<Value>>("sep")?.or(sep).filter(|s| !s.is_none());
            let max = kwargs.get::<Option<i64>>("maxsplit")?.or(max).unwrap_or(-1);
            kwargs.assert_all_used()?;
            let max = usize::try_from(max).unwrap_or(usize::MAX);
            let parts = match sep.as_ref().map(|s| s.as_str().ok_or(s)) {
                None => split_space(text, max, method == "rsplit"),
                Some(Ok("")) => return Err(invalid("split: empty separator")),
                Some(Ok(sep)) if method == "split" => {
                    text.splitn(max.saturating_add(1), sep).collect()
                }
                Some(Ok(sep)) => {
                    let mut parts: Vec<&str> = text.rsplitn(max.saturating_add(1), sep).collect();
                    parts.reverse();
                    parts
                }
                Some(Err(_)) => return Err(invalid("split: the separator must be a string")),
            };
            parts.into_iter().map(Value::from).collect()
        }
        "partition" | "rpartition" => {
            let (sep,): (&str,) = from_args(args)?;
            let first = method == "partition";
            let found = if first { text.split_once(sep) } else { text.rsplit_once(sep) };
            let parts = match found {
                _ if sep.is_empty() => return Err(invalid("partition: empty separator")),
                Some((before, after)) => [before, sep, after],
                None if first => [text, "", ""],
                None => ["", "", text],
            };
            parts.into_iter().map(Value::from).collect()
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "index" => {
            let (what,): (&str,) = from_args(args)?;
            let at = text.find(what).ok_or_else(|| invalid("index: substring not found"))?;
            Value::from(text[..at].chars().count())
        }
        "splitlines" => {
            let (keep, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = kwargs.get::<Option<bool>>("keepends")?.or(keep).unwrap_or(false);
            split_lines(text, keep).into_iter().map(Value::from).collect()
        }
        _ => return Ok(None),
    }))
}

fn list_method(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "copy" => {
            let () = from_args(args)?;
            value.clone()
        }
        "index" => {
            let (what,): (&Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == *what);
            Value::from(at.ok_or_else(|| invalid("index: the value is not in the list"))?)
        }
        _ => return Ok(None),
    }))
}

fn strip<'a>(
    text: &'a str,
    chars: Option<&Value>,
    start: bool,
    end: bool,
) -> Result<&'a str, Error> {
    let set: Option<Vec<char>> = match chars.filter(|c| !c.is_none()) {
        None => None,
        Some(chars) => {
            let chars = chars.as_str().ok_or_else(|| invalid("strip: not a string of chars"))?;
            Some(chars.chars().collect())
        }
    };
    let drop = |c: char| set.as_ref().map_or_else(|| is_space(c), |set| set.contains(&c));
    let text = if start { text.trim_start_matches(drop) } else { text };
    Ok(if end { text.trim_end_matches(drop) } else { text })
}

/// `str.split()` / `str.rsplit()` without separator: runs of white space, none at the ends.
fn split_space(text: &str, max: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_matches(is_space);
    while !rest.is_empty() {
        let cut = if parts.len() == max {
            None
        } else if from_right {
            rest.char_indices().rev().find(|(_, c)| is_space(*c))
        } else {
            rest.char_indices().find(|(_, c)| is_space(*c))
        };
        let Some((at, c)) = cut else {
            parts.push(rest);
            break;
        };
        let (before, after) = (&rest[..at], &rest[at + c.len_utf8()..]);
        if from_right {
            parts.push(after);
            rest = before.trim_end_matches(is_space);
        } else {
            parts.push(before);
            rest = after.trim_start_matches(is_space);
        }
    }
    if from_right {
        parts.reverse();
    }
    parts
}

/// `str.splitlines`: Python's line ends, `\r\n` as one.
fn split_lines(text: &str, keep: bool) -> Vec<&str> {
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{B}' | '\u{C}' | '\u{1C}'
                ..='\u{1E}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some((at, c)) = rest.char_indices().find(|(_, c)| is_end(*c)) {
        let end = if rest[at..].starts_with("\r\n") { at + 2 } else { at + c.len_utf8() };
        lines.push(&rest[..if keep { end } else { at }]);
        rest = &rest[end..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitting_on_white_space() {
        assert_eq!(split_space("  a b\t\nc ", usize::MAX, false), ["a", "b", "c"]);
        assert_eq!(split_space("  a b  c ", 1, false), ["a", "b  c"]);
        assert_eq!(split_space("  a b  c ", 1, true), ["a b", "c"]);
        assert_eq!(split_space(" a ", 0, false), ["a"]);
        assert!(split_space(" \u{1F}", usize::MAX, false).is_empty());
    }

    #[test]
    fn splitting_lines() {
        assert_eq!(split_lines("a\r\nb\n\nc", false), ["a", "b", "", "c"]);
        assert_eq!(split_lines("a\r\nb\u{2028}", true), ["a\r\n", "b\u{2028}"]);
        assert!(split_lines("", false).is_empty());
    }
}
