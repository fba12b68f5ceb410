//! Into a model repository of the hub, as one commit: small files in the commit, large ones before it.

use std::time::Instant;

use serde_json::{Value, json};
use ureq::http::Method;

use super::Piece;
use crate::cartridge::{
    CartridgeError, Source,
    sources::{
        HubId, HuggingFace,
        cached::Fetch,
        transfer::{Address, Content, Failure, Request, Transfer, encode},
    },
};

const LFS: &str = "application/vnd.git-lfs+json";
/// Bytes of a file that the hub wants inside the commit; more is an error of the hub's answer.
const MOST_INSIDE: u64 = 10 << 20;

impl HuggingFace {
    /// Publishes `pieces` as one commit and returns its address. The repository is made if there is none.
    ///
    /// # Errors
    /// [`CartridgeError::InvalidId`], [`CartridgeError::SourceUnavailable`], [`CartridgeError::NotFound`] for a
    /// revision that does not exist. Either all of it was published or nothing shows.
    pub fn push(
        &self,
        id: &str,
        pieces: &[Piece],
        (message, private): (&str, bool),
        transfer: &Transfer,
    ) -> Result<String, CartridgeError> {
        let HubId { repo, file, revision } = HubId::parse(id)?;
        self.check_online(id)?;
        let deadline = transfer.deadline();
        let refused = |reason: &str| CartridgeError::SourceUnavailable {
            id: id.to_owned(),
            from: Source::Huggingface,
            reason: reason.to_owned(),
        };
        if file.is_some() {
            return Err(refused("give a repository, owner/name, to publish to; not a file in it"));
        }
        if !self.has_token() {
            return Err(refused("HF_TOKEN must be set to a token that may write"));
        }
        let push = Push { hub: self, id, repo: &repo, transfer, deadline };
        push.create(private)?;
        let modes = push.modes(&revision, pieces)?;
        let stored: Vec<&Piece> =
            pieces.iter().zip(&modes).filter(|(_, is)| **is).map(|(p, _)| p).collect();
        if !stored.is_empty() {
            push.store(&revision, &stored)?;
        }
        push.commit(&revision, pieces, &modes, message)
    }
}

struct Push<'a> {
    hub: &'a HuggingFace,
    id: &'a str,
    repo: &'a str,
    transfer: &'a Transfer,
    deadline: Instant,
}

impl Push<'_> {
    fn told(&self, failure: Failure) -> CartridgeError {
        self.hub.told(self.id, failure)
    }

    fn malformed(&self, reason: &str) -> CartridgeError {
        self.told(Failure::Malformed { host: "the hub".to_owned(), reason: reason.to_owned() })
    }

    fn create(&self, private: bool) -> Result<(), CartridgeError> {
        let request = self.hub.request(self.id, "api/repos/create")?;
        let (owner, name) = match self.repo.split_once('/') {
            Some((owner, name)) => (Some(owner), name),
            None => (None, self.repo),
        };
        let visibility = if private { "private" } else { "public" };
        let body =
            json!({"name": name, "organization": owner, "type": "model", "visibility": visibility});
        match self.transfer.post_json(&request, &body, false, self.deadline) {
            // It is there already, and stays as visible as it is.
            Err(failure) if failure.status() == Some(409) => Ok(()),
            // Tokens may be allowed to write to one repository without being allowed to make others.
            Err(failure) if failure.status() == Some(403) => {
                let path = format!("api/models/{}/revision/main", self.repo);
                let there =
                    self.transfer.get_json(&self.hub.request(self.id, &path)?, self.deadline);
                there.map(|_| ()).map_err(|_| self.told(failure))
            }
            other => other.map(|_| ()).map_err(|failure| self.told(failure)),
        }
    }

    /// For each piece whether it goes to the large file storage.
    fn modes(&self, revision: &str, pieces: &[Piece]) -> Result<Vec<bool>, CartridgeError> {
        let path = format!("api/models/{}/preupload/{}", self.repo, encode(revision));
        let mut files = Vec::new();
        for piece in pieces {
            files.push(json!({"path": piece.name, "sample": piece.sample()?, "size": piece.size}));
        }
        let request = self.hub.request(self.id, &path)?;
        let body = json!({"files": files});
        let reply = self.transfer.post_json(&request, &body, true, self.deadline);
        let reply = reply.map_err(|failure| self.told(failure))?;
        let answers = reply["files"].as_array().map_or(&[][..], Vec::as_slice);
        let mode = |piece: &Piece| {
            let answer = answers.iter().find(|answer| answer["path"] == *piece.name);
            match answer.and_then(|answer| answer["uploadMode"].as_str()) {
                Some("lfs") if piece.size > 0 => Ok(true),
                Some(_) if piece.size <= MOST_INSIDE => Ok(false),
                _ => Err(self.malformed("it does not say where a file goes")),
            }
        };
        pieces.iter().map(mode).collect()
    }

    /// Brings pieces to the large file storage, unless it has them.
    fn store(&self, revision: &str, pieces: &[&Piece]) -> Result<(), CartridgeError> {
        let path = format!("{}.git/info/lfs/objects/batch", self.repo);
        let request = self.hub.request(self.id, &path)?;
        let request = request.with("accept", LFS).with("content-type", LFS);
        let objects = pieces.iter().map(|piece| json!({"oid": piece.sha256, "size": piece.size}));
        let body = json!({
            "operation": "upload", "transfers": ["basic", "multipart"], "hash_algo": "sha256",
            "ref": {"name": revision}, "objects": objects.collect::<Vec<_>>(),
        });
        let reply = self.transfer.post_json(&request, &body, true, self.deadline);
        let reply = reply.map_err(|failure| self.told(failure))?;
        let answers = reply["objects"].as_array().map_or(&[][..], Vec::as_slice);
        for piece in pieces {
            let answer = answers.iter().find(|answer| answer["oid"] == piece.sha256);
            let answer =
                answer.ok_or_else(|| self.malformed("it says nothing of a file's upload"))?;
            if let Some(message) = answer["error"]["message"].as_str() {
                return Err(self.malformed(message));
            }
            // No actions: the storage has it.
            if let Some(upload) = answer["actions"].get("upload") {
                self.upload(piece, upload).map_err(|failure| self.told(failure))?;
            }
            if let Some(verify) = answer["actions"].get("verify") {
                let body = json!({"oid": piece.sha256, "size": piece.size});
                let request = self.at(&verify["href"]).map_err(|failure| self.told(failure))?;
                let verified = self.transfer.post_json(&request, &body, true, self.deadline);
                verified.map_err(|failure| self.told(failure))?;
            }
        }
        Ok(())
    }

    fn upload(&self, piece: &Piece, action: &Value) -> Result<(), Failure> {
        let whole = self.at(&action["href"])?;
        let header = &action["header"];
        let chunk = &header["chunk_size"];
        let chunk = chunk.as_u64().or_else(|| chunk.as_str()?.parse().ok());
        let Some(chunk) = chunk.filter(|chunk| *chunk > 0) else {
            let content = piece.part(0, piece.size);
            return self.put(&whole, content).map(|_| ());
        };
        let mut parts = Vec::new();
        for number in 1..=piece.size.div_ceil(chunk) {
            let request = self.at(&header[number.to_string()])?;
            let etag = self.put(&request, piece.part((number - 1) * chunk, chunk))?;
            parts.push(json!({"partNumber": number, "etag": etag}));
        }
        let body = json!({"oid": piece.sha256, "parts": parts});
        let complete = whole.with("accept", LFS).with("content-type", LFS);
        self.transfer.send(
            &Method::POST,
            &complete,
            Content::Bytes(body.to_string().as_bytes()),
            true,
            self.deadline,
        )?;
        Ok(())
    }

    /// The ETag that the storage gave it.
    fn put(&self, request: &Request, content: Content<'_>) -> Result<String, Failure> {
        let (heads, _) = self.transfer.send(&Method::PUT, request, content, true, self.deadline)?;
        let etag = heads.get("etag").and_then(|etag| etag.to_str().ok());
        Ok(etag.unwrap_or_default().to_owned())
    }

    /// An address the hub gave: signed, at its storage, or its own.
    fn at(&self, href: &Value) -> Result<Request, Failure> {
        let malformed = |reason: &str| Failure::Malformed {
            host: "the hub".to_owned(),
            reason: format!("the address of an upload: {reason}"),
        };
        let address = Address::parse(href.as_str().unwrap_or_default()).map_err(malformed)?;
        let home = self.hub.request(self.id, "").map_err(|_| malformed("no home"))?;
        if home.address.is_https() && !address.is_https() {
            return Err(malformed("it is not encrypted"));
        }
        let is_home = address.origin() == home.address.origin();
        let authorization = home.authorization.filter(|_| is_home);
        Ok(Request { authorization, ..Request::new(address) })
    }

    fn commit(
        &self,
        revision: &str,
        pieces: &[Piece],
        modes: &[bool],
        message: &str,
    ) -> Result<String, CartridgeError> {
        let header = json!({"key": "header", "value": {"summary": message, "description": ""}});
        let mut body = format!("{header}\n");
        for (piece, is_stored) in pieces.iter().zip(modes) {
            let line = match is_stored {
                true => json!({"key": "lfsFile", "value": {
                    "path": piece.name, "algo": "sha256", "oid": piece.sha256, "size": piece.size,
                }}),
                false => json!({"key": "file", "value": {
                    "path": piece.name, "encoding": "base64", "content": piece.base64(MOST_INSIDE)?,
                }}),
            };
            body += &format!("{line}\n");
        }
        let path = format!("api/models/{}/commit/{}", self.repo, encode(revision));
        let request =
            self.hub.request(self.id, &path)?.with("content-type", "application/x-ndjson");
        // Not repeated: a commit whose answer was lost would be made twice.
        let content = Content::Bytes(body.as_bytes());
        let sent = self.transfer.send(&Method::POST, &request, content, false, self.deadline);
        let (_, reply) = sent.map_err(|failure| self.told(failure))?;
        let reply: Value = serde_json::from_slice(&reply).unwrap_or_default();
        let address = reply["commitUrl"].as_str();
        Ok(address.ok_or_else(|| self.malformed("it names no commit"))?.to_owned())
    }
}
