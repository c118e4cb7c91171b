"""A small trained run, tracked by MLflow, for all tests of the report."""

import subprocess
import sys

import pytest

from dist_train.config_file import dump_config, make_config
from tests.common import LIMIT, ROOT, SMALL_MODEL

MODEL = SMALL_MODEL | {"exits": 3}


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
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "small"
