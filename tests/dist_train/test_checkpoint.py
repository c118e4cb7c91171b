"""Checkpoints are whole or absent, and damage is found before it is loaded."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dist_train import checkpoint
from dist_train.checkpoint import Position, Snapshot, State
from dist_train.config_file import make_config
from dist_train.errors import CheckpointError


def snapshot(step, size=10):
    generator = torch.Generator().manual_seed(step)
    state = State(Position(step=step, batch=step), 2, ["a", "b"], "print", {"temperature": [1.05]})
    weights = {"weight": torch.randn(size, size, generator=generator), "count": torch.tensor(step)}
    return Snapshot(
        state,
        make_config({"data": {"shards": "x"}}),
        weights,
        {"momentum_buffer/weight": weights["weight"] * 2},
        None,
        {"0/meter": torch.ones(2)},
    )


def test_what_is_written_is_read(tmp_path):
    before = snapshot(7)
    path = checkpoint.write(tmp_path, before)
    after = checkpoint.read(path)
    assert (after.state, after.config) == (before.state, before.config)
    for written, read in (
        (before.model, after.model),
        (before.optimizer, after.optimizer),
        (before.ranks, after.ranks),
    ):
        assert written.keys() == read.keys()
        assert all(torch.equal(written[name], read[name]) for name in written)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, name, damage):
    good = checkpoint.write(tmp_path, snapshot(1))
    file = checkpoint.write(tmp_path, snapshot(2)) / name
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-3])
    elif damage == "flip":
        file.write_bytes(content[:20] + bytes([content[20] ^ 255]) + content[21:])
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify(file.parent)
    assert checkpoint.newest(tmp_path) == good


def test_a_newer_format_is_refused(tmp_path):
    path = checkpoint.write(tmp_path, snapshot(1))
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.verify(path)


WRITER = """
import sys
sys.path.insert(0, {root!r})
sys.path.insert(0, {tests!r})
from pathlib import Path
from dist_train import checkpoint
from test_checkpoint import snapshot
print("ready", flush=True)
step = 1
while True:
    step += 1
    path = checkpoint.write(Path({folder!r}), snapshot(step, 1500))
    checkpoint.point(Path({folder!r}), "latest", path)
    checkpoint.prune(Path({folder!r}), 2)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_newest_checkpoint(tmp_path):
    first = checkpoint.write(tmp_path, snapshot(1, 1500))
    checkpoint.point(tmp_path, "latest", first)
    here = Path(__file__).parent
    drafts = 0
    for delay in (0.05, 0.11, 0.17, 0.23, 0.31, 0.43):
        code = WRITER.format(root=str(here.parents[1]), tests=str(here), folder=str(tmp_path))
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        writer.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        drafts += len(list(tmp_path.glob(".step-*.tmp")))
        newest = checkpoint.newest(tmp_path)
        step = int(newest.name.removeprefix("step-"))
        assert torch.equal(checkpoint.read(newest).model["weight"], snapshot(step, 1500).model["weight"])
        checkpoint.verify(checkpoint.resolve(tmp_path / "latest"))
    assert drafts, "no writer was killed in the middle of a checkpoint: the test shows nothing"


def test_prune_keeps_the_last_and_those_that_links_name(tmp_path):
    paths = [checkpoint.write(tmp_path, snapshot(step)) for step in range(1, 6)]
    checkpoint.point(tmp_path, "best", paths[1])
    checkpoint.point(tmp_path, "latest", paths[4])
    (tmp_path / ".step-00000009.77.tmp").mkdir()
    checkpoint.prune(tmp_path, 2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["best", "latest", "step-00000002", "step-00000004", "step-00000005"]


def test_a_write_that_fails_leaves_nothing_and_the_checkpoints_as_they_were(tmp_path):
    """A file of the system's limit is the full disk that a test can have."""
    checkpoint.write(tmp_path, snapshot(1))
    code = (
        "import resource, sys; sys.path[:0] = [{!r}, {!r}]\n"
        "from pathlib import Path\n"
        "from dist_train import checkpoint\n"
        "from test_checkpoint import snapshot\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: checkpoint.write(Path({!r}), snapshot(2, 1000))\n"
        "except OSError as error: print('refused', error)\n"
    ).format(str(Path(__file__).parents[2]), str(Path(__file__).parent), str(tmp_path))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "refused" in result.stdout, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_continuing_names_what_differs(tmp_path):
    config = make_config({"data": {"shards": "x"}})
    path = checkpoint.write(tmp_path, replace(snapshot(1), config=config))
    changed = make_config({"data": {"shards": "x"}, "optim": {"lr": 0.5}})
    assert checkpoint.check_continues(path, changed, "print", 2) == ["optim.lr 0.1 -> 0.5"]
    other = make_config({"data": {"shards": "x"}, "model": {"growth": 9}, "seed": 4})
    with pytest.raises(CheckpointError, match=r"differs in seed 0 -> 4, model.growth 6 -> 9"):
        checkpoint.check_continues(path, other, "print", 2)
    with pytest.raises(CheckpointError, match="other data"):
        checkpoint.check_continues(path, config, "another", 2)
    with pytest.raises(CheckpointError, match="trained on 2 classes, the shards have 3"):
        checkpoint.check_continues(path, config, "print", 3)


def test_random_states_come_back():
    import random

    import numpy as np

    state = checkpoint.random_state()
    drawn = torch.rand(3), np.random.rand(3), random.random()
    checkpoint.set_random_state(state)
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(drawn[0], again[0])
    assert (drawn[1] == again[1]).all()
    assert drawn[2] == again[2]
