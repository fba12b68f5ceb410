//! `POST /v1/chat/completions`, and the same under the cartridge prefixes.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};

use super::{
    AppState,
    access::Caller,
    blocking, cartridge_blocks, cartridges,
    choice::Choice,
    error::ApiError,
    extract::Body,
    generate::Update,
    life::{Life, Origin},
    logprobs::TokenWriter,
    openai::{
        fields::{ChatFields, RequestBody},
        params::{Settings, chat_logprobs},
        prompt::{ChatPrompt, Prompt},
        reply::{AssistantMessage, ChatChoice, ChatChunkChoice, ChatLogprobs, Delta, Reply},
    },
    request::{self, Notes, Prepared, with_headers},
    stream::{self, Encoder, Events},
    tally::Tally,
    updates::Updates,
};
use tracing::Instrument;

use crate::engine::SampledToken;

/// Answers a chat completion, whole or as a stream.
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
    let prepared = prepare(state, caller, body.read(RequestBody::parse).await?).await?;
    // An error from here on says too which cartridges it was about.
    let headers = prepared.headers();
    Ok(with_headers(generate(state, life, prepared).await.into_response(), headers))
}

async fn generate(state: &AppState, life: Life, prepared: Prepared) -> Result<Response, ApiError> {
    let updates = prepared.submit(state, life, state.options.default_max_tokens)?;
    let reply = ChatReply::new(state, prepared);
    match reply.settings.stream {
        true => Ok(stream::respond(updates, reply)),
        false => reply.collect(updates).await,
    }
}

async fn prepare(
    state: &AppState,
    caller: &Caller,
    body: RequestBody<ChatFields>,
) -> Result<Prepared, ApiError> {
    let RequestBody { own, common, ignored } = body;
    let mut notes = Notes { ignored, warnings: Vec::new() };
    let bounds = request::bounds(state);
    let logprobs = chat_logprobs(own.logprobs, own.top_logprobs, bounds)?;
    let cache_salt = request::cache_salt(caller, common.cache_salt.as_deref())?;
    let settings = Settings::new(&common, logprobs, false, bounds)?;
    let suffix = request::resolve_model(state, common.model.as_deref(), &mut notes.warnings)?;

    let mut prompt = ChatPrompt::new(own)?;
    let blocks = cartridge_blocks::take(&mut prompt.messages)?;
    let list = common.cartridges.unwrap_or_default();
    if !blocks.is_empty() && !list.is_empty() {
        notes.warnings.push("<cartridge> blocks replace the cartridges list".to_owned());
    }
    let references = cartridges::collect(suffix, blocks, list, state.options.sort_cartridges)?;
    let has_cartridges = !references.is_empty();
    let add_special = settings.add_special_tokens.unwrap_or(false);
    let text_goes_on = prompt.continue_final_message;
    let how = request::tokenising(state, has_cartridges, add_special);
    let (leases, (prompt, unused)) =
        request::lease_and_tokenise(state, caller, &references, move |model| {
            let mut unused = Vec::new();
            let prompt = prompt.tokenise(model, how, &mut unused)?;
            // Nothing shows the text again: it need not wait for the generation.
            Ok((Prompt { text: None, ..prompt }, unused))
        })
        .await?;
    notes.ignored.extend(unused);
    Ok(Prepared {
        model_name: common.model.unwrap_or_else(|| state.model.name.clone()),
        settings,
        prompts: vec![prompt],
        text_goes_on,
        leases,
        cache_salt,
        notes,
    })
}

/// Builds the reply, whole or in chunks.
struct ChatReply {
    id: String,
    created: u64,
    model: String,
    settings: Settings,
    prompt_ids: Vec<u32>,
    tally: Tally,
    writer: TokenWriter,
}

impl ChatReply {
    fn new(state: &AppState, prepared: Prepared) -> Self {
        Self {
            id: format!("chatcmpl-{}", uuid::Uuid::new_v4()),
            created: request::now(),
            tally: prepared.tally(),
            writer: prepared.token_writer(state),
            model: prepared.model_name,
            prompt_ids: prepared.prompts.into_iter().next().map(|p| p.ids).unwrap_or_default(),
            settings: prepared.settings,
        }
    }

    async fn collect(mut self, mut updates: Updates) -> Result<Response, ApiError> {
        let shown = self.shows_logprobs();
        let mut choices = Choice::empty(self.settings.n);
        let mut prompt_logprobs = Vec::new();
        while let Some(item) = updates.next().await {
            let (prompt, update) = item?;
            self.tally.observe(prompt, &update);
            match update {
                Update::Prompt { logprobs, .. } => prompt_logprobs = logprobs,
                Update::Delta { choice, text, token, finish } => {
                    let Some(choice) = choices.get_mut(choice) else { continue };
                    let token = token.filter(|_| shown).map(|(token, _)| token);
                    choice.push(&text, token, finish);
                }
            }
        }
        let is_heavy = self.settings.logprobs.is_heavy();
        blocking::run_if(is_heavy, move || self.reply(choices, &prompt_logprobs)).await
    }

    /// The whole reply. With log-probabilities it can be many megabytes.
    fn reply(
        &self,
        choices: Vec<Choice<SampledToken>>,
        prompt_logprobs: &[Option<SampledToken>],
    ) -> Result<Response, ApiError> {
        let shown = self.shows_logprobs();
        let choices = choices
            .into_iter()
            .enumerate()
            .map(|(index, mut choice)| {
                let finish = choice.finish()?;
                Ok(ChatChoice {
                    index,
                    message: AssistantMessage::new(choice.text),
                    logprobs: shown.then(|| self.writer.chat(&choice.tokens)),
                    finish_reason: finish.reason,
                    stop_reason: Some(finish.stop).filter(|stop| !stop.is_null()),
                    token_ids: self.token_ids(|| self.tally.fingerprint.ids(index).to_vec()),
                })
            })
            .collect::<Result<Vec<_>, ApiError>>()?;
        let wanted = self.settings.logprobs.prompt;
        let reply = Reply {
            usage: Some(self.tally.usage()),
            system_fingerprint: Some(self.tally.fingerprint.to_json()),
            prompt_logprobs: wanted.map(|k| self.writer.prompt(prompt_logprobs, k)),
            prompt_token_ids: self.settings.return_token_ids.then_some(&self.prompt_ids[..]),
            cartridges: &self.tally.cartridges,
            ..self.envelope("chat.completion", choices)
        };
        Ok(Json(reply).into_response())
    }

    fn shows_logprobs(&self) -> bool {
        self.settings.logprobs.show && !self.settings.logprobs.in_fingerprint
    }

    fn token_ids(&self, ids: impl FnOnce() -> Vec<u32>) -> Option<Vec<u32>> {
        self.settings.return_token_ids.then(ids)
    }

    fn envelope<C>(&self, object: &'static str, choices: C) -> Reply<'_, C> {
        Reply {
            id: &self.id,
            object,
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

    fn chunk(&self, choice: ChatChunkChoice) -> Reply<'_, [ChatChunkChoice; 1]> {
        self.envelope("chat.completion.chunk", [choice])
    }
}

impl Encoder for ChatReply {
    fn update(&mut self, prompt: usize, update: Update, events: &mut Events) {
        self.tally.observe(prompt, &update);
        match update {
            Update::Prompt { .. } => {
                for index in 0..self.settings.n {
                    let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
                    let ids = (self.settings.return_token_ids && index == 0)
                        .then_some(&self.prompt_ids[..]);
                    let reply = Reply {
                        prompt_token_ids: ids,
                        cartridges: &self.tally.cartridges,
                        ..self.chunk(empty_choice(index, delta))
                    };
                    events.json(&reply);
                }
            }
            Update::Delta { choice: index, text, token, finish } => {
                let token = token.map(|(token, _)| token);
                let wants_token = self.shows_logprobs() || self.settings.return_token_ids;
                if !text.is_empty() || (wants_token && token.is_some()) {
                    let delta = Delta { role: None, content: Some(text) };
                    let tokens = token.as_slice();
                    let choice = ChatChunkChoice {
                        logprobs: self.chunk_logprobs(tokens),
                        token_ids: self.token_ids(|| tokens.iter().map(|t| t.id).collect()),
                        ..empty_choice(index, delta)
                    };
                    events.json(&self.chunk(choice));
                }
                if let Some(finish) = finish {
                    let last = self.tally.is_complete();
                    let choice = ChatChunkChoice {
                        finish_reason: Some(finish.reason),
                        stop_reason: Some(finish.stop).filter(|stop| !stop.is_null()),
                        ..empty_choice(index, Delta::default())
                    };
                    let reply = Reply {
                        system_fingerprint: last.then(|| self.tally.fingerprint.to_json()),
                        ..self.chunk(choice)
                    };
                    events.json(&reply);
                }
            }
        }
    }

    fn finish(&mut self, events: &mut Events) {
        if self.settings.include_usage {
            let reply = Reply::<[ChatChunkChoice; 0]> {
                usage: Some(self.tally.usage()),
                system_fingerprint: Some(self.tally.fingerprint.to_json()),
                cartridges: &self.tally.cartridges,
                ..self.envelope("chat.completion.chunk", [])
            };
            events.json(&reply);
        }
    }
}

impl ChatReply {
    fn chunk_logprobs(&self, tokens: &[SampledToken]) -> Option<ChatLogprobs> {
        (self.shows_logprobs() && !tokens.is_empty()).then(|| self.writer.chat(tokens))
    }
}

fn empty_choice(index: usize, delta: Delta) -> ChatChunkChoice {
    ChatChunkChoice {
        index,
        delta,
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        token_ids: None,
    }
}
