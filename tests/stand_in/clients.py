"""The sources' own Python clients against the stand-ins: what they can use speaks the real routes.

Run by `cargo test --test sources_clients -- --ignored` with CARTOUCHE_TEST_PYTHON naming a Python that has
huggingface_hub and wandb. Arguments: url of the hub, url of W&B, key of W&B, folder with a cartridge.pt.
"""

import hashlib
import os
import sys

hub_url, wandb_url, wandb_key, folder = sys.argv[1:]
os.environ.update(
    HF_ENDPOINT=hub_url, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HOME=f"{folder}/home"
)

import huggingface_hub  # noqa: E402


def digest(path):
    return hashlib.sha256(open(path, "rb").read()).hexdigest()


source = f"{folder}/run/cartridge.pt"
api = huggingface_hub.HfApi(endpoint=hub_url, token="hf_x")
api.create_repo("py/pushed", exist_ok=True)
api.upload_folder(repo_id="py/pushed", folder_path=f"{folder}/run", commit_message="from Python")
listed = api.model_info("py/pushed", files_metadata=True)
entry = next(s for s in listed.siblings if s.rfilename == "cartridge.pt")
assert entry.lfs.sha256 == digest(source) and entry.size == os.path.getsize(source), entry
path = huggingface_hub.hf_hub_download("py/pushed", "cartridge.pt", token="hf_x", endpoint=hub_url)
assert digest(path) == digest(source)
# What cartouche pushed before.
path = huggingface_hub.hf_hub_download("acme/pushed", "cartridge.pt", token="hf_x", endpoint=hub_url)
assert digest(path) == digest(source)
card = huggingface_hub.ModelCard.load(
    huggingface_hub.hf_hub_download("acme/pushed", "README.md", token="hf_x", endpoint=hub_url)
)
assert card.data.library_name == "cartouche" and "cartridge" in card.data.tags, card.data
print("huggingface_hub", huggingface_hub.__version__, "ok")

import wandb  # noqa: E402
from wandb.apis.public import files as public_files, runs as public_runs  # noqa: E402

client = wandb.Api(api_key=wandb_key, overrides={"base_url": wandb_url})


class Run:
    entity, project, id = "me", "mine", "pushed"
    path = [entity, project, id]
    _service_api = client._service_api


# The run object asks for much that no cartridge needs; its files are what counts here.
files = list(public_files.Files(client._service_api, Run()))
names = sorted(file.name for file in files)
assert names == ["README.md", "cartridge.pt", "config.yaml"], names
found = next(file for file in files if file.name == "cartridge.pt")
found.download(root=f"{folder}/wandb", replace=True)
assert digest(f"{folder}/wandb/cartridge.pt") == digest(source)
public_runs.Run.upload_file(Run(), f"{folder}/run/cache-step3.pt", root=f"{folder}/run")
print("wandb", wandb.__version__, "ok")
