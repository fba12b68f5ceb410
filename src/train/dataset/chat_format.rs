//! How one message becomes tokens: header, body, end.

use serde_json::{Map, Value, json};

use super::{Message, RowError};
use crate::text::{ChatTemplate, TemplateRequest, TextError, Tokenizer};

/// Where the tokens around a message's body come from.
#[derive(Debug, Clone, Copy)]
pub enum ChatFormat<'a> {
    /// What Gen-2 trains Llama-3 cartridges with: no BOS, no default system text.
    Llama3,
    /// What Gen-2 trains Qwen cartridges with: no default system text, no empty thinking block.
    Qwen,
    /// The model's own template, as this server sends it beside a cartridge, default system text included.
    Template(&'a ChatTemplate),
}

/// One message. All four together are what it adds to the prompt.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Turn {
    pub start: Vec<u32>,
    pub body: Vec<u32>,
    /// What the model ends its answer with.
    pub end: Vec<u32>,
    /// What the format writes between the end and the next message.
    pub extra: Vec<u32>,
}

/// The ids of a family whose tokens are known.
struct Family {
    open: u32,
    close: &'static [u32],
    roles: [(&'static str, u32); 3],
    end: u32,
    extra: &'static [u32],
    /// Tokens by which the family's vocabulary is told from others.
    signs: [(&'static str, u32); 2],
}

const LLAMA3: Family = Family {
    open: 128_006,
    close: &[128_007, 271],
    roles: [("user", 882), ("assistant", 78_191), ("system", 9_125)],
    end: 128_009,
    extra: &[],
    signs: [("<|start_header_id|>", 128_006), ("<|eot_id|>", 128_009)],
};

const QWEN: Family = Family {
    open: 151_644,
    close: &[198],
    roles: [("user", 872), ("assistant", 77_091), ("system", 8_948)],
    end: 151_645,
    extra: &[198],
    signs: [("<|im_start|>", 151_644), ("<|im_end|>", 151_645)],
};

impl<'a> ChatFormat<'a> {
    /// A family of Gen-2 when the vocabulary is of that family, else the template; `None` when the model has
    /// neither.
    pub fn detect(tokenizer: &Tokenizer, template: Option<&'a ChatTemplate>) -> Option<Self> {
        let is = |family: &Family| {
            family.signs.iter().all(|(piece, id)| tokenizer.token_id(piece) == Some(*id))
        };
        match template {
            _ if is(&LLAMA3) => Some(Self::Llama3),
            _ if is(&QWEN) => Some(Self::Qwen),
            template => template.map(Self::Template),
        }
    }

    /// The messages in order. `stored` says of which the body is not the tokenised content: theirs is left
    /// empty.
    ///
    /// # Errors
    /// [`RowError::Role`]; [`RowError::Template`] when the template cannot be cut into messages; the template's
    /// and the tokenizer's errors.
    pub(super) fn turns(
        self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        stored: impl Fn(&Message) -> bool,
    ) -> Result<Vec<Turn>, RowError> {
        let family = match self {
            Self::Llama3 => &LLAMA3,
            Self::Qwen => &QWEN,
            Self::Template(template) => {
                return cut_rendering(template, tokenizer, messages, stored);
            }
        };
        let turn = |(index, message): (usize, &Message)| {
            let role = family.roles.iter().find(|(name, _)| *name == message.role);
            let (_, role) =
                role.ok_or_else(|| RowError::Role { message: index, role: message.role.clone() })?;
            let content = if stored(message) { "" } else { &message.content };
            Ok(Turn {
                start: [&[family.open, *role], family.close].concat(),
                body: tokenizer.encode(content, false)?,
                end: vec![family.end],
                extra: family.extra.to_vec(),
            })
        };
        messages.iter().enumerate().map(turn).collect()
    }
}

/// What each message adds to the rendering of those before it, tokenised. An assistant's message, or a
/// stored one, is cut further where its content begins and ends: the model goes on from the tokens of the
/// header, whatever its answer begins with.
fn cut_rendering(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    messages: &[Message],
    stored: impl Fn(&Message) -> bool,
) -> Result<Vec<Turn>, RowError> {
    let as_json = |m: &Message| json!({"role": m.role, "content": m.content});
    let json: Vec<Value> = messages.iter().map(as_json).collect();
    let mut turns = Vec::with_capacity(messages.len());
    let mut before = String::new();
    for (index, message) in messages.iter().enumerate() {
        let error = |reason| RowError::Template { message: index, reason };
        let text = render(template, &json[..=index], false)?;
        let added = text.strip_prefix(&*before).ok_or_else(|| {
            error(
                "writes earlier messages differently when this one follows, so that they cannot be told \
                 apart; use a chat format of Gen-2 or a simpler template",
            )
        })?;
        if message.role != "assistant" && !stored(message) {
            turns.push(Turn { body: tokenizer.encode(added, false)?, ..Turn::default() });
            before = text;
            continue;
        }
        let open = render(template, &json[..=index], true)?;
        let content = &message.content;
        let located = text.strip_prefix(&*open).zip(open.strip_prefix(&*before));
        let located = located.and_then(|(tail, open)| {
            let forms = [&**content, content.trim_end(), content.trim()];
            let body = forms.into_iter().find(|form| open.ends_with(form))?;
            Some((&open[..open.len() - body.len()], body, tail))
        });
        let (header, body, tail) = located.ok_or_else(|| {
            error(
                "changes this message's text, so that its tokens cannot be found; use a chat format of \
                 Gen-2 or a simpler template",
            )
        })?;
        let mut end = tokenizer.encode(tail, false)?;
        // A text without a token of its own for the end is the end as a whole.
        let ends = end.first().is_some_and(|id| tokenizer.is_special(*id));
        let extra = if ends { end.split_off(1) } else { Vec::new() };
        let body = if stored(message) { "" } else { body };
        let (start, body) = (tokenizer.encode(header, false)?, tokenizer.encode(body, false)?);
        turns.push(Turn { start, body, end, extra });
        before = text;
    }
    Ok(turns)
}

fn render(template: &ChatTemplate, messages: &[Value], open: bool) -> Result<String, TextError> {
    template.render(&TemplateRequest {
        messages,
        tools: None,
        add_generation_prompt: false,
        continue_final_message: open,
        kwargs: &Map::new(),
    })
}

/// Whether the parts of the model's template tokenise as they do in one piece: a tokenizer may begin every
/// text with a space of its own.
pub(super) fn template_parts_agree(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
) -> Result<bool, RowError> {
    let message = |role: &str, content: &str| Message {
        role: role.to_owned(),
        content: content.to_owned(),
        ..Message::default()
    };
    let messages = [message("user", "Good morning."), message("assistant", "Hello.")];
    let json = [
        json!({"role": "user", "content": "Good morning."}),
        json!({"role": "assistant", "content": "Hello."}),
    ];
    let whole = tokenizer.encode(&render(template, &json, false)?, false)?;
    let turns = cut_rendering(template, tokenizer, &messages, |_| false)?;
    let parts: Vec<u32> =
        turns.into_iter().flat_map(|t| [t.start, t.body, t.end, t.extra].concat()).collect();
    Ok(parts == whole)
}
