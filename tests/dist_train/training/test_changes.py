"""What may change between two starts of a run, and what the run keeps of its first one."""

import errno
import functools
import json
import os
import shutil
from pathlib import Path

import pytest

from dist_train.config_file import make_config
from dist_train.training import checkpoint
from shards.index import Index
from shards.quarantine import Bad
from tests.common import SMALL_MODEL

CHANGES = {
    "averages on": ({}, {"ema_decay": 0.9}, "averaged weights start from this checkpoint's weights"),
    "averages off": ({"ema_decay": 0.9}, {}, "optim.ema_decay 0.9 -> null"),
    "momentum on": ({"momentum": 0, "nesterov": False}, {}, "the optimizer's momentum starts from 0"),
    "momentum off": ({}, {"momentum": 0, "nesterov": False}, "optim.momentum 0.9 -> 0"),
}


def settings(shards, runs, name, steps, optim=None, model=None, loss=None, epochs=1, **data):
    return make_config(
        {
            "name": name,
            "runs": str(runs),
            "data": {"shards": str(shards), "flip": False, **data},
            "model": {**SMALL_MODEL, **(model or {})},
            "loss": loss or {},
            "optim": {"lr": 0.05, **(optim or {})},
            "train": {"global_batch": 32, "micro_batch": 32, "epochs": epochs, "precision": "fp32", "max_steps": steps},
            "tracking": {"uri": "off"},
        }
    )


def train_all(digits, own, runs):
    """All starts in one process: twice with a change between, and once with a list that has grown since then."""
    from dist_train import train

    for name, (before, after, _) in CHANGES.items():
        name = name.replace(" ", "-")
        train(settings(digits, runs, name, 4, before))
        train(settings(digits, runs, name, 8, after))
    train(settings(digits, runs, "val", 4))
    train(settings(digits, runs, "val", 8, val="train"))
    train(settings(digits, runs, "memory", 4))
    train(settings(digits, runs, "memory", 8, model={"activation_checkpointing": True}))
    for rule in ("constant", "schedule"):
        loss = {"temperature_rule": rule} | ({"temperature_schedule": [[0, 1], [16, 3]]} if rule == "schedule" else {})
        train(settings(digits, runs, rule, 4, loss=loss))
        train(settings(digits, runs, rule, 8, loss={**loss, "temperature": 4}))
    full_disk_at_the_best(digits, runs)
    train(settings(own, runs, "quarantine", 4))
    index = Index.load(own / "train")
    index.save_quarantine([Bad(5, index.key[5].decode(), "is damaged")])
    train(settings(own, runs, "quarantine", 8))
    train(settings(own, runs, "fresh", 4))
    os.umask(0o027)
    train(settings(digits, runs, "umask", 4))


def full_disk_at_the_best(digits, runs):
    """Three epochs, of which the second has the best validation, whose checkpoint cannot be written."""
    from dist_train import train
    from dist_train.training import checkpoint, validation

    scores, write, score = iter((0.9, 1.0, 0.5)), checkpoint.write, validation.Validation.mean_top1

    def written(folder, content):
        if content.meta.progress.step == content.meta.progress.batch == 88:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(folder, content)

    checkpoint.write = written
    validation.Validation.mean_top1 = functools.cached_property(lambda _: next(scores))
    validation.Validation.mean_top1.__set_name__(validation.Validation, "mean_top1")
    config = settings(digits, runs, "full", None, epochs=3)
    train(config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"keep": 1})}))
    checkpoint.write, validation.Validation.mean_top1 = write, score


@pytest.fixture(scope="module")
def runs(ranks_of_module, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("changes")
    shutil.copytree(digits, folder / "own")
    ranks_of_module(train_all, 1, digits, folder / "own", folder)
    return folder


def log(folder):
    return (folder / "log" / "rank0.txt").read_text()


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_switched_on_or_off_between_two_starts_begins_fresh_and_is_said(runs, name):
    said = log(runs / name.replace(" ", "-"))
    assert "step 4, epoch 0.09" in said
    assert f"changed since then: {CHANGES[name][2]}" in said


def test_another_validation_split_chooses_the_best_anew(runs):
    assert "the validation split changed: the best checkpoint is chosen again from here on" in log(runs / "val")
    assert (runs / "val" / "checkpoints" / "best").resolve().name == "step-00000008"


def test_memory_can_be_saved_in_the_middle_of_a_run(runs):
    """As the line about a lack of memory advises."""
    assert "changed since then: model.activation_checkpointing false -> true" in log(runs / "memory")


@pytest.mark.parametrize(("rule", "temperature"), [("constant", 4), ("schedule", 4 * (1 + 2 * 8 / 16))])
def test_a_temperature_that_is_changed_is_the_one_that_counts(runs, rule, temperature):
    state = json.loads((runs / rule / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["loss"]["temperature"] == [temperature] * 2


def test_the_best_checkpoint_is_one_that_is_there(runs):
    assert "could not be written (No space left on device)" in log(runs / "full")
    state = json.loads((runs / "full" / "checkpoints" / "step-00000132" / "state.json").read_text())
    assert (state["progress"]["best_score"], state["progress"]["best_step"]) == (0.9, 44)
    assert checkpoint.find(runs / "full").name == "step-00000044"


def test_a_list_that_grows_while_a_run_trains_does_not_reach_the_run(runs):
    """`shards check` is what an unreadable image's error advises: it must not make the run another one."""
    said = log(runs / "quarantine")
    assert "resumed from" in said
    assert "1 images are in its quarantine list by now; this run leaves out the 0 that it began without" in said
    assert "1 images are left out, by quarantine.json" in log(runs / "fresh")
    assert "by now" not in log(runs / "fresh")


def test_a_checkpoint_is_readable_by_whom_the_umask_allows(runs):
    files = [Path(path) for path in (runs / "umask" / "checkpoints").glob("step-*/*.safetensors")]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}
