"""What a training step costs compared with a bare loop: the same network, data, precision and objective."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from dist_train.arguments import Parser, positive
from dist_train.bench import writable
from dist_train.config_file import load_config
from dist_train.data.pipeline import GlobalBatch
from dist_train.distributed.group import Group, Ranks
from dist_train.distributed.watchdog import Watchdog
from dist_train.errors import ConfigError
from dist_train.loss.objective import ExitDistillation
from dist_train.models import build_model
from dist_train.precision import autocast
from dist_train.training.health import StopRequests
from dist_train.training.optim import build_optimizer
from dist_train.training.preflight import preflight
from dist_train.training.trainer import Trainer
from launch.local import start

BLOCKS = 7
"""Timed blocks per variant, taken in turn so that a slower moment of the machine meets all of them."""


def run(arguments: list[str]) -> int:
    """``dist-train bench step [--json PATH] [--processes 1 2] [--steps N] [--micro-batch N] [--section.key value]``."""
    parser = Parser("dist-train bench step", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=writable, metavar="PATH", help="write the figures there as well")
    parser.add_argument("--processes", type=positive, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--steps", type=positive, default=6, metavar="N", help="steps per timed block")
    parser.add_argument("--micro-batch", type=positive, default=64, metavar="N", help="images per process and step")
    known, overrides = parser.parse_known_args(arguments)
    results = []
    for processes in known.processes:
        with tempfile.TemporaryDirectory() as folder:
            shards = Path(folder) / "digits"
            subprocess.run(
                [sys.executable, "-m", "shards", "make", "digits", shards], check=True, stdout=subprocess.DEVNULL
            )

            code = start(
                processes,
                [str(folder), str(known.steps), str(known.micro_batch), *overrides],
                module="dist_train.bench.step",
            )
            if code:
                return code
            results.append(json.loads((Path(folder) / "result.json").read_text()))
    for result in results:
        print(_text(result))
    if known.json:
        known.json.write_text(
            json.dumps({"machine": platform.processor() or platform.machine(), "results": results}, indent=1)
        )
    return 0


def measure(folder: Path, steps: int, micro_batch: int, overrides: list[str]) -> None:
    """One rank of the measurement; rank 0 writes ``result.json`` into the folder."""
    ranks = Ranks.from_env()
    if ranks.device.type == "cpu":
        ranks.compute_on_cores()
    config_file = folder / "bench.yaml"
    fields = {
        "name": "bench",
        "runs": str(folder),
        "data": {"shards": str(folder / "digits"), "flip": False, "last_batch": "wrap"},
        "train": {"global_batch": micro_batch * ranks.world_size, "micro_batch": micro_batch},
        "tracking": {"uri": "off"},
        "checkpoint": {"every_epochs": None},
    }
    if ranks.rank == 0:
        config_file.write_text(json.dumps(fields))
    group = Group(ranks, 5)
    # The other ranks read what rank 0 has written.
    group.any_rank(True)
    config = load_config(config_file, *overrides)
    if config.loss.outside_teachers:
        raise ConfigError("the bare loop has no teachers from outside; leave out --loss.outside_teachers")
    torch.manual_seed(0)
    ready = preflight(config, ranks)
    with StopRequests() as requests:
        watch = Watchdog(config.faults, folder, ranks.rank, ranks.world_size)
        trainer = Trainer(config, ready, group, requests, watch)
        bare = _BareLoop(config, len(ready.train.classes), group)
        feed = _Feed(trainer, steps)
        variants: dict[str, Callable[[], None]] = {
            "bare loop": lambda: bare.steps(feed.micro, steps),
            "dist_train, data in memory": lambda: feed.run(memory=True),
            "dist_train, data from shards": lambda: feed.run(memory=False),
        }
        times: dict[str, list[float]] = {name: [] for name in variants}
        for block in range(BLOCKS + 1):
            for name, variant in variants.items():
                # All ranks begin together; the wait for a slow one of the last variant would else count in this one.
                group.any_rank(True)
                start = time.perf_counter()
                variant()
                if ranks.device.type == "cuda":
                    torch.cuda.synchronize()
                if block:  # the first one warms up
                    times[name].append((time.perf_counter() - start) / steps)
        feed.close()
    if ranks.rank == 0:
        images = config.train.global_batch
        medians = {name: statistics.median(values) for name, values in times.items()}
        result = {
            "device": ranks.device.type,
            "processes": ranks.world_size,
            "micro_batch": micro_batch,
            "zero": config.train.zero_stage,
            "precision": config.train.precision,
            "images_per_second": {n: images / m for n, m in medians.items()},
            "ratio_memory_to_bare": medians["bare loop"] / medians["dist_train, data in memory"],
            "ratio_shards_to_memory": medians["dist_train, data in memory"] / medians["dist_train, data from shards"],
        }
        (folder / "result.json").write_text(json.dumps(result))


class _BareLoop:
    """What one would write by hand: DistributedDataParallel, autocast, a torch optimizer, the objective's loss."""

    def __init__(self, config: Any, num_classes: int, group: Any) -> None:
        from torch.nn.parallel import DistributedDataParallel

        network = build_model(config.model, num_classes, config.data.image_size).to(group.device)
        self.optimizer = build_optimizer(network, config.optim)
        self.network: torch.nn.Module = DistributedDataParallel(network) if group.ranks.world_size > 1 else network
        self.criterion = ExitDistillation(config.loss, network.num_exits).to(group.device)
        self.autocast: Callable[[], AbstractContextManager[Any]] = lambda: autocast(
            config.train.precision, group.device
        )

    def steps(self, micro: Any, count: int) -> None:
        for _ in range(count):
            with self.autocast():
                logits = self.network(micro.images)
            loss = self.criterion(logits, micro.labels).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class _Feed:
    """Hands the trainer a fixed number of global batches: always the same tensors, or what its own loader reads."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.trainer = trainer
        self.steps = steps
        self.batches = self._forever()
        self.micro = next(iter(next(self.batches)))
        trainer.engine.train_mode()

    def run(self, memory: bool) -> None:
        size = self.trainer.config.train.global_batch
        for number in range(self.steps):
            self.trainer.step(GlobalBatch(number, size, iter([self.micro])) if memory else next(self.batches))

    def close(self) -> None:
        self.batches.close()
        self.trainer.close("FINISHED")

    def _forever(self) -> Generator[GlobalBatch, None, None]:
        epoch = 0
        while True:
            yield from self.trainer.loader.epoch(epoch)
            epoch += 1


def _text(result: dict[str, Any]) -> str:
    title = (
        f"{result['processes']} x {result['device']}, micro batch {result['micro_batch']}, {result['precision']}, "
        f"ZeRO {result['zero']}"
    )
    lines = [title] + [f"  {name:<24} {speed:8.1f} images/s" for name, speed in result["images_per_second"].items()]
    lines.append(f"  in memory / bare loop            {result['ratio_memory_to_bare']:.3f}")
    lines.append(f"  from shards / in memory          {result['ratio_shards_to_memory']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
