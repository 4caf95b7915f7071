"""A Hub on loopback with what the documents name: a variant, and timm's resnet18, its weights drawn at random."""

import json
import os
from pathlib import Path

import timm
import torch
from hub_server import Hub
from safetensors.torch import save_file

import timm_nrpm

TOKEN = "hf_example0123456789"


class StockedHub(Hub):
    """The Hub of hub_server.py, filled, and the environment of a process that uses it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "server")
        self.user("me", TOKEN)
        model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.8)
        variant = timm_nrpm.save_pretrained(model, folder / "variant")
        files = {path.name: path.read_bytes() for path in variant.iterdir()}
        self.create("me/resnet18-nrpm").commit({**files, "README.md": b"---\ntags: [timm_nrpm]\n---\n"})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_file(timm.create_model("resnet18").state_dict(), folder / "model.safetensors")
        config = json.dumps({"architecture": "resnet18", "num_classes": 1000}).encode()
        weights = (folder / "model.safetensors").read_bytes()
        self.create("timm/resnet18.a1_in1k").commit({"config.json": config, "model.safetensors": weights})

    def environment(self, home: Path) -> dict[str, str]:
        """For a process whose cache is under `home`."""
        ours = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        return {**os.environ, **ours, "HF_HOME": str(home / "home"), "NO_PROXY": "127.0.0.1", "COLUMNS": "120"}
