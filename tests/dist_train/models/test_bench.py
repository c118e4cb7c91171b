"""``dist-train bench model``: what it writes can be read, its shares are those of the lazy count, and a step calls few operators."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.bench import model as bench
from dist_train.bench.operators import count_operators
from dist_train.bench.peer import load_peer
from dist_train.errors import ConfigError
from dist_train.models.cost import exit_costs
from dist_train.models.msdnet import MSDNet
from dist_train.precision import autocast

# Only the layout of a checkout, and the arguments, are those of kalviny/MSDNet-PyTorch.
PEER = """
import torch
from torch import nn

class MSDNet(nn.Module):
    def __init__(self, args):
        super().__init__()
        print("building", args.nBlocks)
        self.args = args
        classes = 1000 if args.data == "ImageNet" else 100
        self.heads = nn.ModuleList(nn.Linear(3, classes) for _ in range(args.nBlocks))

    def forward(self, x):
        return [head(x.mean((2, 3))) for head in self.heads]
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "peer" / "models").mkdir(parents=True)
    (tmp_path / "peer" / "models" / "msdnet.py").write_text(PEER)
    return tmp_path / "peer"


def test_the_file_holds_every_setting_and_every_exit(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "BLOCKS", 1)
    arguments = ["--networks", "cifar", "--steps", "1", "--batch", "2", "--peer", str(checkout)]
    assert bench.run([*arguments, "--json", str(tmp_path / "bench.json")]) == 0
    (result,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    speeds = result["images_per_second"]
    settings = {"plain", "channels_last", "default"}
    assert settings | {f"peer, {name}" for name in settings} <= speeds.keys()
    assert result["ratio"] == speeds["default"] / speeds["plain"]
    assert all(result["operators"][f"peer, {name}"] < result["operators"][name] for name in settings)
    lazy = [cost.macs for cost in exit_costs(MSDNet(100), 32, lazy=True)]
    assert result["stopping"].keys() == {"64", "1"}
    for exits in result["stopping"].values():
        assert [one["share_of_multiply_adds"] for one in exits] == [cost / lazy[-1] for cost in lazy]
        assert exits[-1]["share"] == 1
        assert all(one["milliseconds"] > 0 for one in exits)
    said = capsys.readouterr().out
    assert "all of a batch of 64 stop at exit" in said
    assert "building" not in said


def test_the_peer_gets_the_same_network_by_its_own_names(checkout: Path) -> None:
    def arguments(network: str) -> dict[str, Any]:
        fields = {k: v for k, v in bench.NETWORKS[network].items() if k not in ("num_classes", "image_size", "batch")}
        return vars(load_peer(checkout, fields).args)

    cifar, imagenet = arguments("cifar"), arguments("imagenet")
    assert (cifar["data"], cifar["nBlocks"], cifar["nChannels"], cifar["grFactor"]) == ("cifar100", 7, 16, [1, 2, 4])
    assert (imagenet["data"], imagenet["nScales"], imagenet["bnFactor"]) == ("ImageNet", 4, [1, 2, 4, 4])
    assert (imagenet["growthRate"], imagenet["step"], imagenet["prune"], imagenet["reduction"]) == (16, 4, "max", 0.5)


def test_a_folder_that_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"which has no models/msdnet.py; give a checkout of https://github.com"):
        load_peer(tmp_path, {})


def test_operators_are_counted_with_their_backward_pass_and_without_views() -> None:
    a = torch.ones(2, 2, requires_grad=True)
    assert count_operators(lambda: a.t().detach()[0]) == 0
    assert count_operators(lambda: torch.exp(a.t())) == 1
    # exp, sum; ones for the start of the backward pass, one product; the sum's gradient is a view
    assert count_operators(lambda: torch.exp(a).sum().backward()) == 4


@pytest.mark.parametrize(("network", "size", "most"), [("cifar", 32, 1292), ("imagenet", 64, 1781)])
def test_a_training_step_calls_no_more_operators(network: str, size: int, most: int) -> None:
    """With the defaults of a run; neither the images' size nor their number changes it.  On a GPU these are launches."""
    fields = {k: v for k, v in bench.NETWORKS[network].items() if k not in ("num_classes", "image_size", "batch")}
    model = MSDNet(10, **fields)
    images = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    precision = functools.partial(autocast, "bf16", torch.device("cpu"))
    step = bench._stepper(model.train(), model.num_exits, images, torch.tensor([1, 2]), precision, False)
    step()  # the optimizer makes its state
    assert count_operators(step) <= most
