//! Cartridges in model repositories of the Hugging Face hub.
//!
//! hf-hub knows where its users keep their token. The transfer is our own: hf-hub has no limits on time or
//! size, does not check digests, and keeps a cache of links that cannot be shared safely with one that evicts.

use std::time::Instant;

use serde_json::Value;

use super::{
    cached::{Fetch, Remote},
    choose::{base, choose},
    transfer::{
        Address, Expected, Failure, Hosts, Request, Secret, Told, Transfer, encode, encode_path,
        parse_sha256,
    },
};
use crate::cartridge::{CartridgeError, Source};

/// Where the hub's storage is: files are sent on to it.
const STORAGE: [&str; 2] = ["*.huggingface.co", "*.hf.co"];

/// The hub.
#[derive(Debug, Clone)]
pub struct HuggingFace {
    endpoint: String,
    authorization: Option<Secret>,
    hosts: Hosts,
    offline: bool,
}

/// A repository, `owner/name[/file][@revision]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    pub repo: String,
    pub file: Option<String>,
    pub revision: String,
}

impl HubId {
    /// # Errors
    /// [`CartridgeError::InvalidId`].
    pub fn parse(id: &str) -> Result<Self, CartridgeError> {
        let invalid = |reason: &str| CartridgeError::InvalidId {
            id: id.to_owned(),
            reason: format!("{reason}; a repository of the hub is owner/name[/file][@revision]"),
        };
        let (path, revision) = id.split_once('@').unwrap_or((id, "main"));
        let is_part = |part: &str| {
            let is_char = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(is_char)
        };
        let is_revision = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        if revision.is_empty() || revision.contains("..") || !revision.chars().all(is_revision) {
            return Err(invalid("its revision is none"));
        }
        let parts: Vec<&str> = path.splitn(3, '/').collect();
        if !parts.iter().take(2).all(|part| is_part(part)) {
            return Err(invalid("it names no repository"));
        }
        let file = parts.get(2).map(|file| (*file).to_owned());
        let is_path = |file: &String| {
            file.split('/').all(|part| !matches!(part, "" | "." | ".."))
                && (file.ends_with(".pt") || file.ends_with(".safetensors"))
        };
        if file.as_ref().is_some_and(|file| !is_path(file)) {
            return Err(invalid("its file is no .pt or .safetensors"));
        }
        let repo = parts[..parts.len().min(2)].join("/");
        Ok(Self { repo, file, revision: revision.to_owned() })
    }
}

impl HuggingFace {
    /// `HF_ENDPOINT`, `HF_TOKEN` or the token that `hf auth login` left, `HF_HUB_OFFLINE`. `hosts` are further
    /// ones the hub may send on to.
    ///
    /// # Errors
    /// A sentence about a variable that cannot be used.
    pub fn from_env(hosts: &[String], offline: bool) -> Result<Self, String> {
        let flag = |name| std::env::var(name).is_ok_and(|v| !matches!(v.as_str(), "" | "0"));
        let set = |name| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let token = set("HF_TOKEN").or_else(|| hf_hub::Cache::from_env().token());
        let hosts = hosts.iter().map(String::as_str).chain(STORAGE);
        let offline = offline || flag("HF_HUB_OFFLINE") || flag("TRANSFORMERS_OFFLINE");
        Self::new(&endpoint, token.as_deref(), Hosts::new(hosts)?, offline)
    }

    /// # Errors
    /// A sentence about what cannot be used.
    pub fn new(
        endpoint: &str,
        token: Option<&str>,
        hosts: Hosts,
        offline: bool,
    ) -> Result<Self, String> {
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        Address::parse(&endpoint).map_err(|reason| format!("HF_ENDPOINT: {reason}"))?;
        let authorization = token.map(|token| Secret::new(format!("Bearer {}", token.trim())));
        let authorization = authorization.transpose().map_err(|e| format!("HF_TOKEN: {e}"))?;
        Ok(Self { endpoint, authorization, hosts, offline })
    }

    /// A request to the hub.
    ///
    /// # Errors
    /// [`CartridgeError::InvalidId`] for a path that is no address.
    pub fn request(&self, id: &str, path: &str) -> Result<Request, CartridgeError> {
        let address = Address::parse(&format!("{}/{path}", self.endpoint)).map_err(|reason| {
            CartridgeError::InvalidId { id: id.to_owned(), reason: reason.to_owned() }
        })?;
        let (authorization, hosts) = (self.authorization.clone(), self.hosts.clone());
        Ok(Request { authorization, hosts, ..Request::new(address) })
    }

    pub fn has_token(&self) -> bool {
        self.authorization.is_some()
    }

    /// # Errors
    /// [`CartridgeError::SourceUnavailable`] if the network is not to be used.
    pub fn check_online(&self, id: &str) -> Result<(), CartridgeError> {
        if !self.offline {
            return Ok(());
        }
        Err(CartridgeError::SourceUnavailable {
            id: id.to_owned(),
            from: Source::Huggingface,
            reason: format!(
                "{}: the network is not used (--offline, HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is \
                 set), only what the cartridge cache holds",
                stem(id)
            ),
        })
    }
}

fn stem(id: &str) -> String {
    format!("Could not access HuggingFace repository {id}")
}

impl Fetch for HuggingFace {
    fn source(&self) -> Source {
        Source::Huggingface
    }

    fn locate(
        &self,
        id: &str,
        transfer: &Transfer,
        deadline: Instant,
    ) -> Result<Remote, CartridgeError> {
        let HubId { repo, file, revision } = HubId::parse(id)?;
        self.check_online(id)?;
        // `blobs` adds sizes and digests.
        let path = format!("api/models/{repo}/revision/{}?blobs=true", encode(&revision));
        let listing = transfer.get_json(&self.request(id, &path)?, deadline);
        let listing = listing.map_err(|failure| self.told(id, failure))?;
        let not_found = |reason: String| CartridgeError::NotFound {
            id: id.to_owned(),
            hint: format!("{}: {reason}", stem(id)),
        };
        let siblings = listing["siblings"].as_array().map_or(&[][..], Vec::as_slice);
        let name = |sibling: &'_ Value| sibling["rfilename"].as_str().map(str::to_owned);
        let names: Vec<String> = siblings.iter().filter_map(name).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let chosen = match &file {
            Some(file) => names.iter().copied().find(|name| name == file),
            None => choose(&names).map_err(not_found)?,
        };
        let Some(chosen) = chosen else {
            let what =
                file.as_deref().unwrap_or("cartridge.pt, cartridge.safetensors or other .pt");
            return Err(not_found(format!("revision {revision} has no {what}")));
        };
        let Some(commit) = listing["sha"].as_str().filter(|sha| !sha.is_empty()) else {
            let host = self.endpoint.clone();
            let reason = "the list of files names no commit".to_owned();
            return Err(self.told(id, Failure::Malformed { host, reason }));
        };
        let entry = siblings.iter().find(|sibling| sibling["rfilename"] == chosen);
        let entry = entry.unwrap_or(&Value::Null);
        let lfs = &entry["lfs"];
        // Everything of one commit, also if another one is pushed in between.
        let resolve = |file: &str| {
            let path = format!("{repo}/resolve/{}/{}", encode(commit), encode_path(file));
            self.request(id, &path)
        };
        let beside = format!("{}config.yaml", chosen.strip_suffix(base(chosen)).unwrap_or(""));
        let config = [beside.as_str(), "config.yaml"].into_iter().find(|name| names.contains(name));
        Ok(Remote {
            request: resolve(chosen)?,
            file: chosen.to_owned(),
            expected: Expected {
                size: lfs["size"].as_u64().or(entry["size"].as_u64()),
                sha256: lfs["sha256"].as_str().or(lfs["oid"].as_str()).and_then(parse_sha256),
                md5: None,
            },
            revision: Some(commit.to_owned()),
            etag: entry["blobId"].as_str().map(str::to_owned),
            config: config.map(resolve).transpose()?,
        })
    }

    fn told(&self, id: &str, failure: Failure) -> CartridgeError {
        let access = match self.has_token() {
            true => "HF_TOKEN gives no access to it",
            false => "HF_TOKEN must be set to a token that gives access to it",
        };
        failure.told(Told { id, source: Source::Huggingface, stem: &stem(id), access })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_the_hub() {
        let id = |repo: &str, file: Option<&str>, revision: &str| HubId {
            repo: repo.to_owned(),
            file: file.map(str::to_owned),
            revision: revision.to_owned(),
        };
        for (text, parsed) in [
            (
                "hazyresearch/cartridge-wauoq23f",
                id("hazyresearch/cartridge-wauoq23f", None, "main"),
            ),
            ("gpt2", id("gpt2", None, "main")),
            ("a/b@v1.0", id("a/b", None, "v1.0")),
            ("a/b@refs/pr/3", id("a/b", None, "refs/pr/3")),
            ("a/b/runs/cache-step9.pt@x", id("a/b", Some("runs/cache-step9.pt"), "x")),
        ] {
            assert_eq!(HubId::parse(text).unwrap(), parsed, "{text}");
        }
        let wrong = ["", "/", "a/", "../b", "a/b@", "a/b@../x", "a/b?x=y", "a/b/x", "a/b/../c.pt"];
        for text in wrong.into_iter().chain(["a b/c", "a/b#c", "a/b@v%2e"]) {
            assert!(matches!(HubId::parse(text), Err(CartridgeError::InvalidId { .. })), "{text}");
        }
    }
}
