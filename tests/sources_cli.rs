//! `cartouche cartridge push|pull|list|inspect|verify|rm` as processes of their own: two on one cache, killed
//! ones, full and read-only disks, and what is published.

mod stand_in;

use std::{
    fs,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use stand_in::{
    Answer, Trouble,
    hub::Hub,
    store_support::{cartridge, torch_bytes},
    wandb,
};

const ID: &str = "acme/notes";
const TOKEN: &str = "hf_confidential";

/// A machine: a home with a cartridge directory and a disk cache.
struct Home {
    dir: tempfile::TempDir,
    envs: Vec<(String, String)>,
}

impl Home {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), envs: Vec::new() }
    }

    fn of_hub(hub: &Hub) -> Self {
        let mut home = Self::new();
        home.set("HF_ENDPOINT", &hub.api.url);
        home.set("CARTOUCHE_HUB_REDIRECT_HOST", &hub.cdn.url);
        home
    }

    fn set(&mut self, name: &str, value: &str) {
        self.envs.push((name.to_owned(), value.to_owned()));
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn prepare(&self, command: &mut Command) {
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap());
        command
            .env("HOME", self.dir.path())
            .env("CARTOUCHE_CARTRIDGE_DIR", self.path("cartridges"));
        command.envs(self.envs.iter().map(|(name, value)| (name, value)));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
    }

    fn start(&self, args: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cartouche"));
        self.prepare(&mut command);
        command.arg("cartridge").args(args).spawn().unwrap()
    }

    fn run(&self, args: &[&str]) -> Output {
        self.start(args).wait_with_output().unwrap()
    }

    fn works(&self, args: &[&str]) -> String {
        works(&self.run(args))
    }

    fn fails(&self, args: &[&str]) -> String {
        fails(&self.run(args))
    }
}

fn works(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn fails(output: &Output) -> String {
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_cartridge_is_pulled_looked_at_verified_and_removed() {
    let hub = Hub::start();
    hub.commit(ID, &[("cache-step8.pt", &torch_bytes(1.0)), ("config.yaml", b"a: 1\n")]);
    let home = Home::of_hub(&hub);
    let name = format!("hf:{ID}");
    assert!(home.fails(&["inspect", &name]).contains("cartridge pull hf:acme/notes"));
    home.works(&["pull", &name]);
    let folder = home.path("cartridges/acme-notes");
    assert_eq!(fs::read(folder.join("cartridge.pt")).unwrap(), torch_bytes(1.0));
    assert_eq!(fs::read_to_string(folder.join("config.yaml")).unwrap(), "a: 1\n");
    let list = parsed(&home.works(&["list", "--json"]));
    let generation = json!(cartridge(1.0).generation().to_hex());
    assert_eq!(list["cartridges"][0]["id"], ID);
    assert_eq!(
        (&list["cached"][0]["name"], &list["cached"][0]["generation"]),
        (&json!(name), &generation)
    );
    for named in [ID, &name, folder.join("cartridge.pt").to_str().unwrap()] {
        let facts = parsed(&home.works(&["verify", "--json", named]));
        assert_eq!((&facts["generation"], &facts["sound"]), (&generation, &json!(true)), "{named}");
        let error = home.fails(&["verify", "--model", "demo", named]);
        assert!(error.contains("does not fit the model"), "{error}");
    }
    assert_eq!(parsed(&home.works(&["inspect", "--json", &name]))["file"], "cache-step8.pt");

    // Another id whose folder is written alike does not take this one's place.
    hub.commit("acme-notes", &[("cartridge.pt", &torch_bytes(2.0))]);
    assert!(
        home.fails(&["pull", "hf:acme-notes"]).contains("belongs to the cartridge `acme/notes`")
    );
    assert_eq!(fs::read(folder.join("cartridge.pt")).unwrap(), torch_bytes(1.0));

    // A damaged file in the cache is found out, and comes anew.
    let blobs = home.path(".cache/cartouche/cartridges/blobs");
    for blob in fs::read_dir(&blobs).unwrap() {
        let blob = blob.unwrap().path();
        let mut bytes = fs::read(&blob).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&blob, bytes).unwrap();
    }
    assert!(home.fails(&["verify", &name]).contains("was damaged"));
    home.works(&["pull", "--only-cache", &name]);
    home.works(&["verify", &name]);
    home.works(&["rm", ID]);
    assert!(!folder.exists());
    home.works(&["rm", &name]);
    for gone in [ID, &name] {
        assert!(home.fails(&["rm", gone]).contains("is not on this machine"));
    }
}

/// Cases 7 and 42: two processes share a cache.
#[test]
fn two_processes_that_pull_the_same_download_it_once() {
    let hub = Hub::start();
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0))]);
    hub.cdn.trouble("/", Trouble::Drip(Duration::from_micros(100)), 1);
    let home = Home::of_hub(&hub);
    let pull = || home.start(&["pull", "--only-cache", "hf:acme/notes"]);
    for child in [pull(), pull(), pull()] {
        works(&child.wait_with_output().unwrap());
    }
    assert_eq!(hub.cdn.asked().len(), 1);
    home.works(&["verify", "hf:acme/notes"]);
}

/// Case 42: a partial download left by a crash.
#[test]
fn a_killed_process_leaves_no_lock_and_its_download_goes_on() {
    let hub = Hub::start();
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0))]);
    hub.cdn.trouble("/", Trouble::HangAfter(900), 1);
    let home = Home::of_hub(&hub);
    let mut killed = home.start(&["pull", "hf:acme/notes"]);
    let partial = home.path(".cache/cartouche/cartridges/partial");
    let has_come = || {
        let entries = fs::read_dir(&partial).into_iter().flatten().flatten();
        entries.map(|entry| entry.metadata().map_or(0, |m| m.len())).any(|len| len == 900)
    };
    while !has_come() {
        assert!(killed.try_wait().unwrap().is_none(), "it ended");
        std::thread::sleep(Duration::from_millis(5));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    home.works(&["pull", "hf:acme/notes"]);
    assert_eq!(hub.cdn.asked()[1].head("range"), Some("bytes=900-"));
    home.works(&["verify", ID]);
}

/// Case 42: disk full. A limit on the size of files gives the same kind of failure, without a disk to fill.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told_and_loses_nothing() {
    let hub = Hub::start();
    hub.commit("acme/small", &[("cartridge.pt", &torch_bytes(1.0))]);
    let home = Home::of_hub(&hub);
    home.works(&["pull", "--only-cache", "hf:acme/small"]);
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(2.0))]);
    let mut command = Command::new("sh");
    let script = format!(
        "trap '' XFSZ; ulimit -f 4; exec {} cartridge pull --only-cache hf:acme/notes",
        env!("CARGO_BIN_EXE_cartouche")
    );
    command.args(["-c", &script]);
    home.prepare(&mut command);
    let error = fails(&command.output().unwrap());
    assert!(error.contains("free some space") && error.contains("acme/notes"), "{error}");
    let partial = fs::read_dir(home.path(".cache/cartouche/cartridges/partial")).unwrap();
    assert_eq!(partial.count(), 0, "it does not stand in the way of others");
    home.works(&["verify", "hf:acme/small"]);
    home.works(&["pull", "hf:acme/notes"]);
}

/// Case 42: a cache that cannot be written can be read.
#[cfg(target_os = "linux")]
#[test]
fn a_read_only_cache_serves_what_it_has() {
    use std::os::unix::{fs::PermissionsExt, process::CommandExt};
    let hub = Hub::start();
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0))]);
    let home = Home::of_hub(&hub);
    home.works(&["pull", "--only-cache", "hf:acme/notes"]);
    let mut folders = vec![home.dir.path().to_owned()];
    let mut all = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { all.push((path, 0o444)) }
        }
        all.push((folder, 0o555));
    }
    let set =
        |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    all.iter().for_each(|(path, mode)| set(path, *mode));
    // To root nothing is read-only.
    let uid = |m: fs::Metadata| std::os::unix::fs::MetadataExt::uid(&m);
    let is_root = fs::metadata("/proc/self").is_ok_and(|m| uid(m) == 0);
    let as_nobody = |command: &mut Command| {
        if is_root {
            command.uid(65534).gid(65534);
        }
    };
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cartouche"));
        home.prepare(&mut command);
        as_nobody(&mut command);
        command.arg("cartridge").args(args).output().unwrap()
    };
    let reaches = |program: &str, argument: &Path| {
        let mut command = Command::new(program);
        as_nobody(command.arg(argument));
        command.output().is_ok_and(|output| output.status.success())
    };
    let program = env!("CARGO_BIN_EXE_cartouche");
    if !reaches(program, Path::new("--version")) || !reaches("ls", home.dir.path()) {
        all.iter().for_each(|(path, _)| set(path, 0o755));
        return eprintln!("NOT RUN: only root may look into the folders of this test");
    }
    works(&run(&["verify", "hf:acme/notes"]));
    works(&run(&["inspect", "hf:acme/notes"]));
    let error = fails(&run(&["pull", "--only-cache", "hf:acme/notes"]));
    assert!(error.contains("--cartridge-cache-dir"), "{error}");
    all.iter().for_each(|(path, _)| set(path, 0o755));
}

/// Case 41: token in logs, also at the most talkative level.
#[test]
fn logs_show_neither_keys_nor_signatures() {
    let hub = Hub::start();
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0))]);
    hub.world().token = Some(TOKEN.to_owned());
    let mut home = Home::of_hub(&hub);
    home.set("HF_TOKEN", TOKEN);
    home.set("CARTOUCHE_LOG", "trace");
    hub.api.trouble("/api/", Trouble::Answer(Answer::new(503, "")), 1);
    let output = home.run(&["pull", "hf:acme/notes"]);
    let log = String::from_utf8_lossy(&output.stderr).into_owned() + &works(&output);
    assert!(log.contains("trying again"), "it is the log: {log}");
    assert!(!log.contains(TOKEN) && !log.contains("signed"), "{log}");
    assert!(
        hub.api.asked().iter().all(|a| a.head("authorization") == Some("Bearer hf_confidential"))
    );
}

/// A run as `train` leaves it.
fn run_folder(home: &Home) -> std::path::PathBuf {
    let folder = home.path("run");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("cache-step7.pt"), torch_bytes(1.0)).unwrap();
    fs::write(folder.join("cache-step12.pt"), torch_bytes(2.0)).unwrap();
    let metrics = [
        json!({"train/optimizer_step": 1, "train/loss": 3.5}),
        json!({"train/optimizer_step": 12, "train/loss": 0.25, "train/perplexity": 1.28}),
        json!({"train/optimizer_step": 12, "eval_held_out/loss": 0.5}),
    ];
    let lines: Vec<String> = metrics.iter().map(Value::to_string).collect();
    fs::write(folder.join("metrics.jsonl"), lines.join("\n") + "\n{\"cut").unwrap();
    folder
}

#[test]
fn a_training_run_is_published_on_the_hub_and_comes_back() {
    for part_bytes in [None, Some(1000)] {
        let hub = Hub::start();
        hub.world().token = Some(TOKEN.to_owned());
        hub.world().part_bytes = part_bytes;
        let mut home = Home::of_hub(&hub);
        let run = run_folder(&home);
        let run = run.to_str().unwrap();
        assert!(home.fails(&["push", run, "hf:acme/new"]).contains("HF_TOKEN must be set"));
        home.set("HF_TOKEN", TOKEN);
        // Storages fail in passing.
        hub.cdn.trouble("/upload/", Trouble::Answer(Answer::new(500, "")), 1);
        let told = home.works(&["push", run, "hf:acme/new"]);
        assert!(told.contains("/acme/new/commit/"), "{told}");
        let files = hub.files("acme/new");
        assert_eq!(files["cartridge.pt"], torch_bytes(2.0), "of the most updates");
        let readme = String::from_utf8(files["README.md"].clone()).unwrap();
        for says in [
            "| updates | 12 |",
            "| loss, first update | 3.5000 |",
            "| loss, last update | 0.2500 |",
            "| `eval_held_out/loss` | 0.5000 |",
            "\"source\": \"huggingface\"",
            "cartouche serve --model",
        ] {
            assert!(readme.contains(says), "{says}: {readme}");
        }
        assert!(String::from_utf8_lossy(&files["config.yaml"]).contains("max_tokens: 16"));
        assert!(hub.cdn.asked().iter().all(|asked| asked.head("authorization").is_none()));
        // Again: the storage has the file, the repository is there, and a commit is added.
        hub.cdn.forget();
        home.works(&["push", run, "hf:acme/new"]);
        assert!(hub.cdn.asked().is_empty());
        home.works(&["pull", "hf:acme/new"]);
        home.works(&["verify", "acme/new"]);
    }
}

#[test]
fn what_is_no_cartridge_or_has_no_access_is_not_published() {
    let hub = Hub::start();
    hub.world().token = Some("hf_other".to_owned());
    let mut home = Home::of_hub(&hub);
    home.set("HF_TOKEN", TOKEN);
    fs::write(home.path("x.pt"), b"PK\x03\x04").unwrap();
    home.fails(&["push", home.path("x.pt").to_str().unwrap(), "hf:acme/new"]);
    assert!(hub.api.asked().is_empty());
    fs::write(home.path("x.pt"), torch_bytes(1.0)).unwrap();
    let error = home.fails(&["push", home.path("x.pt").to_str().unwrap(), "hf:acme/new"]);
    assert!(error.contains("HF_TOKEN gives no access") && !error.contains(TOKEN), "{error}");
    assert!(home.fails(&["push", home.path("x.pt").to_str().unwrap(), "acme/new"]).contains("hf:"));
    assert!(hub.world().repos.is_empty());
}

#[test]
fn a_run_of_wandb_is_published_and_comes_back() {
    let server = wandb::Server::start();
    let mut home = Home::new();
    home.set("WANDB_BASE_URL", &server.api.url);
    let run = run_folder(&home);
    let run = run.to_str().unwrap();
    assert!(home.fails(&["push", run, "wandb:me/mine/r1"]).contains("WANDB_API_KEY must be set"));
    home.set("WANDB_API_KEY", wandb::KEY);
    home.works(&["push", run, "wandb:me/mine/r1"]);
    {
        let world = server.world();
        let names: Vec<&str> = world.runs["me/mine/r1"].iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["cartridge.pt", "config.yaml", "README.md"]);
        let (config, summary) = &world.facts["me/mine/r1"];
        assert_eq!(config["kv_cache_initializer"]["value"]["max_tokens"], 16);
        assert_eq!(summary["train/loss"], 0.25);
    }
    home.set("WANDB_ENTITY", "me");
    home.set("CARTOUCHE_WANDB_PROJECT", "mine");
    home.works(&["pull", "wandb:r1"]);
    let facts = parsed(&home.works(&["verify", "--json", "r1"]));
    assert_eq!(facts["generation"], cartridge(2.0).generation().to_hex());
}

#[test]
fn an_address_is_pulled_from_the_host_it_names() {
    let server = stand_in::StandIn::start(|_| Answer::new(200, torch_bytes(1.0)));
    let home = Home::new();
    let to = home.path("here");
    home.works(&["pull", &format!("{}/x.pt", server.url), "--to", to.to_str().unwrap()]);
    assert_eq!(fs::read(to.join("cartridge.pt")).unwrap(), torch_bytes(1.0));
    let offline = home.fails(&["pull", "--offline", &format!("{}/y.pt", server.url)]);
    assert!(offline.contains("--offline"), "{offline}");
}
