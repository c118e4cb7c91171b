"""Faults at random moments, until every run has ended: each ending is compared with that of the undisturbed run, bit for bit.

    python tests/campaign.py --faults 100 --seed 0 --json campaign.json

Not part of the normal suite, which runs a short one.  A trial is one run of a configuration that is drawn from the seed;
while it trains, faults of drawn kinds hit it at drawn moments, and it is started again until it finishes.  The faults of
disks and file systems mount, so they want root; the clock that is set back is that of tests/clock.c, so it wants cc.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from dist_train.config_file import dump_config, make_config  # noqa: E402
from dist_train.errors import UserError  # noqa: E402
from dist_train.tracking.metrics import OF_THE_MACHINE, read_metrics  # noqa: E402
from dist_train.tracking.mirror import sync  # noqa: E402
from dist_train.training import checkpoint  # noqa: E402
from tests.common import SMALL_MODEL, MLflowServer  # noqa: E402

STEPS = 40
DISK_KILOBYTES = 6000
PATIENCE = 300.0
"""Seconds within which a run has to end, or to resume, after a fault."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run is, as far as resuming depends on it."""

    ranks: int
    zero_stage: int
    precision: str
    ema: bool
    accumulation: int

    @property
    def name(self) -> str:
        ema = "-ema" if self.ema else ""
        return f"{self.ranks}ranks-zero{self.zero_stage}-{self.precision}{ema}-x{self.accumulation}"

    @classmethod
    def draw(cls, dice: random.Random) -> Setting:
        ranks, stage = dice.choice([1, 2]), dice.randrange(4)
        return cls(ranks, stage, dice.choice(["fp32", "bf16"]), dice.random() < 0.5, dice.choice([1, 2]))


class Trial:
    """One run in a folder of its own, with what is needed to disturb it."""

    def __init__(self, folder: Path, shards: Path, setting: Setting, server: MLflowServer | None) -> None:
        self.folder, self.shards, self.setting, self.server = folder, shards, setting, server
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "run.yaml"
        fields = {
            "name": "run", "runs": str(folder), "data": {"shards": str(shards), "flip": False}, "model": SMALL_MODEL,
            "optim": {"lr": 0.05, "ema_decay": 0.9 if setting.ema else None},
            "train": {
                "global_batch": 32, "micro_batch": 32 // setting.ranks // setting.accumulation, "epochs": 2, "max_steps": STEPS,
                "zero_stage": setting.zero_stage, "precision": setting.precision,
            },
            "checkpoint": {"every_steps": 7, "keep": 2},
            "tracking": {"log_every": 5, "uri": server.uri if server else "off"},
            "faults": {"timeout_minutes": 0.2, "first_step_minutes": 2},
        }  # fmt: skip
        self.config.write_text(dump_config(make_config(fields)))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def clock(self) -> Path:
        return self.folder / "clock"

    def start(self) -> None:
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if self.clock.exists():
            environment |= {"LD_PRELOAD": str(self.shards.parent / "clock.so"), "CLOCK_SHIFT": str(self.clock)}
        words = [sys.executable, "-m", "launch.local", "-n", str(self.setting.ranks), str(self.config)]
        with (self.folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                words, cwd=ROOT, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
                env=os.environ | environment,
            )  # fmt: skip

    def ranks(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            words, environment = process.info["cmdline"] or [], process.info["environ"] or {}
            if str(self.config) in words and "RANK" in environment:
                found.append(process)
        return found

    def processes(self) -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if str(self.config) in (p.info["cmdline"] or [])]

    def wait(self) -> int:
        """The launcher's exit code, once all of its processes are gone."""
        assert self.process
        code = self.process.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while self.processes():
            if time.monotonic() > deadline:
                raise AssertionError(f"processes are left: {[p.info['cmdline'] for p in self.processes()]}")
            time.sleep(0.1)
        return code

    def clean_up(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def kill_rank(trial: Trial, dice: random.Random) -> None:
    if ranks := trial.ranks():
        dice.choice(ranks).kill()


def kill_launcher(trial: Trial, dice: random.Random) -> None:
    assert trial.process
    trial.process.kill()


def kill_all(trial: Trial, dice: random.Random) -> None:
    for process in trial.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def send(number: signal.Signals) -> Callable[[Trial, random.Random], None]:
    def fault(trial: Trial, dice: random.Random) -> None:
        assert trial.process
        trial.process.send_signal(number)

    return fault


def freeze_rank(trial: Trial, dice: random.Random) -> None:
    if ranks := trial.ranks():
        rank = dice.choice(ranks)
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.suspend()
            time.sleep(dice.uniform(0.5, 3))
            rank.resume()


def fill_disk(trial: Trial, dice: random.Random) -> None:
    filler = trial.folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    time.sleep(dice.uniform(0.5, 3))
    filler.unlink()


def hide(folder: Path, dice: random.Random) -> None:
    """Put an empty folder that nobody can write to in the place of one for a while, as when its server has gone away."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], check=True)
    time.sleep(dice.uniform(0.5, 3))
    subprocess.run(["umount", "-l", str(folder)], check=True)


def lose_runs(trial: Trial, dice: random.Random) -> None:
    hide(trial.folder, dice)


def lose_data(trial: Trial, dice: random.Random) -> None:
    hide(trial.shards, dice)


def stop_mlflow(trial: Trial, dice: random.Random) -> None:
    assert trial.server
    trial.server.signal(signal.SIGKILL)
    time.sleep(dice.uniform(0.5, 3))
    trial.server.start()


def set_clock_back(trial: Trial, dice: random.Random) -> None:
    trial.clock.write_text(f"-{dice.randrange(60, 86400)}")


MOUNTING = {"fill the disk", "lose the run's file system", "lose the data's file system"}
FAULTS: dict[str, Callable[[Trial, random.Random], None]] = {
    "kill a rank": kill_rank, "kill the launcher": kill_launcher, "kill all": kill_all, "SIGTERM": send(signal.SIGTERM),
    "SIGHUP": send(signal.SIGHUP), "SIGINT": send(signal.SIGINT), "freeze a rank": freeze_rank, "fill the disk": fill_disk,
    "lose the run's file system": lose_runs, "lose the data's file system": lose_data, "stop MLflow": stop_mlflow,
    "set the clock back": set_clock_back,
}  # fmt: skip


def ending(run: Path) -> dict[str, Any]:
    """Everything that a run leaves and that must not depend on faults: every tensor, the state, the metrics, the files."""
    newest = run / "checkpoints" / checkpoint.step_name(checkpoint.newest_step(run))
    checkpoint.verify(newest)
    state = json.loads((newest / "state.json").read_text())
    lines = [
        (e["step"], e["batch"], {k: v for k, v in e["metrics"].items() if not k.startswith(OF_THE_MACHINE)})
        for e in read_metrics(run / "metrics.jsonl")
    ]  # fmt: skip
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if not path.is_dir() or path.is_symlink())
    tensors = {
        f"{file.stem}:{name}": tensor
        for file in newest.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    return {
        "tensors": tensors,
        "state": {key: state[key] for key in ("progress", "loss", "averages_updates", "finished", "classes")},
        "metrics": lines,
        "files": [name for name in files if not name.startswith(("log/", "faults/", "checkpoints/step-"))],
    }


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """In what two endings differ."""
    wrong = [
        f"{key}: {found[key]} instead of {expected[key]}"[:400]
        for key in ("state", "files")
        if found[key] != expected[key]
    ]
    left, right = expected["tensors"], found["tensors"]
    if left.keys() != right.keys():
        wrong.append(f"tensors: {sorted(left.keys() ^ right.keys())[:5]}")
    else:
        wrong += [f"tensor {name} differs" for name in left if not torch.equal(left[name], right[name])][:3]
    if expected["metrics"] != found["metrics"]:
        pairs = zip(expected["metrics"], found["metrics"])
        first = next((pair for pair in pairs if pair[0] != pair[1]), (len(expected["metrics"]), len(found["metrics"])))
        wrong.append(f"metrics: {first}"[:600])
    return wrong


def missing_in_mlflow(run: Path) -> list[str]:
    """Points of metrics.jsonl that MLflow lacks, or has twice, once everything was sent."""
    from mlflow.tracking import MlflowClient

    sent = sync(run)
    client = MlflowClient(tracking_uri=sent.uri)
    wrong = [] if sent.status == "FINISHED" else [f"MLflow says {sent.status}"]
    lines = read_metrics(run / "metrics.jsonl")
    for key in sorted({key for line in lines for key in line["metrics"]}):
        expected = [(line["step"], line["metrics"][key]) for line in lines if key in line["metrics"]]
        found = sorted((point.step, point.value) for point in client.get_metric_history(sent.run_id, key))
        if key.startswith(OF_THE_MACHINE):  # of a step that was computed twice MLflow has the first time
            expected, found = ([(step, 0.0) for step, _ in points] for points in (expected, found))
        if found != sorted(expected):
            wrong.append(f"MLflow has {found} of {key} instead of {expected}"[:400])
    return wrong[:3]


class Campaign:
    """Trials until so many faults have hit."""

    def __init__(self, folder: Path, seed: int, kinds: list[str]) -> None:
        self.folder, self.kinds = folder, kinds
        self.dice = random.Random(seed)
        self.shards = folder / "digits"
        words = [sys.executable, "-m", "shards", "make", "digits", str(self.shards)]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
        self.server: MLflowServer | None = None
        if "stop MLflow" in kinds:
            self.server = MLflowServer(folder)
            self.server.start()
        if "set the clock back" in kinds:
            words = ["cc", "-shared", "-fPIC", "-o", str(folder / "clock.so"), str(ROOT / "tests" / "clock.c"), "-ldl"]
            subprocess.run(words, check=True)
        self.expected: dict[Setting, dict[str, Any]] = {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def reference(self, setting: Setting) -> dict[str, Any]:
        if setting not in self.expected:
            trial = Trial(self.folder / "reference" / setting.name, self.shards, setting, self.server)
            trial.start()
            assert trial.wait() == 0, (trial.folder / "output.txt").read_text()[-2000:]
            self.expected[setting] = ending(trial.run)
        return self.expected[setting]

    def trial(self, number: int, faults: int) -> int:
        """One run with up to so many faults; returns how many hit it."""
        setting = Setting.draw(self.dice)
        expected = self.reference(setting)
        folder = self.folder / f"trial{number}"
        folder.mkdir()
        mounted = not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_KILOBYTES}k", "tmpfs", str(folder)], capture_output=True
        ).returncode
        trial, hit = Trial(folder, self.shards, setting, self.server), []
        if "set the clock back" in self.kinds:
            trial.clock.write_text("0")
        try:
            while True:
                trial.start()
                if len(hit) < faults:
                    kind = self.dice.choice([k for k in self.kinds if mounted or k not in MOUNTING])
                    if self._strike(trial, kind):
                        hit.append(kind)
                        self.counts[kind] += 1
                if trial.wait() == 0:
                    break
            problems = differences(expected, ending(trial.run))
            if self.server:
                problems += missing_in_mlflow(trial.run)
        except (AssertionError, subprocess.TimeoutExpired, OSError, UserError) as error:
            problems = [f"{type(error).__name__}: {error}"[:2000], (folder / "output.txt").read_text()[-3000:]]
        finally:
            trial.clean_up()
            if mounted:
                subprocess.run(["umount", "-l", str(folder)], check=True)
        what = f"trial {number}: {setting.name}: {', '.join(hit) or 'no fault'}"
        print(f"{what}: {'identical' if not problems else '; '.join(problems)}", flush=True)
        if problems:
            self.wrong.append(f"{what}: {'; '.join(problems)}")
        shutil.rmtree(folder, ignore_errors=True)
        return len(hit)

    def _strike(self, trial: Trial, kind: str) -> bool:
        """Wait for the ranks, and then for a drawn time, and strike; false where the run has ended before."""
        assert trial.process
        while not trial.ranks():
            if trial.process.poll() is not None:
                return False
            time.sleep(0.02)
        # Imports take seconds in which nothing is to be lost; most faults are to hit training and saving.
        time.sleep(self.dice.choice([self.dice.uniform(0, 3), self.dice.uniform(3, 8)]))
        if trial.process.poll() is not None:
            return False
        FAULTS[kind](trial, self.dice)
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="faults in all (default: 100)")
    parser.add_argument(
        "--per-run", type=int, default=5, help="faults that one run has to survive at most (default: 5)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(FAULTS), default=list(FAULTS), metavar="KIND")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result there as well")
    known = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        campaign, trials = Campaign(Path(name), known.seed, known.kinds), 0
        while (hit := sum(campaign.counts.values())) < known.faults:
            campaign.trial(trials, min(known.per_run, known.faults - hit))
            trials += 1
        if campaign.server:
            campaign.server.signal(signal.SIGKILL)
    minutes = (time.monotonic() - begun) / 60
    print(
        f"{sum(campaign.counts.values())} faults in {trials} runs, {len(campaign.wrong)} endings differ, {minutes:.0f} minutes"
    )
    for kind, count in sorted(campaign.counts.items()):
        print(f"  {count:>4}  {kind}")
    result = {
        "faults": dict(campaign.counts),
        "runs": trials,
        "wrong": campaign.wrong,
        "minutes": minutes,
        "seed": known.seed,
    }
    if known.json:
        known.json.write_text(json.dumps(result, indent=1))
    return 1 if campaign.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
