//! Are the stand-ins faithful? The sources' own Python clients say, where there are any: they push to and
//! fetch from them what `cartouche cartridge push` and `pull` do. Not run by default, for it needs them.

mod stand_in;

use std::process::Command;

use stand_in::{hub::Hub, store_support::torch_bytes, wandb};

#[test]
#[ignore = "needs CARTOUCHE_TEST_PYTHON, a Python with huggingface_hub and wandb"]
fn python_clients_and_cartouche_understand_the_same_servers() {
    let python = std::env::var("CARTOUCHE_TEST_PYTHON").expect("CARTOUCHE_TEST_PYTHON is not set");
    let (hub, server) = (Hub::start(), wandb::Server::start());
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    std::fs::create_dir(&run).unwrap();
    std::fs::write(run.join("cartridge.pt"), torch_bytes(1.0)).unwrap();
    // One that only the Python client uploads.
    std::fs::write(run.join("cache-step3.pt"), torch_bytes(2.0)).unwrap();
    let cartouche = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cartouche"));
        command.arg("cartridge").args(args);
        command.env("HF_ENDPOINT", &hub.api.url).env("HF_TOKEN", "hf_x").env("HOME", dir.path());
        command.env("WANDB_BASE_URL", &server.api.url).env("WANDB_API_KEY", wandb::KEY);
        command.env("CARTOUCHE_HUB_REDIRECT_HOST", &hub.cdn.url);
        command.env("CARTOUCHE_CARTRIDGE_DIR", dir.path().join("cartridges"));
        assert!(command.status().unwrap().success(), "{args:?}");
    };
    let run = run.to_str().unwrap();
    cartouche(&["push", run, "hf:acme/pushed"]);
    cartouche(&["push", run, "wandb:me/mine/pushed"]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stand_in/clients.py");
    let mut command = Command::new(python);
    command.args([script, &hub.api.url, &server.api.url, wandb::KEY]).arg(dir.path());
    assert!(command.status().unwrap().success());
    cartouche(&["pull", "hf:py/pushed"]);
    cartouche(&["pull", "hf:py/pushed/cache-step3.pt"]);
    cartouche(&["pull", "wandb:me/mine/pushed"]);
    cartouche(&["pull", "wandb:me/mine/pushed@cache-step3.pt"]);
}
