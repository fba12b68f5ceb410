//! `POST /v1/completions`, and the same under the cartridge prefixes. Several prompts may come in one
//! request; the choices of the first come first.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};

use super::{
    AppState,
    access::Caller,
    blocking, cartridges,
    choice::Choice,
    error::ApiError,
    extract::Body,
    generate::Update,
    life::{Life, Origin},
    logprobs::TokenWriter,
    openai::{
        fields::{CompletionFields, RequestBody},
        params::{Settings, completion_logprobs},
        prompt::{Prompt, encode},
        prompt_field::Input,
        reply::{Joined, Reply, TextChoice, TextLogprobs},
    },
    request::{self, Notes, Prepared, with_headers},
    stream::{self, Encoder, Events},
    tally::Tally,
    updates::Updates,
};
use tracing::Instrument;

use crate::{engine::SampledToken, text::Detokenizer};

/// Tokens generated when a text completion sets no limit (OpenAI's number).
const DEFAULT_MAX_TOKENS: usize = 16;

/// Answers a text completion, whole or as a stream.
pub async fn completions(
    State(state): State<Arc<AppState>>,
    origin: Origin,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let life = Life::begin(&state, &origin, &caller)?;
    let span = life.span();
    state.in_flight.unless_stopped(answer(&state, life, &caller, body).instrument(span)).await
}

async fn answer(
    state: &AppState,
    life: Life,
    caller: &Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let body = body.read(RequestBody::<CompletionFields>::parse).await?;
    let echo = body.own.echo.unwrap_or(false);
    let prepared = prepare(state, caller, body, echo).await?;
    // An error from here on says too which cartridges it was about.
    let headers = prepared.headers();
    Ok(with_headers(generate(state, life, prepared, echo).await.into_response(), headers))
}

async fn generate(
    state: &AppState,
    life: Life,
    prepared: Prepared,
    echo: bool,
) -> Result<Response, ApiError> {
    let updates = prepared.submit(state, life, Some(DEFAULT_MAX_TOKENS))?;
    let reply = TextReply::new(state, prepared, echo);
    match reply.settings.stream {
        true => Ok(stream::respond(updates, reply)),
        false => reply.collect(updates).await,
    }
}

async fn prepare(
    state: &AppState,
    caller: &Caller,
    body: RequestBody<CompletionFields>,
    echo: bool,
) -> Result<Prepared, ApiError> {
    let RequestBody { own, common, ignored } = body;
    let mut notes = Notes { ignored, warnings: Vec::new() };
    let bounds = request::bounds(state);
    let logprobs = completion_logprobs(own.logprobs, echo, bounds)?;
    let cache_salt = request::cache_salt(caller, common.cache_salt.as_deref())?;
    let settings = Settings::new(&common, logprobs, echo, bounds)?;
    let suffix = request::resolve_model(state, common.model.as_deref(), &mut notes.warnings)?;
    let inputs = own.prompt.into_inputs(bounds.vocab_size)?;
    let references = cartridges::collect(
        suffix,
        Vec::new(),
        common.cartridges.unwrap_or_default(),
        state.options.sort_cartridges,
    )?;
    // A cartridge begins with the BOS it was trained with; a second one would be a second sink.
    let add_special = settings.add_special_tokens.unwrap_or(references.is_empty());
    let how = request::tokenising(state, !references.is_empty(), add_special);
    let (leases, prompts) = request::lease_and_tokenise(state, caller, &references, move |model| {
        inputs
            .into_iter()
            .map(|input| match input {
                Input::Text(text) => {
                    let prompt = encode(model, text, how, "prompt")?;
                    Ok(Prompt { text: prompt.text.filter(|_| echo), ..prompt })
                }
                Input::Ids(ids) => Ok(Prompt { ids, text: None, added: 0 }),
            })
            .collect::<Result<Vec<_>, _>>()
    })
    .await?;
    Ok(Prepared {
        model_name: common.model.unwrap_or_else(|| state.model.name.clone()),
        settings,
        prompts,
        text_goes_on: true,
        leases,
        cache_salt,
        notes,
    })
}

/// What `echo` puts in front of the choices of one prompt.
#[derive(Default)]
struct Echo {
    text: String,
    chars: usize,
    logprobs: TextLogprobs,
}

/// Builds the reply, whole or in chunks.
struct TextReply {
    id: String,
    created: u64,
    model: String,
    settings: Settings,
    prompts: Vec<Prompt>,
    /// Per prompt; the text is there from the start, the log-probabilities once the prompt is done.
    echoes: Vec<Echo>,
    echo: bool,
    tally: Tally,
    writer: TokenWriter,
}

impl TextReply {
    fn new(state: &AppState, prepared: Prepared, echo: bool) -> Self {
        let writer = prepared.token_writer(state);
        let tally = prepared.tally();
        let Prepared { model_name, settings, prompts, .. } = prepared;
        let echoes = prompts
            .iter()
            .map(|prompt| {
                if !echo {
                    return Echo::default();
                }
                let text = prompt.text.clone().unwrap_or_else(|| {
                    let mut detokenizer =
                        Detokenizer::new(&writer.tokenizer, settings.skip_special_tokens);
                    let text: String = prompt.ids.iter().map(|&id| detokenizer.push(id)).collect();
                    // A char that the prompt leaves incomplete is shown with the completion.
                    text + &detokenizer.settle()
                });
                Echo { chars: text.chars().count(), text, logprobs: TextLogprobs::default() }
            })
            .collect();
        Self {
            id: format!("cmpl-{}", uuid::Uuid::new_v4()),
            created: request::now(),
            model: model_name,
            settings,
            prompts,
            echoes,
            echo,
            tally,
            writer,
        }
    }

    async fn collect(mut self, mut updates: Updates) -> Result<Response, ApiError> {
        let n = self.settings.n;
        let mut choices = Choice::empty(self.prompts.len() * n);
        let mut prompt_logprobs = vec![Vec::new(); self.prompts.len()];
        while let Some(item) = updates.next().await {
            let (prompt, update) = item?;
            self.tally.observe(prompt, &update);
            match update {
                Update::Prompt { logprobs, .. } => {
                    self.echo_logprobs(prompt, &logprobs);
                    if self.settings.logprobs.prompt.is_some() {
                        prompt_logprobs[prompt] = logprobs;
                    }
                }
                Update::Delta { choice, text, token, finish } => {
                    let Some(choice) = choices.get_mut(prompt * n + choice) else { continue };
                    choice.push(&text, token.filter(|_| self.settings.logprobs.show), finish);
                }
            }
        }
        let is_heavy = self.settings.logprobs.is_heavy();
        blocking::run_if(is_heavy, move || self.reply(choices, &prompt_logprobs)).await
    }

    /// The whole reply. With log-probabilities it can be many megabytes.
    fn reply(
        &self,
        choices: Vec<Choice<(SampledToken, usize)>>,
        prompt_logprobs: &[Vec<Option<SampledToken>>],
    ) -> Result<Response, ApiError> {
        let n = self.settings.n;
        let choices = choices
            .into_iter()
            .enumerate()
            .map(|(index, mut choice)| {
                let prompt = index / n;
                let finish = choice.finish()?;
                let wanted = self.settings.logprobs.prompt;
                let ids = self.settings.return_token_ids;
                Ok(TextChoice {
                    index,
                    text: format!("{}{}", self.echoes[prompt].text, choice.text),
                    logprobs: self.shows_logprobs().then(|| self.joined(prompt, &choice.tokens)),
                    finish_reason: Some(finish.reason),
                    stop_reason: Some(finish.stop).filter(|stop| !stop.is_null()),
                    prompt_logprobs: wanted
                        .map(|k| self.writer.prompt(&prompt_logprobs[prompt], k)),
                    prompt_token_ids: ids.then_some(&self.prompts[prompt].ids[..]),
                    token_ids: ids.then(|| self.tally.fingerprint.ids(index).to_vec()),
                })
            })
            .collect::<Result<Vec<_>, ApiError>>()?;
        let reply = Reply {
            usage: Some(self.tally.usage()),
            system_fingerprint: Some(self.tally.fingerprint.to_json()),
            cartridges: &self.tally.cartridges,
            ..self.envelope(choices)
        };
        Ok(Json(reply).into_response())
    }

    fn shows_logprobs(&self) -> bool {
        self.settings.logprobs.show && !self.settings.logprobs.in_fingerprint
    }

    /// Keeps the prompt's log-probabilities for the choices that show them.
    fn echo_logprobs(&mut self, prompt: usize, positions: &[Option<SampledToken>]) {
        if !(self.echo && self.shows_logprobs()) {
            return;
        }
        let echo = &mut self.echoes[prompt];
        let Prompt { ids, text, added } = &self.prompts[prompt];
        // The client's text has its special tokens in it, whatever is skipped elsewhere.
        let skip = self.settings.skip_special_tokens && text.is_none();
        let mut detokenizer = Detokenizer::new(&self.writer.tokenizer, skip);
        let (mut offset, top) = (0, self.settings.logprobs.top);
        for (i, (&id, position)) in ids.iter().zip(positions).enumerate() {
            // `prompt_logprobs` may have asked for more alternatives than `logprobs`.
            let position = position.clone().map(|mut t| {
                t.top.truncate(top);
                t
            });
            // The client's text may be shorter than its decoding where the tokenizer normalises.
            let at = offset.min(echo.chars);
            self.writer.push_text(&mut echo.logprobs, id, position.as_ref(), top > 0, at);
            if i >= *added {
                offset += detokenizer.push(id).chars().count();
            }
        }
    }

    /// The lists of a choice, after those of its prompt.
    fn joined(&self, prompt: usize, tokens: &[(SampledToken, usize)]) -> Joined<'_> {
        let own = self.own_lists(prompt, tokens);
        Joined { prompt: &self.echoes[prompt].logprobs, own }
    }

    fn own_lists(&self, prompt: usize, tokens: &[(SampledToken, usize)]) -> TextLogprobs {
        let (start, top) = (self.echoes[prompt].chars, self.settings.logprobs.top);
        let mut lists = TextLogprobs::default();
        for (token, offset) in tokens {
            self.writer.push_text(&mut lists, token.id, Some(token), top > 0, start + offset);
        }
        lists
    }

    fn envelope<C>(&self, choices: C) -> Reply<'_, C> {
        Reply {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &self.model,
            choices,
            usage: None,
            system_fingerprint: None,
            service_tier: None,
            prompt_logprobs: None,
            prompt_token_ids: None,
            cartridges: &[],
        }
    }
}

impl Encoder for TextReply {
    fn update(&mut self, prompt: usize, update: Update, events: &mut Events) {
        self.tally.observe(prompt, &update);
        let ids = self.settings.return_token_ids;
        match update {
            Update::Prompt { logprobs, .. } => {
                self.echo_logprobs(prompt, &logprobs);
                if !self.echo && !ids {
                    return;
                }
                for choice in 0..self.settings.n {
                    let choice = TextChoice {
                        text: self.echoes[prompt].text.clone(),
                        logprobs: (self.echo && self.shows_logprobs())
                            .then(|| self.joined(prompt, &[])),
                        prompt_token_ids: ids.then_some(&self.prompts[prompt].ids[..]),
                        ..empty_choice(self.tally.index(prompt, choice))
                    };
                    events.json(&self.envelope([choice]));
                }
            }
            Update::Delta { choice, text, token, finish } => {
                let wants_token = token.is_some() && (self.shows_logprobs() || ids);
                if text.is_empty() && !wants_token && finish.is_none() {
                    return;
                }
                let logprobs = (self.shows_logprobs() && token.is_some()).then(|| Joined {
                    prompt: &NO_LISTS,
                    own: self.own_lists(prompt, token.as_slice()),
                });
                let choice = TextChoice {
                    text,
                    logprobs,
                    token_ids: ids.then(|| token.iter().map(|(t, _)| t.id).collect()),
                    finish_reason: finish.as_ref().map(|f| f.reason),
                    stop_reason: finish.as_ref().map(|f| f.stop.clone()).filter(|s| !s.is_null()),
                    ..empty_choice(self.tally.index(prompt, choice))
                };
                let last = finish.is_some() && self.tally.is_complete();
                let reply = Reply {
                    system_fingerprint: last.then(|| self.tally.fingerprint.to_json()),
                    cartridges: if last { &self.tally.cartridges } else { &[] },
                    ..self.envelope([choice])
                };
                events.json(&reply);
            }
        }
    }

    fn finish(&mut self, events: &mut Events) {
        if self.settings.include_usage {
            let reply = Reply::<[TextChoice<'_>; 0]> {
                usage: Some(self.tally.usage()),
                system_fingerprint: Some(self.tally.fingerprint.to_json()),
                cartridges: &self.tally.cartridges,
                ..self.envelope([])
            };
            events.json(&reply);
        }
    }
}

/// Chunks after the echo show a token's lists alone.
static NO_LISTS: TextLogprobs = TextLogprobs {
    tokens: Vec::new(),
    token_logprobs: Vec::new(),
    top_logprobs: None,
    text_offset: Vec::new(),
};

fn empty_choice<'a>(index: usize) -> TextChoice<'a> {
    TextChoice {
        index,
        text: String::new(),
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        prompt_logprobs: None,
        prompt_token_ids: None,
        token_ids: None,
    }
}
