"""Distributed training of multi-exit image classifiers by distillation between their own exits.

Phuong & Lampert, "Distillation-Based Training for Multi-Exit Architectures", ICCV 2019.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.checkpoint import load_model
    from dist_train.config_file import load_config
    from dist_train.loss import ExitDistillation
    from dist_train.models.exits import attach_exits
    from dist_train.models.msdnet import MSDNet
    from dist_train.planner import plan
    from dist_train.prediction import predict
    from dist_train.report.evaluate import evaluate
    from dist_train.trainer import train

# Imported when first used: `dist-train --help` must not wait for torch.
_HOMES = {
    "ExitDistillation": "dist_train.loss",
    "MSDNet": "dist_train.models.msdnet",
    "attach_exits": "dist_train.models.exits",
    "evaluate": "dist_train.report.evaluate",
    "load_config": "dist_train.config_file",
    "load_model": "dist_train.checkpoint",
    "plan": "dist_train.planner",
    "predict": "dist_train.prediction",
    "train": "dist_train.trainer",
}

__all__ = [
    "ExitDistillation",
    "MSDNet",
    "attach_exits",
    "evaluate",
    "load_config",
    "load_model",
    "plan",
    "predict",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dist_train' has no attribute '{name}'")
