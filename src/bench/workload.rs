//! Request bodies. A body depends on the seed and on which request it is, and on nothing else, so that
//! every target gets the same ones.

use hyper::body::Bytes;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use super::{Api, BenchError, Prefix, PromptSource, WorkloadOptions};

/// Common short words; most tokenizers have one token for most of them.
pub const WORDS: &str = "the of and to in is was he for it with as his on be at by had not are but from \
    or have an they which one you were all her she there would their we him been has when who will no \
    more if out so up said what its about than into them can only other time new some could these two \
    may first then do any like my now over such our man me even most made after also did many before \
    must through years where much your way well down should because long each just state those people \
    too how little good world make very year still see own work men day get here old between both life \
    being under three never know same last another while us off might great go come since against right \
    came take used himself few house use place during high without again home around small however \
    found part once general upon school every water light hand sea ship red blue green stone wind rain \
    north south east west river road tree book word name line end side set put read open run turn move \
    play air animal answer ask back boy call change city close country cross earth eat eye face family \
    far farm father feet fish follow food form girl group grow head hear help horse idea keep kind land \
    large later learn leave let list live look mean mile mother mountain music near need next night \
    number page paper picture plant point question sing song sound stop story study sun table talk tell \
    thing think thought turned want watch white wood young";

/// Which request a body is for.
#[derive(Debug, Clone, Copy)]
pub struct Which {
    /// Counts levels and repeats, so that none finds its prompts in a cache.
    pub round: usize,
    pub warmup: bool,
    pub client: usize,
    /// Clients of the level; 1 in an open loop.
    pub clients: usize,
    pub index: usize,
}

/// Everything bodies are made of.
#[derive(Debug, Clone)]
pub struct Workload {
    pub options: WorkloadOptions,
    pub words: Vec<String>,
    /// Words of a text prefix, and of the prompt after it.
    pub prefix_words: usize,
    pub prompt_words: usize,
    /// Lines of a prompt file.
    file: Vec<Value>,
}

/// Independent random streams for independent things.
fn random(seed: u64, parts: [u64; 5]) -> ChaCha8Rng {
    // SplitMix64's finaliser over the parts.
    let mixed = parts.iter().fold(seed, |state, part| {
        let x = (state ^ part).wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    });
    ChaCha8Rng::seed_from_u64(mixed)
}

impl Workload {
    /// Reads the prompt file if there is one. The numbers of words are set by calibration.
    pub fn new(options: WorkloadOptions) -> Result<Self, BenchError> {
        let file =
            match &options.prompt {
                PromptSource::Random { .. } => Vec::new(),
                PromptSource::File { path } => {
                    let text = std::fs::read_to_string(path)
                        .map_err(|source| BenchError::Io { path: path.clone(), source })?;
                    read_lines(&text, options.api).map_err(|(line, reason)| {
                        BenchError::PromptFile { path: path.clone(), line, reason }
                    })?
                }
            };
        let words = WORDS.split_whitespace().map(str::to_owned).collect();
        Ok(Self { options, words, prefix_words: 0, prompt_words: 1, file })
    }

    /// Random words from now on, whatever the file holds.
    pub fn forget_file(&mut self) {
        self.file.clear();
    }

    /// Space-separated random words; with `seed`, the same ones each time.
    pub fn text(&self, count: usize, seed: u64, parts: [u64; 5]) -> String {
        let mut random = random(seed, parts);
        let mut text = String::with_capacity(count * 7);
        for i in 0..count {
            if i > 0 {
                text.push(' ');
            }
            text += &self.words[(random.next_u64() % self.words.len() as u64) as usize];
        }
        text
    }

    fn prefix(&self, which: Which) -> Option<String> {
        let Prefix::Text { shared, .. } = self.options.prefix else { return None };
        let client = if shared { u64::MAX } else { which.client as u64 };
        Some(self.text(self.prefix_words, self.options.seed, [1, which.round as u64, 0, client, 0]))
    }

    /// The messages or the prompt of one request, a text prefix in front.
    fn prompt(&self, which: Which) -> Value {
        let prefix = self.prefix(which);
        let own = if self.file.is_empty() {
            let parts = match self.options.same_prompt {
                true => [2; 5],
                false => {
                    let warmup = u64::from(which.warmup);
                    [2, which.round as u64, warmup, which.client as u64, which.index as u64]
                }
            };
            let text = self.text(self.prompt_words, self.options.seed, parts);
            as_prompt(text, self.options.api)
        } else if self.options.same_prompt {
            self.file[0].clone()
        } else {
            let warmed = if which.warmup { self.file.len() / 2 } else { 0 };
            let line = which.index * which.clients + which.client + warmed;
            self.file[line % self.file.len()].clone()
        };
        match (prefix, own) {
            (None, own) => own,
            (Some(prefix), Value::Array(mut messages)) => {
                messages.insert(0, json!({"role": "system", "content": prefix}));
                messages.into()
            }
            (Some(prefix), own) => format!("{prefix} {}", own.as_str().unwrap_or_default()).into(),
        }
    }

    /// The members of a body; with `stream`, of the measured kind.
    pub fn members(&self, model: &str, which: Which, stream: bool) -> Map<String, Value> {
        let options = &self.options;
        let mut body = Map::new();
        let mut set = |key: &str, value: Value| {
            body.insert(key.to_owned(), value);
        };
        set("model", model.into());
        match options.api {
            Api::Chat => set("messages", self.prompt(which)),
            Api::Completions => set("prompt", self.prompt(which)),
        }
        set("max_tokens", options.output_tokens.into());
        set("temperature", options.temperature.into());
        if options.temperature > 0.0 {
            set("seed", options.seed.into());
        }
        if options.exact_output {
            set("ignore_eos", true.into());
            set("min_tokens", options.output_tokens.into());
        }
        if let Prefix::Cartridge { ids, source } = &options.prefix {
            let id = &ids[which.client % ids.len()];
            set("cartridges", json!([{"id": id, "source": source}]));
        }
        if stream {
            set("stream", true.into());
            set("stream_options", json!({"include_usage": true}));
        }
        for (key, value) in &options.extra_body {
            match value {
                Value::Null => body.shift_remove(key),
                value => body.insert(key.clone(), value.clone()),
            };
        }
        body
    }

    /// A streaming request as it is sent.
    pub fn body(&self, model: &str, which: Which) -> Bytes {
        Bytes::from(Value::Object(self.members(model, which, true)).to_string())
    }
}

fn as_prompt(text: String, api: Api) -> Value {
    match api {
        Api::Chat => json!([{"role": "user", "content": text}]),
        Api::Completions => text.into(),
    }
}

/// Prompts of a JSON-lines text, as the route takes them; the error names its line from 1.
fn read_lines(text: &str, api: Api) -> Result<Vec<Value>, (usize, String)> {
    let mut prompts = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let invalid = |reason: String| (i + 1, reason);
        let mut value: Value =
            serde_json::from_str(line).map_err(|e| invalid(format!("not JSON: {e}")))?;
        if let Some(messages) = value.get_mut("messages").map(Value::take) {
            if api == Api::Completions {
                return Err(invalid("`messages` need --endpoint chat".to_owned()));
            }
            if !messages.is_array() {
                return Err(invalid("`messages` is not a list".to_owned()));
            }
            prompts.push(messages);
            continue;
        }
        let prompt = value.get_mut("prompt").map(Value::take).unwrap_or(value);
        match prompt {
            Value::String(text) => prompts.push(as_prompt(text, api)),
            _ => {
                return Err(invalid(
                    "expected a string, {\"prompt\": \"...\"} or {\"messages\": [...]}".to_owned(),
                ));
            }
        }
    }
    match prompts.is_empty() {
        true => Err((1, "the file holds no prompts".to_owned())),
        false => Ok(prompts),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn options(prefix: Prefix) -> WorkloadOptions {
        WorkloadOptions {
            api: Api::Chat,
            prompt: PromptSource::Random { tokens: 16 },
            prefix,
            output_tokens: 8,
            exact_output: true,
            temperature: 0.0,
            seed: 7,
            same_prompt: false,
            extra_body: Map::new(),
        }
    }

    fn workload(prefix: Prefix) -> Workload {
        let mut workload = Workload::new(options(prefix)).unwrap();
        (workload.prefix_words, workload.prompt_words) = (20, 12);
        workload
    }

    fn which(round: usize, warmup: bool, client: usize, index: usize) -> Which {
        Which { round, warmup, client, clients: 4, index }
    }

    #[test]
    fn every_request_has_its_own_prompt_and_the_same_one_again() {
        let workload = workload(Prefix::None);
        let mut seen = HashSet::new();
        for (round, client, index) in (0..64).map(|i| (i / 16, i / 4 % 4, i % 4)) {
            for warmup in [false, true] {
                let which = which(round, warmup, client, index);
                let body = workload.body("m", which);
                assert_eq!(body, workload.body("m", which));
                assert!(seen.insert(body), "{which:?} repeats another's prompt");
            }
        }
    }

    #[test]
    fn a_prefix_is_kept_by_its_client_and_shared_when_asked() {
        let system = |workload: &Workload, client, index| {
            let body = workload.members("m", which(0, false, client, index), true);
            assert_eq!(body["messages"][0]["role"], "system");
            body["messages"][0]["content"].as_str().unwrap().to_owned()
        };
        let own = workload(Prefix::Text { tokens: 20, shared: false });
        assert_eq!(system(&own, 1, 0), system(&own, 1, 5));
        assert_ne!(system(&own, 1, 0), system(&own, 2, 0));
        let shared = workload(Prefix::Text { tokens: 20, shared: true });
        assert_eq!(system(&shared, 1, 0), system(&shared, 2, 5));
        assert_eq!(system(&shared, 0, 0).split(' ').count(), 20);
    }

    #[test]
    fn cartridges_go_round_and_extra_members_win() {
        let ids = vec!["a".to_owned(), "b".to_owned()];
        let mut workload = workload(Prefix::Cartridge { ids, source: "local".to_owned() });
        let extra = json!({"min_tokens": null, "top_k": 1, "stream_options": null});
        workload.options.extra_body = extra.as_object().unwrap().clone();
        let body = workload.body("m", which(0, false, 3, 0));
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["cartridges"], json!([{"id": "b", "source": "local"}]));
        assert_eq!((&body["top_k"], &body["ignore_eos"]), (&json!(1), &json!(true)));
        assert!(body.get("min_tokens").is_none() && body.get("stream_options").is_none());
    }

    #[test]
    fn prompt_files_are_read_and_their_mistakes_located() {
        let lines = "\"a\"\n\n{\"prompt\": \"b\"}\n";
        assert_eq!(read_lines(lines, Api::Completions).unwrap(), ["a", "b"]);
        let messages = "{\"messages\": [{\"role\": \"user\", \"content\": \"c\"}]}";
        let chat = read_lines(&format!("{lines}{messages}"), Api::Chat).unwrap();
        assert_eq!(chat[2], json!([{"role": "user", "content": "c"}]));
        assert_eq!(chat[0], json!([{"role": "user", "content": "a"}]));
        assert_eq!(read_lines(&format!("\n{messages}"), Api::Completions).unwrap_err().0, 2);
        assert_eq!(read_lines("\"a\"\n{\"promt\": 1}", Api::Chat).unwrap_err().0, 2);
        assert!(read_lines("\n", Api::Chat).is_err());
    }
}
