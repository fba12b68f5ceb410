//! Cartridges among the files of Weights & Biases runs, where the original trainers put them.

use std::time::Instant;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{
    cached::{Fetch, Remote},
    choose::{base, step},
    transfer::{Address, Expected, Failure, Request, Secret, Told, Transfer},
};
use crate::{
    cartridge::{CartridgeError, Source},
    limits,
};

/// Files of a run per page.
const PAGE: u64 = 200;

const FILES: &str = "query RunFiles($entity: String!, $project: String!, $run: String!, $after: String, \
    $first: Int!) { project(name: $project, entityName: $entity) { run(name: $run) { \
    files(first: $first, after: $after) { edges { node { name sizeBytes md5 updatedAt url directUrl } \
    cursor } pageInfo { endCursor hasNextPage } } } } }";

/// A W&B server.
#[derive(Debug, Clone)]
pub struct Wandb {
    base: String,
    authorization: Option<Secret>,
    entity: String,
    project: String,
    offline: bool,
}

/// A run, `[[entity/]project/]run[@file]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunId {
    pub entity: String,
    pub project: String,
    pub run: String,
    pub file: Option<String>,
}

impl std::fmt::Display for RunId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.entity, self.project, self.run)
    }
}

impl Wandb {
    /// `WANDB_API_KEY`, `WANDB_BASE_URL`; the run of an id that names none is looked for in
    /// `CARTOUCHE_WANDB_ENTITY` or `WANDB_ENTITY`, and `CARTOUCHE_WANDB_PROJECT` or `WANDB_PROJECT`; without
    /// those, where Tokasaurus looks.
    ///
    /// # Errors
    /// A sentence about a variable that cannot be used.
    pub fn from_env(offline: bool) -> Result<Self, String> {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let either = |part: &str| {
            set(&format!("CARTOUCHE_WANDB_{part}")).or_else(|| set(&format!("WANDB_{part}")))
        };
        let base = set("WANDB_BASE_URL").unwrap_or_else(|| "https://api.wandb.ai".to_owned());
        let entity = either("ENTITY").unwrap_or_else(|| "hazy-research".to_owned());
        let project = either("PROJECT").unwrap_or_else(|| "cartridges".to_owned());
        Self::new(&base, set("WANDB_API_KEY").as_deref(), (&entity, &project), offline)
    }

    /// # Errors
    /// A sentence about what cannot be used.
    pub fn new(
        base: &str,
        key: Option<&str>,
        (entity, project): (&str, &str),
        offline: bool,
    ) -> Result<Self, String> {
        let base = base.trim_end_matches('/').to_owned();
        Address::parse(&base).map_err(|reason| format!("WANDB_BASE_URL: {reason}"))?;
        let basic = |key: &str| {
            // Base64 would hide a line break that came with the key.
            let key = Secret::new(format!("api:{}", key.trim()))?;
            Secret::new(format!("Basic {}", STANDARD.encode(key.reveal())))
        };
        let authorization = key.map(basic).transpose();
        let authorization = authorization.map_err(|e| format!("WANDB_API_KEY: {e}"))?;
        let (entity, project) = (entity.to_owned(), project.to_owned());
        Ok(Self { base, authorization, entity, project, offline })
    }

    /// # Errors
    /// [`CartridgeError::InvalidId`].
    pub fn parse(&self, id: &str) -> Result<RunId, CartridgeError> {
        let (path, file) = match id.split_once('@') {
            Some((path, file)) => (path, Some(file.to_owned())),
            None => (id, None),
        };
        let parts: Vec<&str> = path.split('/').collect();
        let is_part = |part: &&str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_alphanumeric() || "-_. ".contains(c))
        };
        let owned = |parts: [&str; 3]| parts.map(str::to_owned);
        let [entity, project, run] = match &parts[..] {
            parts if !parts.iter().all(is_part) || file.as_deref() == Some("") => None,
            [run] => Some(owned([&self.entity, &self.project, run])),
            [project, run] => Some(owned([&self.entity, project, run])),
            [entity, project, run] => Some(owned([entity, project, run])),
            _ => None,
        }
        .ok_or_else(|| CartridgeError::InvalidId {
            id: id.to_owned(),
            reason: "a W&B run is [[entity/]project/]run, with @file or not".to_owned(),
        })?;
        Ok(RunId { entity, project, run, file })
    }

    /// # Errors
    /// [`CartridgeError::SourceUnavailable`] without a key, or if the network is not to be used.
    pub fn check_ready(&self, id: &str) -> Result<(), CartridgeError> {
        let unavailable = |reason: &str| {
            let reason = format!("{}: {reason}", self.stem(id));
            Err(CartridgeError::SourceUnavailable {
                id: id.to_owned(),
                from: Source::Wandb,
                reason,
            })
        };
        if self.offline {
            return unavailable(
                "the network is not used (--offline), only what the cartridge cache holds",
            );
        }
        if self.authorization.is_none() {
            return unavailable(
                "WANDB_API_KEY must be set (an id of the Hugging Face hub needs `source`: \
                 \"huggingface\")",
            );
        }
        Ok(())
    }

    /// The address of a file the API returned. It may be at a storage's host: then it is signed, and no key
    /// goes there.
    ///
    /// # Errors
    /// A sentence, for an address that is not to be used.
    pub fn file_request(&self, url: &str) -> Result<Request, &'static str> {
        let home = Address::parse(&self.base)?;
        let whole = match url.starts_with('/') {
            true => format!("{}{url}", self.base),
            false => url.to_owned(),
        };
        let address = Address::parse(&whole)?;
        let is_home = address.origin() == home.origin();
        if !is_home && home.is_https() && !address.is_https() {
            return Err("it is not encrypted");
        }
        let authorization = self.authorization.clone().filter(|_| is_home);
        Ok(Request { authorization, ..Request::new(address) })
    }

    /// The `data` of a GraphQL reply.
    ///
    /// # Errors
    /// [`Failure`]; what the server says is wrong is a [`Failure::Malformed`].
    pub fn graphql(
        &self,
        transfer: &Transfer,
        (query, variables): (&str, &Value),
        may_repeat: bool,
        deadline: Instant,
    ) -> Result<Value, Failure> {
        let malformed = |reason: String| Failure::Malformed { host: self.base.clone(), reason };
        let request = self.file_request("/graphql").map_err(|e| malformed(e.to_owned()))?;
        let body = json!({"query": query, "variables": variables});
        let mut reply = transfer.post_json(&request, &body, may_repeat, deadline)?;
        if let Some(message) = reply["errors"][0]["message"].as_str() {
            return Err(malformed(
                message.chars().take(limits::MAX_ERROR_TEXT_BYTES / 4).collect(),
            ));
        }
        Ok(reply["data"].take())
    }

    fn stem(&self, id: &str) -> String {
        let run = self.parse(id).map_or_else(|_| id.to_owned(), |run| run.to_string());
        format!("Could not find wandb run for cartridge_id: {run}")
    }

    /// All files of a run; `None` if there is no such run.
    fn files(
        &self,
        run: &RunId,
        transfer: &Transfer,
        deadline: Instant,
    ) -> Result<Option<Vec<Value>>, Failure> {
        let (mut files, mut after) = (Vec::new(), Value::Null);
        for _ in 0..limits::MAX_WANDB_FILE_PAGES {
            let RunId { entity, project, run, .. } = run;
            let variables = json!({
                "entity": entity, "project": project, "run": run, "after": after, "first": PAGE,
            });
            let mut data = self.graphql(transfer, (FILES, &variables), true, deadline)?;
            let page = &mut data["project"]["run"]["files"];
            let Some(edges) = page["edges"].as_array_mut() else { return Ok(None) };
            files.extend(edges.iter_mut().map(|edge| edge["node"].take()));
            if page["pageInfo"]["hasNextPage"] != true {
                break;
            }
            after = page["pageInfo"]["endCursor"].take();
        }
        Ok(Some(files))
    }
}

/// `cartridge.pt`, then `cartridge.safetensors`, then the `cache-step*.pt` with the highest number, then the
/// `.pt` that was written last.
fn choose<'a>(files: &'a [Value], named: Option<&str>) -> Option<&'a Value> {
    let name = |file: &Value| file["name"].as_str().unwrap_or_default().to_owned();
    if let Some(named) = named {
        return files.iter().find(|file| name(file) == named);
    }
    let by_base = |wanted: &str| files.iter().find(|file| base(&name(file)) == wanted);
    let newest_step =
        || files.iter().filter(|f| step(&name(f)).is_some()).max_by_key(|f| step(&name(f)));
    // Times are written as 2025-06-01T12:00:00: they sort as text.
    let written = |file: &&Value| file["updatedAt"].as_str().unwrap_or_default().to_owned();
    let newest = || files.iter().filter(|f| name(f).ends_with(".pt")).max_by_key(written);
    by_base("cartridge.pt")
        .or_else(|| by_base("cartridge.safetensors"))
        .or_else(newest_step)
        .or_else(newest)
}

impl Fetch for Wandb {
    fn source(&self) -> Source {
        Source::Wandb
    }

    fn locate(
        &self,
        id: &str,
        transfer: &Transfer,
        deadline: Instant,
    ) -> Result<Remote, CartridgeError> {
        let run = self.parse(id)?;
        self.check_ready(id)?;
        let files = self.files(&run, transfer, deadline).map_err(|f| self.told(id, f))?;
        let not_found = |what: &str| CartridgeError::NotFound {
            id: id.to_owned(),
            hint: format!("{}: {what}", self.stem(id)),
        };
        let files = files.ok_or_else(|| not_found("there is no such run, or no access to it"))?;
        let file = choose(&files, run.file.as_deref());
        let file = file.ok_or_else(|| not_found("the run has no cartridge file (.pt)"))?;
        let request = |file: &Value| {
            let url = file["directUrl"].as_str().filter(|url| !url.is_empty());
            let url = url.or(file["url"].as_str()).ok_or("it has no address");
            url.and_then(|url| self.file_request(url)).map_err(|reason| {
                let host = self.base.clone();
                let reason = format!("the address of a file: {reason}");
                self.told(id, Failure::Malformed { host, reason })
            })
        };
        let config = files.iter().find(|file| file["name"] == "config.yaml");
        let md5 = file["md5"].as_str().filter(|md5| !md5.is_empty());
        let size = &file["sizeBytes"];
        Ok(Remote {
            request: request(file)?,
            file: file["name"].as_str().unwrap_or_default().to_owned(),
            expected: Expected {
                size: size.as_u64().or_else(|| size.as_str()?.parse().ok()),
                sha256: None,
                md5: md5.and_then(|md5| STANDARD.decode(md5).ok()?.try_into().ok()),
            },
            revision: file["updatedAt"].as_str().map(str::to_owned),
            etag: md5.map(str::to_owned),
            config: config.and_then(|config| request(config).ok()),
        })
    }

    fn told(&self, id: &str, failure: Failure) -> CartridgeError {
        let access = "WANDB_API_KEY gives no access to it";
        failure.told(Told { id, source: Source::Wandb, stem: &self.stem(id), access })
    }
}
