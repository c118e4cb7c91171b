"""Trained networks, their exports, and a Python that has neither torch nor dist_train."""

import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from dist_train import cli
from dist_train.config_file import make_config
from dist_train.models import build_model
from dist_train.training import checkpoint
from dist_train.training.checkpoint import Checkpoint, CheckpointMeta, Progress
from shards.index import Index
from tests.common import LIMIT, ROOT, SMALL_MODEL, cpu_loader, write_digits

VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
NETWORKS = {
    "msdnet": SMALL_MODEL | {"exits": 3, "scales": 3, "growth_factors": [1, 2, 4], "bottleneck_factors": [1, 2, 4]},
    "resnet": {"name": "resnet", "blocks": [1, 1, 1], "width": 8, "exits": ["stages.0", "stages.1"]},
    "vit": {"name": "transformers/ViTConfig", "options": VIT, "exits": ["vit.layers.0", "vit.layers.1"]},
}
MODULES = ("numpy", "numpy.libs", "PIL", "pillow.libs")
"""What an exported runner needs beside its runtime, by its folder in site-packages."""


def train(name, digits, folder, steps=120):
    """The folder of a run on digits, its network trained for some steps by plain torch."""
    config = make_config(
        {
            "name": name,
            "runs": str(folder),
            "data": {"shards": str(digits), "flip": False},
            "model": NETWORKS[name],
            "train": {"precision": "fp32"},
        }
    )
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the same network whatever tests ran before in this process
    index = Index.load(digits / "train")
    model = build_model(config.model, len(index.classes), 32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loader = cpu_loader(index, digits / "train", config.data, train=True, seed=0, global_batch=32)
    done = 0
    while done < steps:
        for batch in loader.epoch(done // loader.order.steps_per_epoch):
            for micro in batch:
                loss = sum(torch.nn.functional.cross_entropy(logits, micro.labels) for logits in model(micro.images))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            done += 1
    loader.close()
    snapshot = Checkpoint(
        CheckpointMeta(Progress(step=done), 1, list(index.classes), "", {}), config, model.state_dict(), {}
    )
    checkpoint.set_link(
        folder / name / "checkpoints", "latest", checkpoint.write(folder / name / "checkpoints", snapshot)
    )
    return folder / name


@pytest.fixture(scope="session")
def runs(digits, tmp_path_factory):
    """Run folders by the name of their network; msdnet's has a report with budgets and a guarantee."""
    folder = tmp_path_factory.mktemp("runs")
    trained = {name: train(name, digits, folder) for name in NETWORKS}
    words = [sys.executable, "-m", "dist_train", "eval", trained["msdnet"], "--risk", "gap", "--epsilon", "0.1"]
    subprocess.run(words, check=True, cwd=ROOT, capture_output=True)
    return trained


def middle_confidences(run, digits):
    """Thresholds at which some images leave at every exit, whatever training came to on this CPU; as an option is written."""
    _, config = checkpoint.read_meta(checkpoint.find(run))
    loader = cpu_loader(Index.load(digits / "val"), digits / "val", config.data, train=False, seed=0, global_batch=360)
    with torch.inference_mode():
        logits = checkpoint.load_model(checkpoint.find(run))(next(iter(loader.evaluation())).images)
    loader.close()
    return ",".join(f"{one.softmax(1).amax(1).median():.3f}" for one in logits[:-1])


@pytest.fixture(scope="session")
def exported(runs, digits, tmp_path_factory):
    """Export folders by the name of their network."""
    folder = tmp_path_factory.mktemp("exports")
    for name, run in runs.items():
        chosen = ["--budget", "0.45M"] if name == "msdnet" else ["--thresholds", middle_confidences(run, digits)]
        assert cli.run(["export", str(run), *chosen, "--out", str(folder / name)]) == 0
    return {name: folder / name for name in runs}


@pytest.fixture(scope="session")
def photos(digits, tmp_path_factory):
    """30 digits as files."""
    folder = tmp_path_factory.mktemp("photos")
    write_digits(digits / "val", 30, folder)
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    """`elsewhere(arguments)` runs a Python whose packages are numpy, Pillow and a runtime alone (onnxruntime); the finished process."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv", with_pip=False)
    for runtime in ("onnxruntime", "openvino"):
        (folder / runtime).mkdir()
        for name in (*MODULES, runtime):
            installed = Path(importlib.util.find_spec("numpy").origin).parent.parent / name
            if installed.exists():
                (folder / runtime / name).symlink_to(installed)

    def run(*arguments, runtime="onnxruntime", path=None):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
            "PYTHONPATH": str(path or folder / runtime)
        }
        words = [folder / "venv/bin/python", *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, timeout=LIMIT, cwd=folder, env=environment)

    missing = run("-c", "import torch"), run("-c", "import dist_train")
    assert ["ModuleNotFoundError" in one.stderr for one in missing] == [True, True]
    assert sys.version_info[:2] == tuple(map(int, run("-c", "import sys; print(*sys.version_info[:2])").stdout.split()))
    return run
