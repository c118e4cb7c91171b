"""The method's claim where labels are few: distillation against the exit-wise baseline at the same scale of the label loss.

python tests/benchmarks/few_labels.py digits OUT
python tests/benchmarks/few_labels.py cifar10 OUT IMAGES       (IMAGES: train/ and test/ of class folders)

Every arm is trained with five seeds, a process per core at a time, and evaluated on the same images.  The same command
again goes on where it was.  It ends with a table: mean and standard deviation of top-1 over the seeds, per exit.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from tests.common import ROOT

SEEDS = range(5)


def arms(kind: str, out: Path, images: str | None) -> tuple[Path, dict[str, list[str]]]:
    """Configuration and, by arm, its overrides; makes the shards that they need."""
    if kind == "digits":
        shards(out / "few", "digits", "--per-class", "10")
        shards(out / "semi", "digits", "--labels-per-class", "10")
        few = f"--data.shards {out / 'few'} --train.epochs 220 --train.global_batch 50 --train.micro_batch 50".split()
        # As many labeled images per update, and as many updates, as the other arms have.
        semi = (
            f"--data.shards {out / 'semi'} --data.labeled_fraction 0.5 --train.epochs 17 --train.max_steps 440".split()
        )
        semi += ["--train.global_batch", "100", "--train.micro_batch", "100"]
        return ROOT / "configs" / "quickstart.yaml", {
            "labels alone": [*few, "--loss.teachers", "none"],
            "labels, distilled": [*few, "--loss.teachers", "last"],
            "labels and unlabeled images, distilled": [*semi, "--loss.teachers", "last"],
        }
    shards(out / "few", "folder", images or "", "--per-class", "150", "--val-per-class", "50")
    common = f"--data.shards {out / 'few'} --data.val test --train.epochs 150".split()
    common += ["--train.global_batch", "50", "--train.micro_batch", "50"]
    return ROOT / "configs" / "cifar10_laptop.yaml", {
        "labels alone": [*common, "--loss.teachers", "none"],
        "labels, distilled": [*common, "--loss.teachers", "last"],
    }


def shards(folder: Path, source: str, *options: str) -> None:
    if not folder.exists():
        given = [options[0], str(folder), *options[1:]] if source == "folder" else [str(folder), *options]
        subprocess.run([sys.executable, "-m", "shards", "make", source, *given], cwd=ROOT, check=True)


def run(config: Path, out: Path, name: str, seed: int, overrides: list[str], cores: Queue[int]) -> list[float]:
    """Train one cell, if that has not happened, on a core of its own; returns top-1 per exit."""
    folder = out / "runs" / name
    report = folder / "report.json"
    if not report.exists():
        core = cores.get()
        words = [sys.executable, "-m", "dist_train", "train", str(config), "--name", name, "--runs", str(out / "runs")]
        words += [
            "--seed",
            str(seed),
            "--train.eval_every",
            "1000",
            "--checkpoint.every_epochs",
            "null",
            "--tracking.uri",
            "off",
        ]
        with (out / f"{name}.log").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            subprocess.run(
                ["taskset", "-c", str(core), *words, *overrides],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=environment,
                check=True,
            )
        cores.put(core)
    return [100 * one["top1"] for one in json.loads(report.read_text())["exits"]]


def main(kind: str, out: str, images: str | None = None) -> None:
    folder = Path(out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    config, by_arm = arms(kind, folder, images)
    cores: Queue[int] = Queue()
    for core in os.sched_getaffinity(0):
        cores.put(core)
    with ThreadPoolExecutor(cores.qsize()) as pool:
        cells = {
            arm: [
                pool.submit(
                    run, config, folder, f"{arm.replace(' ', '-').replace(',', '')}-{seed}", seed, overrides, cores
                )
                for seed in SEEDS
            ]
            for arm, overrides in by_arm.items()
        }
    results = {arm: [cell.result() for cell in row] for arm, row in cells.items()}
    exits = len(next(iter(results.values()))[0])
    print("| arm | " + " | ".join(f"exit {number + 1}" for number in range(exits)) + " |\n|---" + "|---" * exits + "|")
    baseline = next(iter(results.values()))
    for arm, runs in results.items():
        print(f"| {arm} | " + " | ".join(spread([one[m] for one in runs]) for m in range(exits)) + " |")
    for arm, runs in list(results.items())[1:]:
        gains = [[one[m] - base[m] for one, base in zip(runs, baseline)] for m in range(exits)]
        print(f"| gain: {arm} | " + " | ".join(spread(gain, sign=True) for gain in gains) + " |")


def spread(values: list[float], sign: bool = False) -> str:
    return f"{statistics.mean(values):{'+' if sign else ''}.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    main(*sys.argv[1:])
