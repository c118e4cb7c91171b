"""MSDNet and a network with attached exits train to the same weights through every ZeRO stage, compiled, and as NHWC or NCHW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from dist_train.config import Config
from dist_train.config_file import make_config
from dist_train.models import build_model
from dist_train.training.random_state import seed_random
from tests.common import SMALL_MODEL, train_all

MODELS: dict[str, dict[str, Any]] = {
    "msdnet": SMALL_MODEL,
    "attached": {"name": "resnet", "exits": ["stages.0"], "blocks": [1, 1], "width": 4},
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"zero {stage}": {"zero_stage": stage} for stage in range(4)},
    "contiguous": {"zero_stage": 1, "channels_last": False},
    "compiled": {"zero_stage": 1, "compile": True},
}


def settings(digits: Path, runs: Path, model: str, variant: str) -> Config:
    return make_config(
        {
            "name": f"{model}-{variant.replace(' ', '')}",
            "runs": str(runs),
            "model": MODELS[model],
            "data": {"shards": str(digits), "flip": False, "image_size": 16},
            "optim": {"lr": 0.02},
            "train": {
                "global_batch": 64,
                "micro_batch": 16,
                "precision": "fp32",
                "epochs": 1,
                "max_steps": 4,
                **VARIANTS[variant],
            },
            "tracking": {"log_every": 2, "uri": "off"},
        }
    )


def test_all_ways_to_train_end_at_the_same_weights(ranks: Any, digits: Path, tmp_path: Path) -> None:
    """MSDNet at every stage is in test_train.py; here are its other ways, on one process, and all ways of attached exits."""
    shared = {v: settings(digits, tmp_path / "two", "attached", v) for v in VARIANTS if v != "compiled"}
    single = {
        (model, v): settings(digits, tmp_path / "one", model, v)
        for model in MODELS
        for v in ("zero 0", "contiguous", "compiled")
    }
    assert ranks(train_all, 2, list(shared.values())) == [[4] * len(shared)] * 2
    assert ranks(train_all, 1, list(single.values())) == [[4] * len(single)]
    compared = [(config, shared["zero 0"]) for config in shared.values()]
    compared += [(config, single[model, "zero 0"]) for (model, _), config in single.items()]
    for config, reference in compared:
        end, expected = (load_file(c.folder / "checkpoints/latest/model.safetensors") for c in (config, reference))
        seed_random(0)
        for key, start in build_model(config.model, 10, 16).state_dict().items():
            # Rounding grows in training, most of all in small batch norms; it stays small beside what training did.
            moved = (expected[key].double() - start.double()).norm()
            apart = (end[key].double() - expected[key].double()).norm()
            assert moved > 0, key
            assert apart < 0.2 * moved, (config.folder, key)
