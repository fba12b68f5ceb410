//! The `prompt` of a text completion, read without an intermediate form: a million token ids are a million
//! numbers, not a million JSON values.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Visitor},
};

use super::{super::error::ApiError, params::unknown_token};
use crate::limits;

/// One prompt of a completions request.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    Text(String),
    Ids(Vec<u32>),
}

/// `prompt`: a string, a list of token ids, a list of strings, or a list of lists of token ids.
#[derive(Debug, Clone, PartialEq)]
pub enum PromptField {
    One(Input),
    /// At most [`limits::MAX_PROMPTS`].
    List(Vec<Input>),
}

impl PromptField {
    /// The prompts, none without tokens and every id one of the vocabulary's.
    pub fn into_inputs(self, vocab_size: usize) -> Result<Vec<Input>, ApiError> {
        match self {
            Self::One(input) => {
                check("prompt", &input, vocab_size)?;
                Ok(vec![input])
            }
            Self::List(list) if list.is_empty() => {
                Err(ApiError::invalid("prompt", "prompt must not be an empty list"))
            }
            Self::List(list) => {
                for (i, input) in list.iter().enumerate() {
                    check(&format!("prompt[{i}]"), input, vocab_size)?;
                }
                Ok(list)
            }
        }
    }
}

fn check(path: &str, input: &Input, vocab_size: usize) -> Result<(), ApiError> {
    let Input::Ids(ids) = input else { return Ok(()) };
    if ids.is_empty() {
        return Err(ApiError::invalid(path, format!("{path}: the prompt has no tokens")));
    }
    match ids.iter().enumerate().find(|(_, id)| **id as usize >= vocab_size) {
        Some((i, &id)) => Err(unknown_token(&format!("{path}[{i}]"), i64::from(id), vocab_size)),
        None => Ok(()),
    }
}

impl<'de> Deserialize<'de> for PromptField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match deserializer.deserialize_any(PromptVisitor { depth: 0 })? {
            Node::Input(input) => Ok(Self::One(input)),
            Node::List(list) => Ok(Self::List(list)),
            Node::Id(_) => Err(D::Error::custom("a prompt is not a number")),
        }
    }
}

/// What stands at one place of the field.
enum Node {
    Id(u32),
    Input(Input),
    List(Vec<Input>),
}

/// `depth`: in how many lists it stands. A list at depth 0 may hold anything, one at depth 1 only ids.
struct PromptVisitor {
    depth: usize,
}

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.depth {
            0 => "a string, a list of token ids, or a list of either",
            1 => "a string, a token id, or a list of token ids",
            _ => "a token id",
        })
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Node, E> {
        self.visit_string(text.to_owned())
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Node, E> {
        Ok(Node::Input(Input::Text(text)))
    }

    fn visit_u64<E: Error>(self, id: u64) -> Result<Node, E> {
        if self.depth == 0 {
            return Err(E::invalid_type(serde::de::Unexpected::Unsigned(id), &self));
        }
        let id = u32::try_from(id);
        id.map(Node::Id).map_err(|_| E::custom("the token id is outside of any vocabulary"))
    }

    fn visit_i64<E: Error>(self, id: i64) -> Result<Node, E> {
        match u64::try_from(id) {
            Ok(id) => self.visit_u64(id),
            Err(_) => Err(E::custom("a token id is not negative")),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        if self.depth > 0 {
            let mut ids = Vec::new();
            while let Some(TokenId(id)) = seq.next_element()? {
                ids.push(id);
            }
            return Ok(Node::Input(Input::Ids(ids)));
        }
        let mut list = match seq.next_element()? {
            None => return Ok(Node::List(Vec::new())),
            Some(Item::Id(id)) => {
                let mut ids = vec![id];
                while let Some(TokenId(id)) = seq.next_element()? {
                    ids.push(id);
                }
                return Ok(Node::Input(Input::Ids(ids)));
            }
            Some(Item::Input(input)) => vec![input],
        };
        while let Some(InputItem(input)) = seq.next_element()? {
            if list.len() == limits::MAX_PROMPTS {
                let limit = limits::MAX_PROMPTS;
                return Err(A::Error::custom(format_args!("holds more than {limit} prompts")));
            }
            list.push(input);
        }
        Ok(Node::List(list))
    }
}

/// The first of a list, which says what the others are.
enum Item {
    Id(u32),
    Input(Input),
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match deserializer.deserialize_any(PromptVisitor { depth: 1 })? {
            Node::Id(id) => Ok(Self::Id(id)),
            Node::Input(input) => Ok(Self::Input(input)),
            Node::List(_) => Err(D::Error::custom("lists of prompts do not nest")),
        }
    }
}

struct InputItem(Input);

impl<'de> Deserialize<'de> for InputItem {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Item::deserialize(deserializer)? {
            Item::Input(input) => Ok(Self(input)),
            Item::Id(_) => Err(D::Error::custom("a token id among prompts")),
        }
    }
}

struct TokenId(u32);

impl<'de> Deserialize<'de> for TokenId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A reader of one number, so that anything else is refused before it is built.
        let id = i64::deserialize(deserializer)?;
        u32::try_from(id).map(Self).map_err(|_| {
            D::Error::custom(format_args!("token id {id} is outside of any vocabulary"))
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::api::extract::parse;

    #[derive(Debug, Deserialize)]
    struct Fields {
        prompt: PromptField,
    }

    fn inputs(prompt: Value) -> Result<Vec<Input>, ApiError> {
        let fields: Fields = parse(json!({"prompt": prompt}).to_string().as_bytes())?;
        fields.prompt.into_inputs(10)
    }

    #[test]
    fn prompts_have_four_forms() {
        assert_eq!(inputs(json!("a")).unwrap(), [Input::Text("a".into())]);
        assert_eq!(inputs(json!([1, 2])).unwrap(), [Input::Ids(vec![1, 2])]);
        let two = [Input::Text("a".into()), Input::Text("b".into())];
        assert_eq!(inputs(json!(["a", "b"])).unwrap(), two);
        let two = [Input::Ids(vec![1]), Input::Ids(vec![2, 3])];
        assert_eq!(inputs(json!([[1], [2, 3]])).unwrap(), two);
        let mixed = [Input::Ids(vec![1]), Input::Text("b".into())];
        assert_eq!(inputs(json!([[1], "b"])).unwrap(), mixed);
    }

    #[test]
    fn errors_name_the_place() {
        for (prompt, param) in [
            (json!([]), "prompt"),
            (json!([[]]), "prompt[0]"),
            (json!([1, "a"]), "prompt[1]"),
            (json!([1, 10]), "prompt[1]"),
            (json!([1, -1]), "prompt[1]"),
            (json!([-1]), "prompt[0]"),
            (json!([1.5]), "prompt[0]"),
            (json!([1, 1.5]), "prompt[1]"),
            (json!([u64::MAX]), "prompt[0]"),
            (json!([[1], [-1]]), "prompt[1][0]"),
            (json!([[1], [[2]]]), "prompt[1][0]"),
            (json!(["a", 1]), "prompt[1]"),
            (json!({"a": 1}), "prompt"),
            (json!(5), "prompt"),
            (json!(null), "prompt"),
            (json!(vec!["a"; limits::MAX_PROMPTS + 1]), "prompt"),
        ] {
            let error = inputs(prompt.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{prompt}: {}", error.message);
        }
    }

    #[test]
    fn reading_prompts_stops_at_their_limit() {
        // What follows the limit is not even valid JSON: it must not be reached.
        let body = format!("{{\"prompt\":[{}!", "\"a\",".repeat(limits::MAX_PROMPTS + 1));
        let error = parse::<Fields>(body.as_bytes()).unwrap_err();
        assert!(error.message.contains("more than 256 prompts"), "{}", error.message);
    }
}
