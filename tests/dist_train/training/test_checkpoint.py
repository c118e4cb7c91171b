"""Checkpoints are whole or absent, and damage is found before it is loaded."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dist_train.config_file import make_config
from dist_train.errors import CheckpointError
from dist_train.files import draft_folder_of
from dist_train.training import checkpoint
from dist_train.training.checkpoint import Checkpoint, CheckpointMeta, Progress
from dist_train.training.random_state import random_state, set_random_state
from dist_train.training.resume import check_resumable
from tests.common import ROOT


def snapshot(step, size=10):
    generator = torch.Generator().manual_seed(step)
    state = CheckpointMeta(Progress(step=step, batch=step), 2, ["a", "b"], "print", {"temperature": [1.05]})
    weights = {"weight": torch.randn(size, size, generator=generator), "count": torch.tensor(step)}
    return Checkpoint(
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
    assert (after.meta, after.config) == (before.meta, before.config)
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


def test_a_replacement_that_was_killed_between_its_renames_is_undone(tmp_path):
    path = checkpoint.write(tmp_path, snapshot(1))
    left = tmp_path / f".{path.name}.some.host-17-replaced.tmp"
    path.rename(left)
    checkpoint.put_back(tmp_path)
    assert checkpoint.newest(tmp_path) == path
    # What has been replaced stays so.
    shutil.copytree(path, left)
    (left / "old").touch()
    checkpoint.put_back(tmp_path)
    assert not (path / "old").exists()


@pytest.mark.parametrize("name", ["state.json", "config.yaml"])
def test_a_run_whose_newest_checkpoint_cannot_be_read_is_found_by_the_one_before(name, tmp_path):
    first, second = (checkpoint.write(tmp_path / "checkpoints", snapshot(step)) for step in (1, 2))
    assert checkpoint.find(tmp_path) == second
    (second / name).write_text("unknown: 1")
    assert checkpoint.find(tmp_path) == first
    assert not checkpoint.is_finished(tmp_path)
    (first / name).write_text("{")
    # What is wrong with the newest is said, where no other can be read.
    with pytest.raises(CheckpointError, match=rf"step-00000002: .*{name}"):
        checkpoint.find(tmp_path)


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
from dist_train.training import checkpoint
from test_checkpoint import snapshot
print("ready", flush=True)
step = 1
while True:
    step += 1
    path = checkpoint.write(Path({folder!r}), snapshot(step, 1500))
    checkpoint.set_link(Path({folder!r}), "latest", path)
    checkpoint.prune(Path({folder!r}), 2, None, step)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_newest_checkpoint(tmp_path):
    first = checkpoint.write(tmp_path, snapshot(1, 1500))
    checkpoint.set_link(tmp_path, "latest", first)
    here = Path(__file__).parent
    drafts = 0
    for delay in (0.05, 0.11, 0.17, 0.23, 0.31, 0.43):
        code = WRITER.format(root=str(ROOT), tests=str(here), folder=str(tmp_path))
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
        checkpoint.verify(checkpoint.find(tmp_path / "latest"))
    assert drafts, "no writer was killed in the middle of a checkpoint: the test shows nothing"


def test_prune_keeps_the_last_and_the_best(tmp_path):
    for step in range(1, 6):
        checkpoint.write(tmp_path, snapshot(step))
    (tmp_path / ".step-00000009.77.tmp").mkdir()
    checkpoint.prune(tmp_path, 2, best_step=2, written=5)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["step-00000002", "step-00000004", "step-00000005"]
    # A run that resumed from step 2, since those after it are damaged, must not lose what it writes to them.
    checkpoint.write(tmp_path, snapshot(3))
    checkpoint.prune(tmp_path, 1, best_step=5, written=3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_where_no_checkpoint_is_whole_nothing_starts_anew_over_them(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    for step in (1, 2):
        (checkpoint.write(tmp_path, snapshot(step)) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is intact"):
        checkpoint.newest(tmp_path)


def test_the_best_is_found_without_links(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        meta = snapshot(step).meta
        progress = replace(meta.progress, best_step=2 if step > 1 else 1)
        checkpoint.write(folder, replace(snapshot(step), meta=replace(meta, progress=progress)))
    assert checkpoint.find(tmp_path).name == "step-00000002"
    (folder / "step-00000003" / "state.json").write_text("{}")
    assert checkpoint.find(tmp_path).name == "step-00000002"


def test_a_folder_where_a_link_was_is_replaced_by_the_link(tmp_path):
    path = checkpoint.write(tmp_path, snapshot(1))
    shutil.copytree(path, tmp_path / "latest")
    checkpoint.set_link(tmp_path, "latest", path)
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "latest").resolve() == path.resolve()


def test_a_write_that_fails_leaves_nothing_and_the_checkpoints_as_they_were(tmp_path):
    """A file of the system's limit is the full disk that a test can have."""
    checkpoint.write(tmp_path, snapshot(1))
    code = (
        "import resource, sys; sys.path[:0] = [{!r}, {!r}]\n"
        "from pathlib import Path\n"
        "from dist_train.training import checkpoint\n"
        "from test_checkpoint import snapshot\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: checkpoint.write(Path({!r}), snapshot(2, 1000))\n"
        "except OSError as error: print('refused', error)\n"
    ).format(str(ROOT), str(Path(__file__).parent), str(tmp_path))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "refused" in result.stdout, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def data(fingerprint="print", classes=("a", "b")):
    return SimpleNamespace(fingerprint=fingerprint, classes=classes)


def test_resuming_names_what_differs(tmp_path):
    config = make_config({"data": {"shards": "x"}})
    path = checkpoint.write(tmp_path, replace(snapshot(1), config=config))
    changed = make_config({"data": {"shards": "x"}, "optim": {"lr": 0.5}})
    assert check_resumable(path, changed, data(), data()) == ["optim.lr 0.1 -> 0.5"]
    other = make_config({"data": {"shards": "x"}, "model": {"growth": 9}, "seed": 4})
    with pytest.raises(CheckpointError, match=r"differs in seed 0 -> 4, model.growth 6 -> 9"):
        check_resumable(path, other, data(), data())
    with pytest.raises(CheckpointError, match="other data"):
        check_resumable(path, config, data("another"), data())
    for classes in (("a", "b", "c"), ("a", "x")):
        with pytest.raises(CheckpointError, match=r"trained on 2 classes \(a, b\), the shards have"):
            check_resumable(path, config, data(classes=classes), data())


def test_random_states_come_back():
    import random

    import numpy as np

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.random(), random.gauss()

    # Normal numbers are made in pairs: before the second draw, one of each kind is left.
    for _ in range(2):
        state = random_state()
        drawn = draw()
        set_random_state(state)
        assert draw() == drawn


def test_random_states_without_what_is_left_of_a_pair_still_come_back():
    """As earlier versions wrote them."""
    state = random_state()
    drawn = torch.rand(3)
    set_random_state({name: tensor for name, tensor in state.items() if name != "second_normals"})
    assert torch.equal(torch.rand(3), drawn)


def test_a_draft_that_a_killed_process_of_the_same_number_has_left_is_no_obstacle(tmp_path):
    """As in containers, where hosts and processes have the same names and numbers again."""
    with draft_folder_of(tmp_path / "kept") as draft:
        left = draft
    (left / "sub").mkdir(parents=True)
    (left / "sub" / "old").write_text("old")
    with draft_folder_of(tmp_path / "kept") as draft:
        (draft / "new").write_text("new")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["new"]
    assert not left.exists()
