"""Distributed training of multi-exit image classifiers by distillation between their own exits.

Phuong & Lampert, "Distillation-Based Training for Multi-Exit Architectures", ICCV 2019.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.config_file import load_config
    from dist_train.evaluation.evaluate import evaluate
    from dist_train.loss.objective import ExitDistillation
    from dist_train.models.exits import attach_exits
    from dist_train.models.msdnet import MSDNet
    from dist_train.prediction.images import Predictor
    from dist_train.prediction.stopping import predict
    from dist_train.training.checkpoint import load_model
    from dist_train.training.planner import plan
    from dist_train.training.run import train

# Imported when first used: `dist-train --help` must not wait for torch.
_HOMES = {
    "ExitDistillation": "dist_train.loss.objective",
    "MSDNet": "dist_train.models.msdnet",
    "Predictor": "dist_train.prediction.images",
    "attach_exits": "dist_train.models.exits",
    "evaluate": "dist_train.evaluation.evaluate",
    "load_config": "dist_train.config_file",
    "load_model": "dist_train.training.checkpoint",
    "plan": "dist_train.training.planner",
    "predict": "dist_train.prediction.stopping",
    "train": "dist_train.training.run",
}

__all__ = [
    "ExitDistillation",
    "MSDNet",
    "Predictor",
    "attach_exits",
    "evaluate",
    "load_config",
    "load_model",
    "plan",
    "predict",
    "train",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("dist-train")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dist_train' has no attribute '{name}'")
