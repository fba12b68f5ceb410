//! The Hugging Face hub: model repositories, their files, and the commit API. Files of cartridges are in
//! large file storage, which is another host, as on the real one.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    sync::{Arc, Mutex, MutexGuard},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Answer, Asked, StandIn};

type Files = BTreeMap<String, Vec<u8>>;

/// What the hub holds.
#[derive(Default)]
pub struct World {
    /// Commits of each repository; `main` is the last one.
    pub repos: BTreeMap<String, Vec<(String, Files)>>,
    /// Uploaded to the storage, by SHA-256.
    pub objects: BTreeMap<String, Vec<u8>>,
    /// Parts of an upload, by SHA-256 and number.
    pub parts: BTreeMap<(String, usize), Vec<u8>>,
    /// Bytes of a part, if uploads are to come in parts.
    pub part_bytes: Option<usize>,
    /// The only token that gives access.
    pub token: Option<String>,
}

pub struct Hub {
    pub api: StandIn,
    /// The storage that files are sent on to.
    pub cdn: StandIn,
    world: Arc<Mutex<World>>,
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Hub {
    pub fn start() -> Self {
        let world = Arc::new(Mutex::new(World::default()));
        let storage = Arc::clone(&world);
        let cdn = StandIn::start(move |asked| cdn(&mut storage.lock().unwrap(), asked));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let urls = (format!("http://{}", listener.local_addr().unwrap()), cdn.url.clone());
        let hub = Arc::clone(&world);
        let api = StandIn::listen(listener, move |asked| {
            let mut world = hub.lock().unwrap();
            let bearer = world.token.as_ref().map(|token| format!("Bearer {token}"));
            if bearer.is_some() && bearer.as_deref() != asked.head("authorization") {
                return Answer::new(401, "{\"error\":\"Repository not found\"}")
                    .with("X-Error-Code", "RepoNotFound");
            }
            answer(&mut world, asked, &urls.0, &urls.1)
        });
        Self { api, cdn, world }
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// A new commit with these files and no others; its id.
    pub fn commit(&self, repo: &str, files: &[(&str, &[u8])]) -> String {
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec()));
        push_commit(&mut self.world(), repo, files.collect())
    }

    /// Files of the last commit.
    pub fn files(&self, repo: &str) -> Files {
        self.world().repos[repo].last().unwrap().1.clone()
    }
}

fn push_commit(world: &mut World, repo: &str, files: Files) -> String {
    let commits = world.repos.entry(repo.to_owned()).or_default();
    let id = sha256(format!("{repo} {}", commits.len()).as_bytes())[..40].to_owned();
    commits.push((id.clone(), files));
    id
}

fn is_large(name: &str) -> bool {
    name.ends_with(".pt") || name.ends_with(".safetensors")
}

fn not_found(code: &str) -> Answer {
    Answer::new(404, json!({"error": code}).to_string()).with("X-Error-Code", code)
}

/// The commit a revision names, and its files.
fn find<'a>(world: &'a World, repo: &str, revision: &str) -> Result<&'a (String, Files), Answer> {
    let commits = world.repos.get(repo).ok_or_else(|| not_found("RepoNotFound"))?;
    let found = match revision {
        "main" => commits.last(),
        _ => commits.iter().find(|(id, _)| id == revision),
    };
    found.ok_or_else(|| not_found("RevisionNotFound"))
}

fn answer(world: &mut World, asked: &Asked, url: &str, cdn: &str) -> Answer {
    let path = asked.path.split('?').next().unwrap().trim_start_matches('/');
    let with_blobs = asked.path.contains("blobs=true");
    let reply = match path.strip_prefix("api/") {
        Some("repos/create") => Ok(create(world, asked)),
        Some("validate-yaml") => Ok(Answer::json(&json!({"errors": [], "warnings": []}))),
        Some(rest) => models(world, asked, rest.trim_start_matches("models/"), url, with_blobs),
        None if path.ends_with(".git/info/lfs/objects/batch") => Ok(batch(world, asked, url, cdn)),
        None if path == "lfs/verify" => Ok(Answer::new(200, "")),
        None if path == "lfs/complete" => Ok(complete(world, asked)),
        None => resolve(world, path, cdn),
    };
    reply.unwrap_or_else(|error| error)
}

fn models(
    world: &mut World,
    asked: &Asked,
    rest: &str,
    url: &str,
    with_blobs: bool,
) -> Result<Answer, Answer> {
    let is_info = !rest.contains("/preupload/") && !rest.contains("/commit/");
    if is_info {
        let (repo, revision) = rest.split_once("/revision/").unwrap_or((rest, "main"));
        let (id, files) = find(world, repo, revision)?;
        let sibling = |(name, bytes): (&String, &Vec<u8>)| {
            let mut sibling = json!({"rfilename": name});
            if with_blobs {
                sibling["size"] = json!(bytes.len());
                sibling["blobId"] = json!(sha256(bytes)[..40]);
                if is_large(name) {
                    sibling["lfs"] =
                        json!({"sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 130});
                }
            }
            sibling
        };
        let siblings: Vec<Value> = files.iter().map(sibling).collect();
        let info = json!({
            "_id": "0", "id": repo, "modelId": repo, "sha": id, "private": false, "gated": false,
            "disabled": false, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0,
        });
        return Ok(Answer::json(&info));
    }
    if let Some((repo, _)) = rest.split_once("/preupload/") {
        if !world.repos.contains_key(repo) {
            return Err(not_found("RepoNotFound"));
        }
        let body = asked.json();
        let files = body["files"].as_array().unwrap().iter().map(|file| {
            let name = file["path"].as_str().unwrap();
            let mode = if is_large(name) { "lfs" } else { "regular" };
            json!({"path": name, "uploadMode": mode, "shouldIgnore": false})
        });
        return Ok(Answer::json(&json!({"files": files.collect::<Vec<_>>()})));
    }
    if let Some((repo, _)) = rest.split_once("/commit/") {
        return commit(world, asked, repo, url);
    }
    Err(not_found("RepoNotFound"))
}

fn create(world: &mut World, asked: &Asked) -> Answer {
    let body = asked.json();
    let name = body["name"].as_str().unwrap_or_default();
    let repo = match body["organization"].as_str() {
        Some(owner) => format!("{owner}/{name}"),
        None => format!("me/{name}"),
    };
    if world.repos.contains_key(&repo) {
        return Answer::new(409, json!({"error": "exists"}).to_string());
    }
    push_commit(world, &repo, Files::new());
    Answer::json(&json!({"url": format!("https://huggingface.co/{repo}"), "id": repo}))
}

fn batch(world: &World, asked: &Asked, url: &str, cdn: &str) -> Answer {
    let body = asked.json();
    let objects = body["objects"].as_array().unwrap().iter().map(|object| {
        let (oid, size) = (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap());
        if world.objects.contains_key(oid) {
            return json!({"oid": oid, "size": size});
        }
        let verify = json!({"href": format!("{url}/lfs/verify"), "header": {}});
        let Some(bytes) = world.part_bytes else {
            let href = format!("{cdn}/upload/{oid}?X-Amz-Signature=signed");
            return json!({"oid": oid, "size": size, "actions":
                {"upload": {"href": href, "header": {}}, "verify": verify}});
        };
        let mut header = json!({"chunk_size": bytes.to_string()});
        for number in 1..=(size as usize).div_ceil(bytes) {
            header[number.to_string()] =
                json!(format!("{cdn}/upload/{oid}?part={number}&X-Amz-Signature=signed"));
        }
        let href = format!("{url}/lfs/complete?uploadId=1");
        json!({"oid": oid, "size": size, "actions":
            {"upload": {"href": href, "header": header}, "verify": verify}})
    });
    let transfer = if world.part_bytes.is_some() { "multipart" } else { "basic" };
    Answer::json(&json!({"transfer": transfer, "objects": objects.collect::<Vec<_>>()}))
}

fn complete(world: &mut World, asked: &Asked) -> Answer {
    let body = asked.json();
    let oid = body["oid"].as_str().unwrap().to_owned();
    let mut whole = Vec::new();
    for part in body["parts"].as_array().unwrap() {
        let number = part["partNumber"].as_u64().unwrap() as usize;
        let Some(bytes) = world.parts.get(&(oid.clone(), number)) else {
            return Answer::new(400, "a part is missing");
        };
        if part["etag"].as_str() != Some(&format!("\"{}\"", &sha256(bytes)[..32])) {
            return Answer::new(400, "an etag is wrong");
        }
        whole.extend_from_slice(bytes);
    }
    if sha256(&whole) != oid {
        return Answer::new(400, "wrong content");
    }
    world.objects.insert(oid, whole);
    Answer::json(&json!({}))
}

fn commit(world: &mut World, asked: &Asked, repo: &str, url: &str) -> Result<Answer, Answer> {
    if !world.repos.contains_key(repo) {
        return Err(not_found("RepoNotFound"));
    }
    let mut files = world.repos[repo].last().map(|(_, files)| files.clone()).unwrap_or_default();
    let lines = asked.body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    for line in lines {
        let line: Value = serde_json::from_slice(line).unwrap();
        let value = &line["value"];
        let name = value["path"].as_str().unwrap_or_default().to_owned();
        match line["key"].as_str().unwrap() {
            "file" => {
                let bytes = STANDARD.decode(value["content"].as_str().unwrap()).unwrap();
                files.insert(name, bytes);
            }
            "lfsFile" => {
                let oid = value["oid"].as_str().unwrap();
                let Some(bytes) = world.objects.get(oid) else {
                    return Err(Answer::new(400, "{\"error\":\"no such object\"}"));
                };
                files.insert(name, bytes.clone());
            }
            "deletedFile" => {
                files.remove(&name);
            }
            _ => {}
        }
    }
    let id = push_commit(world, repo, files);
    let address = format!("{url}/{repo}/commit/{id}");
    Ok(Answer::json(&json!({"success": true, "commitOid": id, "commitUrl": address})))
}

/// `{repo}/resolve/{revision}/{file}`: small files at once, large ones from the storage.
fn resolve(world: &World, path: &str, cdn: &str) -> Result<Answer, Answer> {
    let (repo, rest) = path.split_once("/resolve/").ok_or_else(|| not_found("RepoNotFound"))?;
    let (revision, name) = rest.split_once('/').ok_or_else(|| not_found("EntryNotFound"))?;
    let (id, files) = find(world, repo, revision)?;
    let bytes = files.get(name).ok_or_else(|| not_found("EntryNotFound"))?;
    let digest = sha256(bytes);
    if !is_large(name) {
        let answer = Answer::new(200, bytes.clone()).with("X-Repo-Commit", id);
        return Ok(answer.with("ETag", format!("\"{}\"", &digest[..40])));
    }
    let location = format!("{cdn}/{repo}/{digest}?X-Amz-Signature=signed");
    Ok(Answer::new(302, "")
        .with("Location", location)
        .with("X-Repo-Commit", id)
        .with("X-Linked-Size", bytes.len())
        .with("X-Linked-Etag", format!("\"{digest}\""))
        .with("ETag", format!("\"{digest}\"")))
}

fn cdn(world: &mut World, asked: &Asked) -> Answer {
    let (path, query) = asked.path.split_once('?').unwrap_or((&asked.path, ""));
    if let Some(oid) = path.strip_prefix("/upload/") {
        // Signed addresses refuse requests that come with other credentials.
        if asked.head("authorization").is_some() {
            return Answer::new(400, "only one auth mechanism allowed");
        }
        let etag = format!("\"{}\"", &sha256(&asked.body)[..32]);
        let part = query.split('&').find_map(|pair| pair.strip_prefix("part="));
        match part {
            Some(number) => {
                let key = (oid.to_owned(), number.parse().unwrap());
                world.parts.insert(key, asked.body.clone());
            }
            None if sha256(&asked.body) == oid => {
                world.objects.insert(oid.to_owned(), asked.body.clone());
            }
            None => return Answer::new(400, "wrong content"),
        }
        return Answer::new(200, "").with("ETag", etag);
    }
    let digest = path.rsplit('/').next().unwrap();
    let mut files = world.repos.values().flatten().flat_map(|(_, files)| files.values());
    match files.find(|bytes| sha256(bytes) == digest) {
        Some(bytes) => Answer::new(200, bytes.clone())
            .with("ETag", format!("\"{}\"", &digest[..32]))
            .with("Accept-Ranges", "bytes"),
        None => Answer::new(404, "NoSuchKey"),
    }
}
