"""Outside teachers in whole runs: averaged weights and another run teach; resumed is uninterrupted; what does not fit is said."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train import plan, train
from dist_train.config import Config
from dist_train.config_file import make_config
from dist_train.distributed.group import Group, Ranks
from dist_train.errors import ConfigError, UserError
from dist_train.training import outside_teachers
from dist_train.training.outside_teachers import OutsideTeachers, share_averages, try_teachers
from dist_train.training.resume import resume_point
from shards.index import Index
from tests.common import SMALL_MODEL, train_all
from tests.dist_train.training.test_resume import assert_same_state, state_at, training_lines


def settings(digits: Path, runs: Path, name: str, *teachers: str, **sections: Any) -> Config:
    return make_config(
        {
            "name": name,
            "runs": str(runs),
            "data": {"shards": str(digits), "flip": False, **sections.get("data", {})},
            "model": SMALL_MODEL,
            "loss": {"outside_teachers": teachers, "teachers": "last", "temperature": 2.0},
            "optim": {"lr": 0.05, "ema_decay": 0.9},
            "train": {"global_batch": 16, "micro_batch": 8, "precision": "fp32", "epochs": 1, "max_steps": 6}
            | sections.get("train", {}),
            "checkpoint": {"every_steps": 2, "keep": 10},
            "tracking": {"log_every": 3, "uri": "off"},
        }
    )


def test_averages_and_a_run_teach_and_resumed_is_uninterrupted(ranks: Any, digits: Path, tmp_path: Path) -> None:
    ranks(train_all, 1, [settings(digits, tmp_path, "teacher")])
    given = ("averaged", str(tmp_path / "teacher"))

    def runs(steps: int) -> list[Config]:
        more = {"train": {"max_steps": steps}}
        return [settings(digits, tmp_path, "cut", *given, **more)]

    ranks(train_all, 2, [settings(digits, tmp_path, "whole", *given), settings(digits, tmp_path, "alone"), *runs(4)])
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000004")
    ranks(train_all, 2, runs(6))
    assert_same_state(state_at(tmp_path / "whole", 6), state_at(tmp_path / "cut", 6))
    assert training_lines(tmp_path / "whole") == training_lines(tmp_path / "cut")
    (whole, _), (alone, _) = state_at(tmp_path / "whole", 6), state_at(tmp_path / "alone", 6)
    assert any(not torch.equal(whole[name], alone[name]) for name in whole if name.startswith("model:"))

    # A finished run needs no teachers, even where they are gone.
    (tmp_path / "teacher").rename(tmp_path / "moved")
    assert ranks(train_all, 1, [settings(digits, tmp_path, "whole", *given)]) == [[6]]
    (tmp_path / "moved").rename(tmp_path / "teacher")

    # Trained anew for longer, the teacher is another one, and the run says so.
    config = runs(8)[0]
    assert _says_other_weights(config, digits) is False
    shutil.rmtree(tmp_path / "teacher")  # trained further, it could keep its weights, where they validated better
    ranks(train_all, 1, [settings(digits, tmp_path, "teacher", train={"max_steps": 8})])
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000006")  # which says that the run is finished
    assert _says_other_weights(config, digits)


def _says_other_weights(config: Config, digits: Path) -> bool:
    resume = resume_point(config, Index.load(digits / "train"), Index.load(digits / "val"))
    assert resume is not None
    return f"the outside teacher {config.loss.outside_teachers[1]} has other weights than before" in resume.changes


def test_the_averages_teach_as_they_are_now() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    averages = {name: torch.rand_like(t) for name, t in network.state_dict().items() if t.is_floating_point()}
    shared = share_averages(copy.deepcopy(network), averages)
    images = torch.randn(2, 3, 8, 8)
    for _ in range(2):
        network.load_state_dict(network.state_dict() | averages)
        torch.testing.assert_close(shared.eval()(images), network.eval()(images), rtol=0, atol=0)
        torch._foreach_mul_(list(averages.values()), 1.5)


class Own(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.mean((2, 3)))


def wrong(num_classes: int) -> nn.Module:
    return Own(num_classes + 1)


def fails(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3, num_classes))


class Words(nn.Module):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"probabilities": images}


def words(num_classes: int) -> nn.Module:
    return Words()


def test_a_folder_called_like_the_averages_is_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "averaged").mkdir()
    monkeypatch.chdir(tmp_path)
    assert outside_teachers._runs(["averaged"]) == []


def test_a_network_of_ones_own_teaches(digits: Path, tmp_path: Path) -> None:
    config = settings(digits, tmp_path, "own", f"{__name__}:Own")
    group = Group(Ranks(0, 1, 0, 1), 1)
    classes = [str(number) for number in range(10)]
    teachers = OutsideTeachers(config.loss.outside_teachers, config, classes, group)
    (given,) = teachers.logits(torch.randn(2, 3, 8, 8, requires_grad=True), torch.bfloat16)
    assert (given.shape, given.dtype, given.requires_grad) == ((2, 10), torch.bfloat16, False)
    config = settings(digits, tmp_path, "own", f"{__name__}:wrong")
    with pytest.raises(ConfigError, match=r"gives \[1, 11\] for one image; it must be \[1, 10\]"):
        try_teachers(config, classes)
    for wrong_kind, said in (("fails", "fails on images of 32 x 32 pixels: mat1 and mat2"), ("words", "gives a dict")):
        config = settings(digits, tmp_path, "own", f"{__name__}:{wrong_kind}")
        with pytest.raises(ConfigError, match=said):
            try_teachers(config, classes)


def test_teachers_that_do_not_fit_are_one_line(ranks: Any, digits: Path, tmp_path: Path) -> None:
    ranks(train_all, 1, [settings(digits, tmp_path, "teacher", train={"max_steps": 2})])
    teacher = str(tmp_path / "teacher")

    def said(*given: str, **sections: Any) -> str:
        with pytest.raises(UserError) as error:
            train(settings(digits, tmp_path, "student", *given, **sections))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "trained with data.mean" in said(teacher, data={"mean": [0.1, 0.1, 0.1]})
    assert "no checkpoint here" in said(str(tmp_path / "nothing"))
    assert "train.zero_stage 3 divides among the processes" in said("averaged", train={"zero_stage": 3})
    for name in ("no_such_module:network", "timm/no_such_network"):
        assert f"loss.outside_teachers: model.name is {name!r}" in said(name)
        found = plan(settings(digits, tmp_path, "student", name))
        assert [one for one in found.problems if name in one]
    found = plan(settings(digits, tmp_path, "student", teacher))
    assert (
        0 <= found.memory[0].teachers - found.memory[0].evaluator < 20_000
    )  # the same network, and the head of its file
    assert "activations  teachers" in str(found)
    assert "activations  teachers" not in str(plan(settings(digits, tmp_path, "student")))
    with pytest.raises(ConfigError, match=r"optim\.ema_decay is not set"):
        make_config({"data": {"shards": str(digits)}, "loss": {"outside_teachers": ["averaged"]}})
