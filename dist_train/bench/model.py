"""How fast a training step is with the default settings, how many operators it calls, and what early exit saves, for the
paper's two MSDNets.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.arguments import Parser, positive
from dist_train.bench import writable
from dist_train.bench.operators import count_operators
from dist_train.bench.peer import load_peer
from dist_train.config import LossConfig, OptimConfig
from dist_train.distributed.group import Ranks
from dist_train.loss.objective import ExitDistillation
from dist_train.models.cost import exit_costs
from dist_train.models.msdnet import MSDNet
from dist_train.models.network import MultiExitNetwork
from dist_train.precision import autocast
from dist_train.prediction.stopping import at_exit, predict
from dist_train.training.optim import build_optimizer

BLOCKS = 5
"""Timed blocks per variant, taken in turn so that a slower moment of the machine meets all of them."""

# The 7-exit network of the paper's anytime CIFAR experiments, and the 5-exit one for ImageNet with steps of 4.
NETWORKS: dict[str, dict[str, Any]] = {
    "cifar": {"num_classes": 100, "image_size": 32, "batch": 64},
    "imagenet": {
        "num_classes": 1000,
        "image_size": 224,
        "batch": 16,
        "exits": 5,
        "scales": 4,
        "growth": 16,
        "growth_factors": (1, 2, 4, 4),
        "bottleneck_factors": (1, 2, 4, 4),
        "initial_channels": 32,
        "base": 4,
        "step": 4,
        "head_width": None,
        "stem": 224,
    },
}


def run(arguments: list[str]) -> int:
    """``dist-train bench model [--json PATH] [--networks cifar imagenet] [--steps N] [--batch N] [--peer CHECKOUT]``."""
    parser = Parser("dist-train bench model", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=writable, metavar="PATH", help="write the figures there as well")
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--steps", type=positive, default=3, metavar="N", help="training steps per timed block")
    parser.add_argument("--batch", type=positive, metavar="N", help="images per training step (default: 64 and 16)")
    parser.add_argument(
        "--peer",
        type=Path,
        metavar="CHECKOUT",
        help="a checkout of kalviny/MSDNet-PyTorch: train its network in turns with ours",
    )
    known = parser.parse_args(arguments)

    ranks = Ranks.from_env()
    if ranks.device.type == "cpu":
        ranks.compute_on_cores()
    results = []
    for name in known.networks:
        results.append(_measure(name, ranks.device, known.steps, known.batch, known.peer))
        print(_text(results[-1]), flush=True)
    if known.json:
        machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        known.json.write_text(json.dumps({**machine, "device": ranks.device.type, "results": results}, indent=1))
    return 0


def _measure(name: str, device: torch.device, steps: int, batch: int | None, peer: Path | None) -> dict[str, Any]:
    fields = dict(NETWORKS[name])
    classes, size, usual = (fields.pop(key) for key in ("num_classes", "image_size", "batch"))
    torch.manual_seed(0)
    network = MSDNet(classes, **fields).to(device)
    networks: dict[str, nn.Module] = {"": network}
    if peer is not None:
        networks["peer, "] = load_peer(peer, fields).to(device)
    images = torch.randn(batch or usual, 3, size, size, device=device)
    labels = torch.randint(classes, (len(images),), device=device)
    training = _training(networks, network.num_exits, images, labels, steps)
    return {"network": name, **training, "stopping": {n: _stopping(network, size, n) for n in (64, 1)}}


def _training(
    networks: Mapping[str, nn.Module], num_exits: int, images: Tensor, labels: Tensor, steps: int
) -> dict[str, Any]:
    """Images per second and operators of a step: plain, with the defaults of a run, and (on a GPU) with train.compile as well.

    Args:
        networks: by what stands before the name of a setting. All take the same step: objective, optimizer, precision.
    """
    device = images.device
    defaults = images.contiguous(memory_format=torch.channels_last)
    settings: dict[str, tuple[Tensor, str, bool]] = {
        "plain": (images, "fp32", False),
        "channels_last": (defaults, "fp32", False),
        "default": (defaults, "bf16", False),
    }
    if device.type == "cuda":
        settings["default, compiled"] = (defaults, "bf16", True)
    variants = {}
    for name, (given, precision, compiled) in settings.items():
        for owner, network in networks.items():
            # A copy for each, since training moves its weights.
            variants[owner + name] = _stepper(
                copy.deepcopy(network).train(),
                num_exits,
                given,
                labels,
                functools.partial(autocast, precision, device),
                compiled,
            )
    times: dict[str, list[float]] = {name: [] for name in variants}
    for block in range(BLOCKS + 1):
        for name, step in variants.items():
            start = _now(device)
            for _ in range(steps if block else 1):
                step()
            if block:  # the first one warms up
                times[name].append((_now(device) - start) / steps)
    speeds = {name: len(images) / statistics.median(values) for name, values in times.items()}
    operators = {name: count_operators(step) for name, step in variants.items() if "compiled" not in name}
    return {
        "batch": len(images),
        "images_per_second": speeds,
        "operators": operators,
        "ratio": speeds["default"] / speeds["plain"],
    }


def _stepper(
    network: nn.Module,
    num_exits: int,
    images: Tensor,
    labels: Tensor,
    precision: Callable[[], contextlib.AbstractContextManager[Any]],
    compiled: bool,
) -> Callable[[], None]:
    """One training step: forward, the objective, backward, update."""
    optimizer = build_optimizer(network, OptimConfig(lr=1e-4))
    criterion = ExitDistillation.from_config(LossConfig(), num_exits).to(images.device)
    forward = torch.compile(network) if compiled else network

    def step() -> None:
        with precision():
            logits = forward(images)
        criterion(logits, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _stopping(network: MultiExitNetwork, size: int, batch: int) -> list[dict[str, float]]:
    """Milliseconds when all images stop at exit 1, 2, ..., beside the share of the multiply-adds that this is."""
    num_exits = network.num_exits
    device = next(network.parameters()).device
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    costs = [cost.macs for cost in exit_costs(network, size, lazy=True)]
    network.eval()
    times: list[list[float]] = [[] for _ in costs]
    for block in range(BLOCKS + 1):
        for number in range(num_exits):
            start = _now(device)
            predict(network, images, at_exit(number + 1, num_exits))
            if block:
                times[number].append(1000 * (_now(device) - start))
    medians = [statistics.median(values) for values in times]
    return [
        {"exit": number, "milliseconds": ms, "share": ms / medians[-1], "share_of_multiply_adds": cost / costs[-1]}
        for number, (ms, cost) in enumerate(zip(medians, costs), start=1)
    ]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _text(result: dict[str, Any]) -> str:
    lines = [f"MSDNet ({result['network']}), training step of {result['batch']} images"]
    for name, speed in result["images_per_second"].items():
        operators = result["operators"].get(name)
        lines.append(f"  {name:<22} {speed:9.1f} images/s" + (f"  {operators:5d} operators" if operators else ""))
    lines.append(f"  default / plain        {result['ratio']:9.2f}")
    for batch, exits in result["stopping"].items():
        lines.append(f"  all of a batch of {batch} stop at exit")
        lines += [
            f"    {e['exit']}  {e['milliseconds']:9.2f} ms, {100 * e['share']:5.1f} % of all exits; multiply-adds "
            f"{100 * e['share_of_multiply_adds']:5.1f} %"
            for e in exits
        ]
    return "\n".join(lines)
