"""A run with the preset ``authors`` against the authors' recipe, written out as a loop: the same loss, update and temperature at every step.

Sources: mary-phuong/multiexit-distillation, main.py:679-718 (loss and temperature), train_cifar.py:13-87 (network and
recipe), as described in words; none of that code is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_train.config import Config
from dist_train.config_file import make_config
from dist_train.models import build_model
from dist_train.tracking.metrics import read_metrics
from dist_train.training.random_state import seed_random
from shards.index import Index
from tests.common import cpu_loader, train_all

STEPS = 50
EPOCHS = 3


def settings(digits: Path, runs: Path) -> Config:
    return make_config(
        {
            "name": "ours",
            "runs": str(runs),
            "data": {"shards": str(digits), "image_size": 16, "augment": "pad_crop", "crop_padding": 2},
            "model": {
                "dialect": "multiexit_distillation",
                "exits": 4,
                "scales": 3,
                "base": 4,
                "step": 2,
                "prune": "min",
                "growth": 1,
                "initial_channels": 1,
                "growth_factors": [6, 12, 24],
                "bottleneck_factors": [4, 4, 4],
                "head_width": 32,
            },
            "loss": {"preset": "authors"},
            "optim": {
                "lr": 0.1,
                "momentum": 0.9,
                "nesterov": True,
                "weight_decay": 1e-4,
                "decay_all": True,
                "schedule": "multistep",
                "milestones": [1 / 3, 2 / 3],
                "gamma": 0.1,
            },
            "train": {"global_batch": 64, "micro_batch": 64, "precision": "fp32", "epochs": EPOCHS, "max_steps": STEPS},
            "checkpoint": {"every_steps": 1, "keep": 1000},
            "tracking": {"log_every": 1, "uri": "off"},
        }
    )


class AuthorsLoss:
    """Their DistillationLoss: the last exit teaches the others, at a temperature that rises while it is confident."""

    weight, factor, threshold = 0.5, 1.05, 0.5

    def __init__(self, exits: int) -> None:
        self.scale = 2.0 * 5 / exits
        self.temperature = 1.0

    def __call__(self, logits: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        temperature, teacher = self.temperature, (logits[-1].detach() / self.temperature).softmax(1)
        loss = (1 - self.weight) * F.cross_entropy(logits[-1], labels)
        for student in logits[:-1]:
            soft = -(teacher * (student / temperature).log_softmax(1)).sum(1).mean()
            loss = loss + (1 - self.weight) * F.cross_entropy(student, labels) + temperature**2 * self.weight * soft
        if teacher.max(1).values.mean() > self.threshold:
            self.temperature *= self.factor
        return self.scale * loss


def gradient_steps(config: Config, optimizer: torch.optim.SGD, network: nn.Module) -> Iterator[int]:
    """Sets network and momentum to those of our run before every step, of which it gives the number, from 1 on."""
    for number in range(1, STEPS + 1):
        if number > 1:
            saved = config.folder / "checkpoints" / f"step-{number - 1:08d}"
            network.load_state_dict(load_file(saved / "model.safetensors"))
            momentum = load_file(saved / "optimizer.safetensors")
            for name, parameter in network.named_parameters():
                optimizer.state[parameter]["momentum_buffer"] = momentum[f"momentum_buffer/{name}"]
        yield number


def compare(config: Config) -> float:
    """Checks every step of a finished run; the temperature at its end.  In a process of its own, with the threads of the run:

    what earlier tests leave in a process (threads, flags of cuDNN and oneDNN) changes the rounding.
    """
    torch.set_num_threads(1)
    logged = [e["metrics"] for e in read_metrics(config.folder / "metrics.jsonl") if "train/loss" in e["metrics"]]
    assert len(logged) == STEPS
    index = Index.load(Path(config.data.shards) / "train")
    loader = cpu_loader(
        index, Path(config.data.shards) / "train", config.data, train=True, seed=config.seed, global_batch=64
    )
    batches = [next(iter(batch)) for epoch in range(EPOCHS) for batch in loader.epoch(epoch)]
    loader.close()
    seed_random(config.seed)
    network: nn.Module = build_model(config.model, len(index.classes), config.data.image_size).train()
    # Their optimizer decays all parameters, those of norms and biases as well.
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.1)
    criterion, steps_per_epoch = AuthorsLoss(4), len(batches) // EPOCHS
    for number in gradient_steps(config, optimizer, network):
        ours, micro = logged[number - 1], batches[number - 1]
        assert ours["train/learning_rate"] == pytest.approx(schedule.get_last_lr()[0])
        loss = criterion(network(micro.images), micro.labels)
        assert ours["train/loss"] == pytest.approx(loss.item(), rel=1e-4), number
        assert ours["train/temperature"] == pytest.approx(criterion.temperature, rel=1e-5)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if number % steps_per_epoch == 0:
            schedule.step()
        ends = load_file(config.folder / "checkpoints" / f"step-{number:08d}" / "model.safetensors")
        for name, value in network.state_dict().items():
            assert torch.allclose(ends[name], value, rtol=1e-3, atol=2e-4), (number, name)
    return criterion.temperature


def test_every_step_is_that_of_the_authors_recipe(ranks: Any, digits: Path, tmp_path: Path) -> None:
    """Loss, temperature and all weights of each of 50 steps, each from where our run stands.

    At their learning rate rounding grows a hundredfold a step here: two free runs of one recipe are soon far apart.
    """
    config = settings(digits, tmp_path)
    assert ranks(train_all, 1, [config]) == [[STEPS]]
    # A run that never moved the temperature would show nothing of its rule.
    assert ranks(compare, 1, config)[0] > 1
