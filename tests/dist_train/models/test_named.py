"""Networks of other libraries by name: exits inside of them, trained, planned, stopped; errors in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train import predict
from dist_train.config_file import make_config
from dist_train.errors import ConfigError
from dist_train.models import build_model
from dist_train.models.cost import exit_costs
from dist_train.prediction.confidence import confidence, exits_taken
from dist_train.prediction.stopping import Thresholds
from tests.common import importable, network_config

VIT = {
    "name": "transformers/ViTConfig",
    "exits": ["vit.layers.0", "vit.layers.1"],
    "pooling": "class_token",
    "options": {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 4,
    },
}
RESNET = {
    "name": "transformers/ResNetConfig",
    "exits": ["resnet.encoder.stages.0"],
    "options": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
}


@pytest.mark.parametrize("fields", [VIT, RESNET], ids=["vit", "resnet"])
def test_transformers(fields: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    network = build_model(network_config(**fields), 5, 16).eval()
    images = torch.randn(30, 3, 16, 16)
    run: list[str] = []
    for name, module in network.named_modules():
        module.register_forward_hook(lambda *_, name=name: run.append(name))
    with torch.no_grad():
        whole = network(images)
        order = list(run)
        run.clear()
        passes = network.iter_exits(images)
        for number, expected in enumerate(whole):
            torch.testing.assert_close(next(passes), expected)
            if number == 0:
                after = order[order.index(f"network.{fields['exits'][0]}") + 1 :]
                assert set(run).isdisjoint(set(after) - {n for n in after if n.startswith("heads.0") or n in run[-3:]})
    assert [tuple(logits.shape) for logits in whole] == [(30, 5)] * (len(fields["exits"]) + 1)
    costs = [cost.macs for cost in exit_costs(network, 16, lazy=True)]
    assert costs == sorted(set(costs))
    scores = torch.stack([confidence(logits) for logits in whole], 1)
    values = scores.median(0).values + 1e-5
    assert predict(network, images, Thresholds(values.tolist())).exits.equal(exits_taken(scores, values))


def test_a_vision_transformer_trains_and_comes_back(digits: Path, tmp_path: Path, command: Any) -> None:
    pytest.importorskip("transformers")
    from dist_train import cli, load_model
    from dist_train.config_file import dump_config

    config = make_config(
        {
            "name": "vit",
            "runs": str(tmp_path),
            "data": {"shards": str(digits), "image_size": 16},
            "model": VIT,
            "train": {"epochs": 1, "global_batch": 64, "micro_batch": 64, "max_steps": 3, "zero_stage": 2},
            "tracking": {"uri": "off"},
        }
    )
    path = tmp_path / "vit.yaml"
    path.write_text(dump_config(config))
    assert cli.run(["plan", str(path)]) == 0
    result = command("dist_train", "train", path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(load_model(tmp_path / "vit")(torch.zeros(1, 3, 16, 16))) == 3


def test_names_that_lead_nowhere() -> None:
    pytest.importorskip("transformers")

    def said(**fields: Any) -> str:
        with pytest.raises(ConfigError) as error:
            build_model(network_config(**{**VIT, **fields}), 5, 16)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no configuration class ViTConfg" in said(name="transformers/ViTConfg")
    assert "ViTConfig has no field layers" in said(options={"layers": 3})
    assert "the nearest is 'vit.layers.0'" in said(exits=("vit.layer.0",))
    assert "cannot build" in said(options={**VIT["options"], "patch_size": 0})
    with pytest.raises(Exception, match="torchvision/NAME, transformers/NAME"):
        network_config(name="resnet50", exits=("layer1",))


@pytest.mark.parametrize(("library", "name"), [("timm", "resnet18"), ("torchvision", "resnet18")])
def test_other_libraries_or_how_to_install_them(library: str, name: str) -> None:
    config = network_config(name=f"{library}/{name}", exits=("layer1", "layer3"))
    if importable(library):
        assert build_model(config, 5, 64).num_exits == 3
    else:
        with pytest.raises(ConfigError, match=rf"pip install dist-train\[{library}\]"):
            build_model(config, 5, 64)
