"""A small trained run, tracked by MLflow, for all tests of the report."""

import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.config_file import dump_config, make_config

ROOT = Path(__file__).parents[3]
MODEL = {"exits": 3, "base": 1, "step": 1, "scales": 2, "growth": 2, "initial_channels": 4, "head_width": 8,
         "growth_factors": [1, 2], "bottleneck_factors": [1, 2]}  # fmt: skip


@pytest.fixture(scope="session")
def run_folder(digits, tmp_path_factory):
    """A run of two epochs on digits."""
    folder = tmp_path_factory.mktemp("runs")
    fields = {
        "name": "small",
        "runs": str(folder),
        "data": {"shards": str(digits), "flip": False},
        "model": MODEL,
        "optim": {"lr": 0.2},
        "train": {"global_batch": 32, "micro_batch": 32, "precision": "fp32", "epochs": 2, "eval_every": 2},
        "checkpoint": {"every_epochs": 2},
    }
    (folder / "small.yaml").write_text(dump_config(make_config(fields)))
    words = [sys.executable, "-m", "dist_train", "train", str(folder / "small.yaml")]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "small"
