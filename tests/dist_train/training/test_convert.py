"""A public repository's checkpoint file becomes a folder that load_model reads, or one line says why it cannot."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dist_train import cli, load_model
from dist_train.models.interop import load_msdnet_pytorch
from dist_train.models.msdnet import MSDNet
from shards.index import Index

ARGS = {
    "data": "cifar10",
    "nBlocks": 3,
    "nChannels": 4,
    "base": 2,
    "step": 1,
    "stepmode": "even",
    "growthRate": 2,
    "grFactor": "1-2",
    "bnFactor": "1-2",
    "prune": "max",
    "bottleneck": True,
}


def their_weights() -> dict[str, torch.Tensor]:
    """Weights under msdnet_pytorch's names, from the names that the loader says are missing, with the shapes it wants."""
    from dist_train.models import interop

    classes, arguments = interop.msdnet_pytorch_arguments(ARGS)
    torch.manual_seed(0)
    network = MSDNet(classes, **arguments)
    network(torch.randn(64, 3, 32, 32))  # moves running statistics away from their start
    own = network.state_dict()
    return {theirs: own[ours] for theirs, ours in interop._renamed(network) if ours in own}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in their_weights().items()}, "optimizer": {}},
        tmp_path / "theirs.pth.tar",
    )
    save_file(their_weights(), tmp_path / "theirs.safetensors")
    (tmp_path / "args.yaml").write_text(json.dumps(ARGS))
    return tmp_path


def convert(folder: Path, file: str, output: str, *more: Any) -> int:
    words = [
        folder / file,
        folder / output,
        "--repository",
        "msdnet_pytorch",
        "--arguments",
        folder / "args.yaml",
        *more,
    ]
    return cli.run(["convert", *map(str, words)])


@pytest.mark.parametrize("file", ["theirs.pth.tar", "theirs.safetensors"])
def test_a_converted_folder_gives_their_logits(files: Path, file: str, digits: Path) -> None:
    assert convert(files, file, "ours", "--data.shards", digits) == 0
    network = load_model(files / "ours")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for expected, logits in zip(
            load_msdnet_pytorch(ARGS, their_weights()).eval()(images), network(images), strict=True
        ):
            torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    state = json.loads(next(files.glob("ours/checkpoints/step-*/state.json")).read_text())
    assert state["classes"] == list(Index.load(digits / "val").classes)
    assert cli.run(["eval", str(files / "ours")]) == 0


def test_the_copy_of_a_run_predicts_as_an_ensemble(
    files: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(files, "theirs.safetensors", "ours", "--data.shards", digits) == 0
    words = ["convert", str(files / "ours"), str(tmp_path / "together"), "--ensemble", "geometric"]
    assert cli.run(words) == 0
    alone, together = load_model(files / "ours"), load_model(tmp_path / "together")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for number, logits in enumerate(together(images), start=1):
            torch.testing.assert_close(logits, torch.stack(alone(images)[:number]).mean(0))
    assert cli.run(["eval", str(tmp_path / "together")]) == 0
    capsys.readouterr()
    assert cli.run(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.run([*words[:2], str(tmp_path / "more"), *words[3:], "--data.mean", "[0, 0, 0]"]) == 2
    assert "--data.mean is given with --ensemble" in capsys.readouterr().err
    assert cli.run(["convert", str(files / "args.yaml"), str(tmp_path / "more"), *words[3:]]) == 2
    assert "no checkpoint here" in capsys.readouterr().err


def test_what_cannot_be_converted_is_one_line(files: Path, capsys: pytest.CaptureFixture[str], digits: Path) -> None:
    def said(file: str, output: str = "ours", *more: Any) -> str:
        assert convert(files, file, output, *more) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert not (files / "ours").exists()
        return captured.err

    torch.save(nn.Linear(1, 1), files / "module.pth")
    assert "holds no weights, or more than weights" in said("module.pth")
    (files / "text.pth").write_text("no weights")
    assert "holds no weights" in said("text.pth")
    (files / "text.safetensors").write_text("no weights")
    assert "holds no weights" in said("text.safetensors")
    (files / "text.pkl").write_bytes(pickle.dumps({"a": os.system}))
    assert "trusted" not in said("text.pkl")
    torch.save({"state_dict": {1: torch.zeros(1)}}, files / "numbers.pth")
    assert "holds a Tensor under 1, not a tensor under a name" in said("numbers.pth")
    torch.save([1, 2], files / "list.pth")
    assert "holds a list" in said("list.pth")
    assert "No such file" in said("nothing.pth")
    assert "exists already" in said("theirs.pth.tar", "args.yaml")
    assert "holds no shards" in said("theirs.pth.tar", "ours", "--data.shards", files)
    assert "data.sizes" in said("theirs.pth.tar", "ours", "--data.sizes", 3)
    fewer = {key: value for key, value in their_weights().items() if key != "classifier.1.linear.bias"}
    torch.save(fewer, files / "fewer.pth")
    assert "1 missing (classifier.1.linear.bias)" in said("fewer.pth")
    (files / "args.yaml").write_text(json.dumps(ARGS | {"nBlocks": 5, "nChannels": 8}))
    line = said("theirs.pth.tar")
    assert "the weights have 3 exits and 10 classes" in line
    assert "misshapen" in line
    for key, value, allowed in (
        ("nBlocks", "many", "a whole number above 0"),
        ("nBlocks", 0, "a whole number above 0"),
        ("base", -1, "a whole number above 0"),
        ("growthRate", 2.5, "a whole number above 0"),
        ("nChannels", None, "a whole number above 0"),
        ("grFactor", "1-x", "whole numbers above 0, one per scale"),
        ("bnFactor", 3, "whole numbers above 0, one per scale"),
        ("reduction", "half", "a number from 0 to 1"),
    ):
        (files / "args.yaml").write_text(json.dumps(ARGS | {key: value}))
        assert f"{key} is {value!r}; it must be {allowed}" in said("theirs.pth.tar")
    (files / "args.yaml").write_text("- 1")
    assert "holds a list" in said("theirs.pth.tar")
