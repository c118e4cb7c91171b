"""Exits on networks of timm, torchvision and transformers: trained a few steps, evaluated, predicted with; `make test-newest`."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train import evaluate, load_model, predict
from dist_train.config_file import dump_config, make_config
from dist_train.prediction.stopping import Thresholds
from tests.common import importable

SMALL_SWIN = {"img_size": 56, "window_size": 7, "embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
NETWORKS = {
    "timm/resnet10t": ({}, ["layer1", "layer2", "layer3"], "mean", 32),
    "timm/mobilenetv3_small_050": ({}, ["blocks.1", "blocks.3"], "mean", 64),
    "timm/convnext_atto": ({}, ["stages.0", "stages.1", "stages.2"], "mean", 64),
    "timm/vit_tiny_patch16_224": (SMALL_VIT, ["blocks.0", "blocks.2"], "class_token", 32),
    "timm/swin_tiny_patch4_window7_224": (SMALL_SWIN, ["layers.0", "layers.1", "layers.2"], "mean", 56),
    "torchvision/resnet18": ({}, ["layer1", "layer2", "layer3"], "mean", 32),
    "torchvision/efficientnet_b0": ({}, ["features.2", "features.4"], "mean", 64),
    "torchvision/shufflenet_v2_x0_5": ({}, ["stage2", "stage3"], "mean", 64),
    "transformers/ConvNextConfig": (
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        ["convnext.encoder.stages.0", "convnext.encoder.stages.2"],
        "mean",
        64,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_exits_on_a_network_of_a_library_train_are_evaluated_and_predict(
    name: str, digits: Path, tmp_path: Path, command: Any
) -> None:
    library = name.partition("/")[0]
    if not importable(library):
        pytest.skip(f"{library} is not installed, or torchvision is of another build of torch")
    options, exits, pooling, size = NETWORKS[name]
    config = make_config(
        {
            "name": "run",
            "runs": str(tmp_path),
            "data": {"shards": str(digits), "image_size": size},
            "model": {"name": name, "options": options, "exits": exits, "pooling": pooling},
            "train": {"epochs": 1, "global_batch": 32, "micro_batch": 32, "max_steps": 4, "precision": "fp32"},
            "tracking": {"uri": "off", "log_every": 1},
        }
    )
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config))
    result = command("dist_train", "train", path)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [json.loads(line)["metrics"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    report = evaluate(tmp_path / "run")
    assert report.images == 360
    assert len(report.exits) == len(exits) + 1
    network, images = load_model(tmp_path / "run").eval(), torch.rand(8, 3, size, size)
    with torch.no_grad():
        whole = network(images)
    # Nobody is sure enough, or everybody is: the last exit's logits, and the first one's.
    for threshold, expected in ((2.0, whole[-1]), (0.0, whole[0])):
        found = predict(network, images, Thresholds([threshold] * len(exits)))
        torch.testing.assert_close(found.logits, expected, rtol=1e-3, atol=1e-4)
