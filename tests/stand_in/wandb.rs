//! Weights & Biases: runs and their files through GraphQL, files in a storage at another host.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    sync::{Arc, Mutex, MutexGuard},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use md5::{Digest, Md5};
use serde_json::{Value, json};

use super::{Answer, Asked, StandIn};

pub const KEY: &str = "0123456789012345678901234567890123456789";

/// A file of a run.
#[derive(Debug, Clone)]
pub struct RunFile {
    pub name: String,
    pub bytes: Vec<u8>,
    /// Counts up with each write.
    pub written: u32,
}

/// What the server holds.
#[derive(Default)]
pub struct World {
    /// By entity/project/run.
    pub runs: BTreeMap<String, Vec<RunFile>>,
    /// Configuration and summary of runs that were pushed.
    pub facts: BTreeMap<String, (Value, Value)>,
    pub written: u32,
    /// Files per page.
    pub page: usize,
    /// Servers of one's own may have no storage elsewhere.
    pub no_direct_url: bool,
    pub wrong_md5: bool,
}

pub struct Server {
    pub api: StandIn,
    pub storage: StandIn,
    world: Arc<Mutex<World>>,
}

impl Server {
    pub fn start() -> Self {
        let world = Arc::new(Mutex::new(World { page: 2, ..World::default() }));
        let kept = Arc::clone(&world);
        let storage = StandIn::start(move |asked| store(&mut kept.lock().unwrap(), asked));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let urls = (format!("http://{}", listener.local_addr().unwrap()), storage.url.clone());
        let kept = Arc::clone(&world);
        let api = StandIn::listen(listener, move |asked| {
            let basic = format!("Basic {}", STANDARD.encode(format!("api:{KEY}")));
            if asked.head("authorization") != Some(&basic) {
                return Answer::new(401, "{\"errors\":[{\"message\":\"user is not logged in\"}]}");
            }
            let mut world = kept.lock().unwrap();
            match asked.path.strip_prefix("/files/") {
                Some(path) => find(&world, path),
                None => graphql(&mut world, asked, &urls.0, &urls.1),
            }
        });
        Self { api, storage, world }
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    pub fn write(&self, run: &str, name: &str, bytes: &[u8]) {
        write(&mut self.world(), run, name, bytes);
    }
}

fn write(world: &mut World, run: &str, name: &str, bytes: &[u8]) {
    world.written += 1;
    let (name, bytes, written) = (name.to_owned(), bytes.to_vec(), world.written);
    let files = world.runs.entry(run.to_owned()).or_default();
    files.retain(|file| file.name != name);
    files.push(RunFile { name, bytes, written });
}

fn find(world: &World, path: &str) -> Answer {
    let parts: Vec<&str> = path.splitn(4, '/').collect();
    let [entity, project, run, name] = parts[..] else { return Answer::new(404, "") };
    let files = world.runs.get(&format!("{entity}/{project}/{run}"));
    match files.and_then(|files| files.iter().find(|file| file.name == name)) {
        Some(file) => Answer::new(200, file.bytes.clone())
            .with("ETag", format!("\"{}\"", hex(&Md5::digest(&file.bytes)))),
        None => Answer::new(404, "no such file"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The storage takes signed addresses, and no other credentials.
fn store(world: &mut World, asked: &Asked) -> Answer {
    if asked.head("authorization").is_some() {
        return Answer::new(400, "only one auth mechanism allowed");
    }
    let (path, query) = asked.path.split_once('?').unwrap_or_default();
    let path = path.trim_start_matches("/bucket/");
    if query != "X-Goog-Signature=signed" {
        return Answer::new(403, "SignatureDoesNotMatch");
    }
    if asked.method == "PUT" {
        if asked.head("x-goog-meta-run") != Some("yes") {
            return Answer::new(403, "a header of the signature is missing");
        }
        let (run, name) = path.rsplit_once('/').unwrap();
        write(world, run, name, &asked.body);
        return Answer::new(200, "");
    }
    find(world, path)
}

fn graphql(world: &mut World, asked: &Asked, url: &str, storage: &str) -> Answer {
    let body = asked.json();
    let (query, variables) = (body["query"].as_str().unwrap_or_default(), &body["variables"]);
    let text = |name: &str| variables[name].as_str().unwrap_or_default();
    let run_of = |name: &str| format!("{}/{}/{}", text("entity"), text("project"), text(name));
    if query.contains("upsertBucket") {
        let run = run_of("name");
        let is_new = !world.runs.contains_key(&run);
        world.runs.entry(run.clone()).or_default();
        let parsed = |name| serde_json::from_str(text(name)).unwrap_or_default();
        world.facts.insert(run, (parsed("config"), parsed("summary")));
        let project = json!({"name": text("project"), "entity": {"name": text("entity")}});
        let bucket = json!({"id": "1", "name": text("name"), "project": project});
        return data(json!({"upsertBucket": {"bucket": bucket, "inserted": is_new}}));
    }
    if query.contains("createRunFiles") {
        let run = run_of("run");
        if !world.runs.contains_key(&run) {
            return data(
                json!({"createRunFiles": {"runID": null, "uploadHeaders": [], "files": []}}),
            );
        }
        let files = variables["files"].as_array().unwrap().iter().map(|name| {
            let name = name.as_str().unwrap();
            let address = format!("{storage}/bucket/{run}/{name}?X-Goog-Signature=signed");
            json!({"name": name, "uploadUrl": address})
        });
        let files: Vec<Value> = files.collect();
        let heads = ["X-Goog-Meta-Run:yes"];
        return data(
            json!({"createRunFiles": {"runID": "1", "uploadHeaders": heads, "files": files}}),
        );
    }
    if query.contains("files(") {
        let name = if text("run").is_empty() { "name" } else { "run" };
        let run = run_of(name);
        let Some(files) = world.runs.get(&run) else {
            return data(json!({"project": null}));
        };
        // Each client has a name of its own for it.
        let after = if text("after").is_empty() { "fileCursor" } else { "after" };
        let from: usize = text(after).parse().unwrap_or(0);
        let page = files.iter().enumerate().skip(from).take(world.page);
        let edges = page.map(|(i, file)| {
            let md5 = if world.wrong_md5 { Md5::digest("other") } else { Md5::digest(&file.bytes) };
            let home = format!("{url}/files/{run}/{}", file.name);
            let direct = format!("{storage}/bucket/{run}/{}?X-Goog-Signature=signed", file.name);
            let direct = if world.no_direct_url { home.clone() } else { direct };
            let node = json!({
                "id": i.to_string(), "name": file.name, "sizeBytes": file.bytes.len().to_string(),
                "md5": STANDARD.encode(md5), "mimetype": "", "url": home, "directUrl": direct,
                "updatedAt": format!("2025-06-01T00:00:{:02}", file.written),
            });
            json!({"node": node, "cursor": (i + 1).to_string()})
        });
        let edges: Vec<Value> = edges.collect();
        let end = from + edges.len();
        let info = json!({"endCursor": end.to_string(), "hasNextPage": end < files.len()});
        let files = json!({"edges": edges, "pageInfo": info});
        return data(json!({"project": {"internalId": "1", "run":
            {"fileCount": end, "files": files}}}));
    }
    if query.contains("viewer") {
        let viewer = json!({"id": "1", "username": "me", "entity": "me", "flags": "{}",
            "email": "me@example.org", "admin": false, "apiKeys": null, "teams": {"edges": []}});
        return data(json!({"viewer": viewer}));
    }
    Answer::json(&json!({"errors": [{"message": "Cannot query this field"}]}))
}

fn data(data: Value) -> Answer {
    Answer::json(&json!({"data": data}))
}
