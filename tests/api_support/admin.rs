//! A server with keys and a cartridge directory, and an admin's requests to it over real connections.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use cartouche::{
    api::{Access, ApiOptions, KeySources},
    cartridge::write_safetensors,
    engine::EngineOptions,
};
use serde_json::{Value, json};

use super::{Reply, Server, merge, wire::Listening};

pub const USER: &str = "sk-user-Secret-1";
pub const ADMIN: &str = "sk-admin-Secret-2";

/// A server with a cartridge directory of its own.
pub struct Test {
    pub server: Server,
    pub wire: Listening,
    pub dir: tempfile::TempDir,
}

impl Test {
    pub async fn new() -> Self {
        Self::with_access(Self::keys()).await
    }

    pub fn keys() -> Access {
        let sources = KeySources {
            user_keys: Some(USER.to_owned()),
            admin_keys: Some(ADMIN.to_owned()),
            ..KeySources::default()
        };
        Access::new(sources, true).unwrap()
    }

    pub async fn with_access(access: Access) -> Self {
        Self::with(access, ApiOptions::default()).await
    }

    pub async fn with(access: Access, options: ApiOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = Some(dir.path().join("cartridges"));
        let server = Server::with_access(options, EngineOptions::default(), path, access);
        let wire = Listening::start(&server).await;
        Self { server, wire, dir }
    }

    /// The bytes of a cartridge file, and its generation.
    pub fn file(&self, tokens: usize, seed: u64) -> (Vec<u8>, String) {
        let path = self.dir.path().join("made.safetensors");
        let cartridge = self.server.cartridge(tokens, seed);
        write_safetensors(&path, &cartridge).unwrap();
        (std::fs::read(path).unwrap(), cartridge.generation().to_hex())
    }

    pub async fn ask(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Reply {
        let key = ("authorization", format!("Bearer {ADMIN}"));
        let headers = headers.iter().map(|(name, value)| (*name, (*value).to_owned()));
        let headers: Vec<_> = headers.chain([key]).collect();
        self.wire.send(method, path, &headers, body.to_vec()).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Reply {
        self.ask("POST", path, &[], body.to_string().as_bytes()).await
    }

    pub async fn form(&self, parts: &[(&str, &[u8])]) -> Reply {
        self.ask("POST", "/v1/cartridges", &[("content-type", FORM)], &form(parts)).await
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.ask("GET", path, &[], b"").await
    }

    /// The generation that answers a request for `id`.
    pub async fn used(&self, id: &str) -> Reply {
        self.chat(json!({"cartridges": [{"id": id, "source": "local"}]})).await
    }

    pub async fn chat(&self, extra: Value) -> Reply {
        let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 2});
        let body = merge(body, extra);
        self.server.ask(USER, "POST", "/v1/chat/completions", body).await
    }

    /// Every file below the cartridge directory.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        collect(&self.dir.path().join("cartridges"), &mut files);
        files
    }

    /// Files of an upload that is under way, or was left behind.
    pub fn uploads(&self) -> Vec<PathBuf> {
        let mut files = self.files();
        let root = self.dir.path().join("cartridges");
        files.retain(|path| {
            let path = path.strip_prefix(&root).unwrap().to_str().unwrap();
            path.starts_with('.') && !path.ends_with(".lock")
        });
        files
    }
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().map(Result::unwrap) {
        match entry.path().is_dir() {
            true => collect(&entry.path(), files),
            false => files.push(entry.path()),
        }
    }
}

pub const FORM: &str = "multipart/form-data; boundary=XX";

pub fn form(parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, content) in parts {
        let file = if ["cartridge", "config"].contains(name) { "; filename=\"f\"" } else { "" };
        let head = format!("--XX\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n");
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--XX--\r\n");
    body
}

pub fn tag(generation: &str) -> String {
    format!("\"{generation}\"")
}

pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..1200 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("not within half a minute: {what}");
}
