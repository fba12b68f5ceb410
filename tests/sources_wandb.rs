//! Cartridges from a stand-in of Weights & Biases.

mod stand_in;

use cartouche::cartridge::{Cached, CartridgeError, Wandb, transfer::Transfer};
use stand_in::{
    Answer, Trouble,
    store_support::{MAX_BYTES, cartridge, read, store, times, torch_bytes},
    wandb::{KEY, Server},
};

const STOCK: (&str, &str) = ("hazy-research", "cartridges");

fn source(server: &Server, dir: &std::path::Path, key: Option<&str>) -> Cached<Wandb> {
    let remote = Wandb::new(&server.api.url, key, STOCK, false).unwrap();
    Cached::new(remote, Transfer::new(times()), store(dir), MAX_BYTES)
}

/// The project is not hard-coded; an id alone means the stock path.
#[test]
fn a_run_is_named_in_full_or_by_what_is_configured() {
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    server.write("hazy-research/cartridges/wauoq23f", "cache-step64.pt", &torch_bytes(1.0));
    server.write("hazy-research/other/wauoq23f", "cache-step64.pt", &torch_bytes(2.0));
    server.write("me/mine/wauoq23f", "cache-step64.pt", &torch_bytes(3.0));
    let stock = source(&server, dir.path(), Some(KEY));
    for (id, seed) in [("wauoq23f", 1.0), ("other/wauoq23f", 2.0), ("me/mine/wauoq23f", 3.0)] {
        stock.fetch(id).unwrap();
        assert_eq!(read(&stock, id).unwrap().generation(), cartridge(seed).generation(), "{id}");
    }
    let remote = Wandb::new(&server.api.url, Some(KEY), ("me", "mine"), false).unwrap();
    let other = tempfile::tempdir().unwrap();
    let mine = Cached::new(remote, Transfer::new(times()), store(other.path()), MAX_BYTES);
    mine.fetch("wauoq23f").unwrap();
    assert_eq!(read(&mine, "wauoq23f").unwrap().generation(), cartridge(3.0).generation());
    for wrong in ["", "a/b/c/d", "a//b", "../run", "run?x", "run@"] {
        let error = stock.fetch(wrong).unwrap_err();
        assert!(matches!(error, CartridgeError::InvalidId { .. }), "{wrong}: {error}");
    }
}

#[test]
fn the_file_is_chosen_over_all_pages() {
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    let (one, two) = (torch_bytes(1.0), torch_bytes(2.0));
    let write = |run: &str, files: &[(&str, &[u8])]| {
        let run = format!("hazy-research/cartridges/{run}");
        files.iter().for_each(|(name, bytes)| server.write(&run, name, bytes));
    };
    let config = b"model: {desc: null, value: {pretrained_model_name_or_path: acme/m}}\n";
    write("steps", &[("cache-step9.pt", &one), ("output.log", b""), ("cache-step10.pt", &two)]);
    write("named", &[("cache-step9.pt", &one), ("a.pt", &one), ("cartridge.pt", &two)]);
    write("newest", &[("b.pt", &one), ("a.pt", &two), ("config.yaml", config), ("z.txt", b"")]);
    let source = source(&server, dir.path(), Some(KEY));
    for id in ["steps", "named", "newest"] {
        source.fetch(id).unwrap();
        assert_eq!(read(&source, id).unwrap().generation(), cartridge(2.0).generation(), "{id}");
    }
    let made_for = read(&source, "newest").unwrap().provenance().model.clone();
    assert_eq!(made_for.as_deref(), Some("acme/m"), "config.yaml as W&B wraps it");
    source.fetch("named@a.pt").unwrap();
    assert_eq!(read(&source, "named@a.pt").unwrap().generation(), cartridge(1.0).generation());
    write("empty", &[("output.log", b"")]);
    for (id, says) in [("empty", "no cartridge file"), ("absent", "no such run")] {
        let error = source.fetch(id).unwrap_err();
        let stem =
            format!("Could not find wandb run for cartridge_id: hazy-research/cartridges/{id}");
        assert!(
            matches!(&error, CartridgeError::NotFound { hint, .. }
            if hint.starts_with(&stem) && hint.contains(says)),
            "{error}"
        );
    }
}

#[test]
fn the_key_goes_to_the_server_and_not_to_its_storage() {
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    server.write("hazy-research/cartridges/run", "cartridge.pt", &torch_bytes(1.0));
    let files = source(&server, dir.path(), Some(KEY));
    files.fetch("run").unwrap();
    // The storage answers 400 to other credentials, and keeps what it saw.
    assert_eq!(server.storage.asked().len(), 1);
    assert!(server.storage.asked()[0].head("authorization").is_none());
    // A server without a storage of its own delivers itself, to those with a key.
    server.world().no_direct_url = true;
    server.write("hazy-research/cartridges/run", "cartridge.pt", &torch_bytes(2.0));
    files.fetch("run").unwrap();
    assert_eq!(read(&files, "run").unwrap().generation(), cartridge(2.0).generation());
    assert_eq!(server.storage.asked().len(), 1);

    server.api.trouble("/graphql", Trouble::Answer(Answer::new(403, "")), 1);
    let mut shown = format!("{files:?}") + &files.fetch("run").unwrap_err().to_string();
    assert!(shown.contains("WANDB_API_KEY gives no access"), "{shown}");
    shown += &std::fs::read_to_string(record_file(dir.path())).unwrap();
    let basic = "YXBpO"; // of api:
    assert!(!shown.contains(KEY) && !shown.contains(basic) && !shown.contains("signed"), "{shown}");
}

fn record_file(dir: &std::path::Path) -> std::path::PathBuf {
    let mut records =
        std::fs::read_dir(dir.join("names/wandb")).unwrap().map(|e| e.unwrap().path());
    records.find(|path| path.extension().is_some_and(|e| e == "json")).unwrap()
}

#[test]
fn without_a_key_nothing_is_asked_and_the_variable_is_named() {
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    let error =
        source(&server, dir.path(), None).fetch("owner/repository").unwrap_err().to_string();
    // The default source is W&B, though ids of the hub are common.
    assert!(
        error.contains("WANDB_API_KEY must be set") && error.contains("huggingface"),
        "{error}"
    );
    let error = source(&server, dir.path(), Some("wrong")).fetch("run").unwrap_err().to_string();
    assert!(error.contains("answered 401") && error.contains("WANDB_API_KEY"), "{error}");
    assert_eq!(server.api.asked().len(), 1);
}

#[test]
fn content_is_checked_against_its_md5_and_continued_after_a_cut() {
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    server.write("hazy-research/cartridges/run", "cartridge.pt", &torch_bytes(1.0));
    let source = source(&server, dir.path(), Some(KEY));
    server.world().wrong_md5 = true;
    assert!(source.fetch("run").unwrap_err().to_string().contains("MD5"));
    server.world().wrong_md5 = false;
    server.storage.trouble("/", Trouble::CutAfter(500), 1);
    server.storage.forget();
    source.fetch("run").unwrap();
    assert_eq!(server.storage.asked()[1].head("range"), Some("bytes=500-"));
    server.storage.forget();
    source.fetch("run").unwrap();
    assert!(server.storage.asked().is_empty(), "the same content is not sent again");
    server.api.trouble(
        "/graphql",
        Trouble::Answer(Answer::new(200, "{\"errors\":[{\"message\":\"no\"}]}")),
        1,
    );
    assert!(source.fetch("run").unwrap_err().to_string().contains("no"));
    assert_eq!(read(&source, "run").unwrap().generation(), cartridge(1.0).generation());
}
