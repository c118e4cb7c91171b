"""Bad input: one line that names the argument, what was given and what is allowed."""

from __future__ import annotations

import pytest
import torch

from dist_train.config import LossConfig
from dist_train.config_file import make_config
from dist_train.errors import ConfigError, DataError
from dist_train.loss.objective import ExitDistillation, LabelMix

LOGITS = [torch.zeros(4, 5) for _ in range(3)]
LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("fields", "exits", "words"),
    [
        ({}, 0, ["0 exits", "1 to 16"]),
        ({}, 17, ["17 exits", "1 to 16"]),
        ({"label_weights": (1, 2)}, 3, ["loss.label_weights", "2 numbers", "3 exits"]),
        ({"distill_weights": (1, 2, 3, 4)}, 3, ["loss.distill_weights", "4 numbers", "3 exits"]),
        ({"temperature": (1, 2)}, 3, ["loss.temperature", "2 numbers", "3 exits"]),
        ({"teachers": ((0, 1), (0, 0))}, 3, ["loss.teachers", "[2, 2]", "3 x 3"]),
        ({"teachers": ((0, 1, 0), (0, 0), (0, 0, 0))}, 3, ["loss.teachers", "[3, 2, 3]", "3 x 3"]),
        ({"teachers": ((0, 1, 0), (0, 0.5, 0), (0, 0, 0))}, 3, ["loss.teachers[1][1]", "0.5", "cannot teach itself"]),
    ],
)
def test_what_does_not_fit_the_network(fields, exits, words):
    with pytest.raises(ConfigError) as error:
        ExitDistillation.from_config(LossConfig(**fields), exits)
    assert_line(error.value, words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"teachers": "lst"}, ["loss.teachers", "lst", "last"]),
        ({"teachers": [[0, -1], [0, 0]]}, ["loss.teachers", "-1", "finite", "at least 0"]),
        ({"label_weights": -1}, ["loss.label_weights", "-1", "finite", "at least 0"]),
        ({"label_weights": float("nan")}, ["loss.label_weights", "nan", "finite"]),
        ({"distill_weights": [1, float("inf")]}, ["loss.distill_weights", "inf"]),
        ({"alpha": 1.5}, ["loss.alpha", "1.5", "less than or equal to 1"]),
        ({"weight": 0}, ["loss.weight", "0", "greater than 0"]),
        ({"temperature": 0}, ["loss.temperature", "holds 0", "finite number above 0"]),
        ({"temperature": [1, -2]}, ["loss.temperature", "holds -2", "above 0"]),
        ({"teachers": [[0, float("nan")], [0, 0]]}, ["loss.teachers", "nan", "finite"]),
        ({"temperature": float("inf")}, ["loss.temperature", "inf", "finite"]),
        ({"temperature_bounds": [3, 2]}, ["temperature_bounds", "[3.0, 2.0]", "must rise"]),
        (
            {"temperature": [1, 5], "temperature_bounds": [0.1, 2]},
            ["temperature holds 5", "temperature_bounds", "0.1 to 2"],
        ),
        ({"temperature": 2000}, ["temperature holds 2000", "temperature_bounds", "0.001 to 1000"]),
        ({"temperature_schedule": [[0, 1]]}, ["loss: temperature_rule is anneal", "1 points"]),
        ({"temperature_rule": "schedule"}, ["loss: temperature_rule is schedule", "0 points"]),
        ({"temperature_rule": "schedule", "temperature_schedule": [[5, 1], [5, 2]]}, ["[5, 5]", "must rise"]),
        ({"label_smoothing": 1.0}, ["loss.label_smoothing", "1.0", "less than 1"]),
        ({"preset": "papers"}, ["loss.preset", "papers", "'paper' or 'authors'"]),
        ({"temprature": 2}, ["loss.temprature", "did you mean loss.temperature"]),
    ],
)
def test_what_no_configuration_may_hold(fields, words):
    with pytest.raises(ConfigError) as error:
        make_config({"data": {"shards": "nowhere"}, "loss": fields})
    assert_line(error.value, words)


@pytest.mark.parametrize(
    ("logits", "targets", "extra", "words"),
    [
        (LOGITS[:2], LABELS, {}, ["logits", "2 exits", "3"]),
        ([z[0] for z in LOGITS], LABELS, {}, ["logits[0]", "[5]", "[N, K]"]),
        ([z.int() for z in LOGITS], LABELS, {}, ["logits[0]", "int32", "bfloat16"]),
        ([*LOGITS[:2], torch.zeros(4, 6)], LABELS, {}, ["logits[2]", "[4, 6]", "[4, 5]"]),
        ([*LOGITS[:2], LOGITS[2].half()], LABELS, {}, ["logits[2]", "float16", "float32"]),
        ([torch.zeros(4, 0)] * 3, LABELS, {}, ["logits[0]", "[4, 0]"]),
        (LOGITS, LABELS[:3], {}, ["targets", "[3]", "[4]", "int64"]),
        (LOGITS, LABELS.int(), {}, ["targets", "int32", "int64"]),
        (LOGITS, torch.zeros(4, 4), {}, ["targets", "[4, 4]", "[4, 5]"]),
        (LOGITS, LabelMix(LABELS, LABELS[:2], torch.zeros(4)), {}, ["targets.second", "[2]", "[4]"]),
        (LOGITS, LabelMix(LABELS, LABELS, LABELS), {}, ["targets.share", "int64", "floating-point"]),
        (LOGITS, LabelMix(LABELS, LABELS, torch.full((4,), 1.5)), {}, ["targets.share", "1.5", "0 to 1"]),
        (LOGITS, torch.tensor([0, 5, -100, 1]), {}, ["targets", "label 5", "0 to 4", "-100"]),
        (LOGITS, torch.tensor([0, -1, -100, 1]), {}, ["targets", "label -1", "0 to 4", "-100"]),
        (LOGITS, LabelMix(LABELS, LABELS + 7, torch.zeros(4)), {}, ["targets", "label 7", "0 to 4"]),
        (LOGITS, torch.full((4, 5), -0.1), {}, ["targets", "negative"]),
        (LOGITS, torch.full((4, 5), torch.nan), {}, ["targets", "not finite"]),
        (LOGITS, LABELS, {"weights": torch.ones(3)}, ["weights", "[3]", "[4]"]),
        (LOGITS, LABELS, {"weights": torch.tensor([1.0, -1, 1, 1])}, ["weights", "negative"]),
        (LOGITS, LABELS, {"labeled": 0}, ["labeled", "0", "above 0"]),
        (LOGITS, LABELS, {"labeled": float("nan")}, ["labeled", "nan", "above 0"]),
    ],
)
def test_tensors_that_do_not_fit(logits, targets, extra, words):
    with pytest.raises(DataError) as error:
        ExitDistillation.from_config(LossConfig(), 3)(logits, targets, **extra)
    assert_line(error.value, words)


@pytest.mark.parametrize("passes", [0, -3, 1.5])
def test_passes_are_counted_from_one(passes):
    with pytest.raises(ConfigError) as error:
        ExitDistillation.from_config(LossConfig(), 3)(LOGITS, LABELS, passes=passes)
    assert_line(error.value, [f"passes is {passes}", "at least 1"])


def assert_line(error, words):
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)


def test_presets_fill_what_is_not_given():
    tree = {"data": {"shards": "nowhere"}}
    default = make_config(tree)
    assert default.loss == LossConfig(preset="paper")
    assert (default.loss.weight, default.loss.teachers, default.loss.temperature_rule) == (2.0, "last", "anneal")
    authors = make_config({**tree, "loss": {"preset": "authors"}}).loss
    assert authors.weight == 10.0
    assert make_config({**tree, "loss": {"preset": "authors", "weight": 3}}).loss.weight == 3.0
    assert LossConfig(**authors.model_dump()) == authors
