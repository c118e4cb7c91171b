"""Generated configurations: each one trains a step or is refused in one line; none gives a traceback."""

import contextlib
import io
import os
import random
import resource
import traceback

import pytest
import yaml

from dist_train.config_file import describe_fields
from tests.common import SMALL_MODEL

COUNT = int(os.environ.get("DIST_TRAIN_CONFIGS", "60"))
"""How many are tried; 300 take a few minutes."""

ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    7,
    0.1,
    0.5,
    1.5,
    -0.25,
    1e-9,
    1e9,
    2**32,
    2**63,
    float("inf"),
    float("nan"),
    "",
    "x",
    "yes",
    "1e-3",
    "0x10",
    "é",
    "a" * 300,
    "~",
    "$HOME",
    [],
    [1],
    [0.1, 0.2],
    [1, 2, 3],
    [[0, 1], [0, 0]],
    ["body"],
    {},
    {"a": 1},
    "off",
    "none",
    "last",
    "later",
    "min",
    "sgd",
    "adamw",
    "cosine",
    "constant",
    "kl",
    "sum",
    "lua",
    "resnet",
]

# What a value of any size does here is not the question: how long it trains, where it writes, what it waits for.
LEFT_ALONE = (
    "runs",
    "name",
    "data.shards",
    "data.train",
    "data.val",
    "data.cache",
    "tracking.",
    "slurm.",
    "faults.",
    "train.epochs",
)


def generated(seed, digits, runs):
    """A configuration that trains in a moment, with one to four fields changed to odd values."""
    dice = random.Random(seed)
    tree = {
        "name": f"c{seed}",
        "runs": str(runs),
        "data": {"shards": str(digits), "decode_threads": 1},
        "model": dict(SMALL_MODEL),
        "train": {"global_batch": 8, "micro_batch": 8, "max_steps": 1, "epochs": 1, "precision": "fp32"},
        "tracking": {"uri": "off"},
        "checkpoint": {"keep": 1},
    }
    fields = [(key, default) for key, default, _ in describe_fields() if not key.startswith(LEFT_ALONE)]
    for _ in range(dice.randint(1, 4)):
        key, default = dice.choice(fields)
        value = (
            dice.choice(ODD) if default == "required" or dice.random() < 0.35 else near(yaml.safe_load(default), dice)
        )
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree


def near(value, dice):
    """A value of the same kind, which is allowed more often than not."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return dice.choice([value, value + 1, value * 2])
    if isinstance(value, float):
        return dice.choice([value, value / 2, value * 2])
    return value


def try_all(seeds, digits, runs):
    """What each configuration gave that it must not give, and how many trained."""
    import torch

    from dist_train import cli

    # A network that is larger than the machine must be refused, and not bring the machine down.
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    torch.set_num_threads(1)
    wrong, trained = [], 0
    for seed in seeds:
        path = runs / f"{seed}.yaml"
        path.write_text(yaml.safe_dump(generated(seed, digits, runs), allow_unicode=True), encoding="utf-8")
        output, errors = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                code = cli.run(["train", str(path)])
        except BaseException:
            wrong.append(f"seed {seed}: {path.read_text()}\n{traceback.format_exc()}")
            continue
        trained += code == 0
        said = errors.getvalue()
        if code not in (0, 2) or (code == 2 and said.count("\n") != 1) or "Traceback" in said + output.getvalue():
            wrong.append(f"seed {seed}: exit code {code}: {path.read_text()}\n{said}")
    return wrong, trained


def test_every_configuration_trains_or_is_one_line(ranks, digits, tmp_path):
    ((wrong, trained),) = ranks(try_all, 1, range(COUNT), digits, tmp_path, timeout=1800)
    assert not wrong, f"{len(wrong)} of {COUNT}:\n" + "\n\n".join(wrong[:5])
    assert trained > COUNT / 10, "hardly any of them is valid: the test shows little"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_in_another_encoding_is_one_line(tmp_path, refused, encoding):
    path = tmp_path / "other.yaml"
    path.write_bytes("name: zürich\n".encode(encoding))
    assert "is not UTF-8 text" in refused("train", path)
