//! What a request with a bad cartridge gets: a 4xx that says what is wrong, and a server that goes on.

mod api_support;

use std::path::Path;

use api_support::Server;
use candle_core::Tensor;
use cartouche::{
    api::ApiOptions,
    cartridge::{
        Cartridge, LayerKv, Naming, TorchStyle, read_cartridge_bytes, write_safetensors,
        write_torch,
    },
    demo,
    engine::EngineOptions,
};
use serde_json::{Value, json};

/// A cartridge that fits the demo model.
fn good() -> Cartridge {
    let document = &demo::DOCUMENTS[0];
    read_cartridge_bytes(document.cartridge, document.name).unwrap()
}

/// The good cartridge with every layer passed through `change`.
fn changed(change: impl Fn(&Tensor) -> Tensor) -> Cartridge {
    let good = good();
    let layers = good.layers().iter().map(|layer| LayerKv {
        keys: change(&layer.keys),
        values: change(&layer.values),
        bias: None,
    });
    Cartridge::new(layers.collect(), 1, good.provenance().clone()).unwrap()
}

fn request(id: &str) -> Value {
    json!({
        "messages": [{"role": "user", "content": "What is the flag of Osford?"}],
        "temperature": 0,
        "cartridges": [{"id": id, "source": "local"}],
    })
}

async fn refused(server: &Server, id: &str) -> (u16, String, String) {
    let reply = server.post("/v1/chat/completions", request(id)).await;
    let (status, param, message) = reply.error();
    assert!((400..500).contains(&status), "{id}: {status} {message}");
    assert!(param.starts_with("cartridges"), "{id}: {message}");
    (status, reply.code(), message)
}

async fn still_answers(server: &Server, id: &str) {
    let reply = server.post("/v1/chat/completions", request(id)).await.ok();
    let answer = &reply["choices"][0]["message"]["content"];
    assert_eq!(answer, "The flag of Osford is violet.");
}

fn folder(dir: &Path, id: &str) -> std::path::PathBuf {
    let folder = dir.join(id);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_cartridge_is_named_and_the_server_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let torch = |id: &str, cartridge: &Cartridge| {
        let path = folder(dir.path(), id).join("cartridge.pt");
        write_torch(&path, cartridge, TorchStyle::PlainLists, Naming::Both).unwrap();
        path
    };
    torch("good", &good());
    torch("heads", &changed(|t| t.narrow(0, 0, 1).unwrap()));
    torch("head-dim", &changed(|t| t.narrow(2, 0, 32).unwrap()));
    let layers = good().layers()[1..].to_vec();
    torch("layers", &Cartridge::new(layers, 1, Default::default()).unwrap());
    // Infinity minus infinity in one element only.
    let nan = changed(|t| ((t * f64::INFINITY).unwrap() * 0.0).unwrap());
    torch("nan-pt", &nan);
    write_safetensors(&folder(dir.path(), "nan").join("cartridge.safetensors"), &nan).unwrap();
    let cut = torch("cut", &good());
    let bytes = std::fs::read(&cut).unwrap();
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();

    let server = Server::with_cartridge_dir(
        ApiOptions::default(),
        EngineOptions::default(),
        Some(dir.path().to_owned()),
    );
    for (id, code, says) in [
        ("heads", "cartridge_mismatch", "needs 2"),
        ("head-dim", "cartridge_mismatch", "needs 64"),
        ("layers", "cartridge_mismatch", "needs 3"),
        ("nan", "cartridge_invalid", "layer 0"),
        ("nan-pt", "cartridge_invalid", "layer 0"),
        ("cut", "cartridge_invalid", "`cut`"),
        ("absent", "cartridge_not_found", "`absent`"),
        ("../good", "cartridge_not_found", "../good"),
    ] {
        let (_, got, message) = refused(&server, id).await;
        assert_eq!(got, code, "{id}: {message}");
        assert!(message.contains(says), "{id}: {message}");
        still_answers(&server, "good").await;
    }
    let nameless = server.post("/v1/chat/completions", request("")).await.error();
    assert_eq!((nameless.0, nameless.1.as_str()), (400, "cartridges[0].id"));
}

/// The whole corpus of damaged and malicious `.pt` files, through the front door.
#[tokio::test(flavor = "multi_thread")]
async fn no_hostile_file_gets_past_a_request() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cartridges/hostile");
    let dir = tempfile::tempdir().unwrap();
    let mut ids = Vec::new();
    for entry in std::fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        let id = path.file_stem().unwrap().to_string_lossy().into_owned();
        if path.extension().is_some_and(|e| e == "pt") {
            std::fs::copy(&path, folder(dir.path(), &id).join("cartridge.pt")).unwrap();
            ids.push(id);
        }
    }
    assert!(ids.len() >= 50);
    let path = folder(dir.path(), "good").join("cartridge.safetensors");
    write_safetensors(&path, &good()).unwrap();
    let server = Server::with_cartridge_dir(
        ApiOptions::default(),
        EngineOptions::default(),
        Some(dir.path().to_owned()),
    );
    for id in &ids {
        refused(&server, id).await;
    }
    let (_, _, message) = refused(&server, "system").await;
    assert!(message.contains("nothing was executed"), "{message}");
    still_answers(&server, "good").await;
}
