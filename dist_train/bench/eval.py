"""``dist-train bench eval``: budgeted evaluation against the public method's loop over images, written plainly; guarantees."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.arguments import Parser, positive
from dist_train.bench import writable
from dist_train.distributed.group import Group, Ranks
from dist_train.evaluation.samples import SampleCollector
from dist_train.prediction import budget, crossfit
from dist_train.prediction.risk import RISKS, Outputs, Target, certify

IMAGES, EXITS, CLASSES, BUDGETS = 50_000, 5, 1_000, 40
GUARANTEE_EXITS = 10
EPSILON = {"gap": 0.01, "consistency": 0.02, "error": 0.4, "cost": 0.5}
BATCH = 256
ROUNDS = 3


def run(arguments: Sequence[str] | None = None) -> int:
    """The verb ``dist-train bench eval``."""
    parser = Parser(prog="dist-train bench eval", description=__doc__)
    parser.add_argument("--json", type=writable, metavar="PATH", help="write the measurements to this file")
    parser.add_argument("--guarantees", action="store_true", help="time cross-fitted budgets and all guarantees alone")
    parser.add_argument("--images", type=positive, default=IMAGES, help=f"images (default: {IMAGES:,})")
    known = parser.parse_args(arguments)
    result = bench_guarantees(known.images) if known.guarantees else bench_eval(known.images)
    print(guarantees_text(result) if known.guarantees else text(result))
    if known.json is not None:
        known.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def bench_eval(images: int = IMAGES) -> dict[str, Any]:
    """Measure reduction of logits and fitting and applying of thresholds; the loop is timed for one of its budgets a round.

    Peak memory is the process's, from before to after the reduction and all curves, of which the loop is no part.
    """
    torch.manual_seed(0)
    before = _peak_bytes()
    start = time.perf_counter()
    scores, correct = _reduce(images)
    reduction = time.perf_counter() - start
    costs = np.linspace(0.34e9, 1.36e9, EXITS)
    sweep = range(1, BUDGETS + 1)
    budgets = np.linspace(costs[0], costs[-1], BUDGETS).tolist()
    ways: dict[str, Callable[[], Any]] = {
        "geometric": lambda: _curve(scores, correct, costs, budget.geometric(scores, sweep)),
        "optimal": lambda: _curve(scores, correct, costs, budget.optimal(scores, correct, costs, budgets)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory = 0
    loop = []
    confidences, flags = torch.from_numpy(scores), torch.from_numpy(correct)
    for number in range(ROUNDS):
        for name, way in ways.items():
            seconds[name].append(_seconds(way))
        # The kernel keeps the highest mark of the process, which never falls: only the first round can be told apart.
        memory = memory or _peak_bytes() - before
        # Every budget of the loop takes about as long; 40 in full would take many minutes.
        one = partial(per_image_loop, confidences, flags, costs.tolist(), 10 + 10 * number)
        loop.append(BUDGETS * _seconds(one))
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    whole = float(np.median(loop))
    return {
        "images": images,
        "exits": EXITS,
        "classes": CLASSES,
        "budgets": BUDGETS,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "reduction_seconds": reduction,
        "seconds": medians,
        "loop_seconds": whole,
        "times_faster": {name: whole / value for name, value in medians.items()},
        "peak_bytes": memory,
    }


def bench_guarantees(images: int = IMAGES) -> dict[str, Any]:
    """Seconds and memory of 40 cross-fitted budgets, and of every kind of guarantee, of so many images and 10 exits."""
    scores, predictions, labels = _outputs(images)
    outputs, costs = Outputs(scores, predictions, labels), np.linspace(0.2e9, 1.36e9, GUARANTEE_EXITS)
    budgets = np.linspace(costs[0], costs[-1], BUDGETS).tolist()
    before = _peak_bytes()
    seconds = {"budgets": _seconds(lambda: crossfit.fit(lambda _: scores, outputs.correct, costs, budgets))}
    for risk in RISKS:
        seconds[risk] = _seconds(partial(certify, outputs, costs, [Target(risk, EPSILON[risk])], 0.05))
    return {
        "images": images,
        "exits": GUARANTEE_EXITS,
        "budgets": BUDGETS,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "peak_bytes": _peak_bytes() - before,
        "process_peak_bytes": _peak_bytes(),
    }


def guarantees_text(result: dict[str, Any]) -> str:
    """The measurements of :func:`bench_guarantees` as a table."""
    return "\n".join(
        [
            f"{result['images']:,} images, {result['exits']} exits, {result['budgets']} budgets, {result['threads']} threads",
            *(f"  {name:<24} {seconds:>9.2f} s" for name, seconds in result["seconds"].items()),
            f"  all                      {result['total_seconds']:>9.2f} s",
            f"  memory                   {result['peak_bytes'] / 1e6:>9.0f} MB beyond the program's own, "
            f"{result['process_peak_bytes'] / 1e6:.0f} MB in all",
        ]
    )


def _outputs(images: int) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int64]]:
    """Confidence, predicted classes and labels of exits of rising skill on images of differing difficulty."""
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=images)
    skill = np.linspace(0.2, 1.2, GUARANTEE_EXITS) - 0.8 * rng.normal(size=(images, 1))
    skill = skill + 0.5 * rng.normal(size=(images, GUARANTEE_EXITS))
    wrong = (labels + rng.integers(1, CLASSES, size=images)) % CLASSES
    predictions = np.where(skill > 0.4, labels[:, None], wrong[:, None]).astype(np.int32)
    return (1 / (1 + np.exp(-np.abs(skill - 0.4)))).astype(np.float32), predictions, labels


def per_image_loop(
    scores: torch.Tensor, correct: torch.Tensor, costs: list[float], p: int
) -> tuple[torch.Tensor, float, float]:
    """The public method for one p, image by image on tensors as the public code does: thresholds, accuracy and cost.

    Args:
        scores: confidence, [N, M].
        correct: whether an exit is correct, bool [N, M].
        costs: of an exit, M numbers.
        p: of the sweep.
    """
    images, exits = scores.shape
    weights = torch.exp(torch.log(torch.tensor([p / 20])) * torch.arange(1, exits + 1, dtype=torch.float32))
    shares = weights / weights.sum()
    order = scores.sort(dim=0, descending=True, stable=True).indices
    left = torch.zeros(images, dtype=torch.bool)
    thresholds = torch.full((exits,), math.inf)
    thresholds[-1] = -math.inf
    for k in range(exits - 1):
        wanted, taken = math.floor(images * shares[k]), 0
        for rank in range(images):
            waiting = order[rank, k]
            if not left[waiting]:
                taken += 1
                if taken == wanted:
                    thresholds[k] = scores[waiting, k]
                    break
        left |= scores[:, k] >= thresholds[k]
    hits, spent = 0, 0.0
    for image in range(images):
        for k in range(exits):
            if scores[image, k] >= thresholds[k]:
                hits += int(correct[image, k])
                spent += costs[k]
                break
    return thresholds, hits / images, spent / images


def text(result: dict[str, Any]) -> str:
    """The measurements as a table."""
    lines = [
        f"{result['images']:,} images, {EXITS} exits, {CLASSES:,} classes, {BUDGETS} budgets, CPU, {result['threads']} threads",
        f"  logits to rows           {result['reduction_seconds']:>9.2f} s",
        f"  loop over images         {result['loop_seconds']:>9.2f} s",
    ]
    for name, seconds in result["seconds"].items():
        lines.append(f"  {name:<24} {seconds:>9.2f} s   {result['times_faster'][name]:>7.1f} times faster")
    return "\n".join(
        [*lines, f"  memory                   {result['peak_bytes'] / 1e6:>9.0f} MB beyond the program's own"]
    )


def _reduce(images: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Rows of logits that are made as they are used: later exits are more confident, and more often correct."""
    table = SampleCollector(images)
    for first in range(0, images, BATCH):
        ids = torch.arange(first, min(first + BATCH, images))
        labels = torch.randint(CLASSES, (len(ids),))
        hint = torch.nn.functional.one_hot(labels, CLASSES) * (4 * torch.rand(len(ids), 1) + 2)
        table.add(ids, labels, [torch.randn(len(ids), CLASSES) + hint * (1 + m / EXITS) for m in range(EXITS)])
    samples = table.join(Group(Ranks(0, 1, 0, 1), 1.0), EXITS, 0)
    return samples["max_probability"], samples["rank"] == 0


def _curve(
    scores: NDArray[np.float32], correct: NDArray[np.bool_], costs: NDArray[np.float64], thresholds: NDArray[np.float32]
) -> list[budget.Outcome]:
    return [budget.outcome(scores, correct, costs, row) for row in thresholds]


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _peak_bytes() -> int:
    # Linux gives kibibytes.
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
