//! Real clients against a real socket. They need Python with `openai` and `numpy`, so they run only when
//! asked for:
//!
//! ```text
//! CARTOUCHE_PYTHON=python3 cargo test --test api_clients -- --ignored
//! ```

mod api_support;

use std::process::Command;

use api_support::{MODEL, Server};
use cartouche::{api::ApiOptions, engine::EngineOptions};

async fn run(script: &str, path: &str, extra: &[&str]) {
    let extra: Vec<String> = extra.iter().map(|&a| a.to_owned()).collect();
    let server = Server::new(ApiOptions::default(), EngineOptions::default());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}{path}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, server.router).await.unwrap() });
    let python = std::env::var("CARTOUCHE_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let script = format!("{}/scripts/clients/{script}", env!("CARGO_MANIFEST_DIR"));
    let status = tokio::task::spawn_blocking(move || {
        Command::new(python).arg(script).arg(url).args(extra).status()
    });
    assert!(status.await.unwrap().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python with the openai package"]
async fn openai_package() {
    run("openai_client.py", "/v1", &["--cartridge", "local:alpha"]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python with numpy"]
async fn cartridges_teacher() {
    let cartridges = ["local:alpha", "wandb:alpha", "huggingface:alpha"];
    let [a, b, c] = cartridges;
    let arguments = ["--cartridge", a, "--cartridge", b, "--cartridge", c, "--model", MODEL];
    run("teacher_client.py", "", &arguments).await;
}
