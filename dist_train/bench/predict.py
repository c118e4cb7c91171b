"""How fast an early-exit network predicts here: to each exit, by its policy, and beside networks that have no early exit."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.arguments import Parser
from dist_train.bench import writable
from dist_train.bench.runtimes import Exits, Runtime, TorchRuntime
from dist_train.errors import ConfigError
from dist_train.evaluation.thresholds import OperatingPoint, point_for_budget, point_for_risk
from dist_train.export import policy as policies
from dist_train.export.programs import EXPORTERS, check_installed
from dist_train.files import write_whole
from dist_train.models.cost import exit_costs
from dist_train.models.stages import static_networks
from dist_train.prediction.shares import Reference
from dist_train.prediction.stopping import Thresholds
from dist_train.prediction.timing import OtherWork, busy_warning, conditions
from dist_train.render.page import page, paragraph, section
from dist_train.render.table import Table
from dist_train.training import checkpoint

ROUNDS = 100
FEWEST = 5
"""Rounds of each combination: at most, and at least, however long they take."""
GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, modulo 1, are spread evenly however many they are."""


Works = dict[tuple[str, int | None], Callable[[], None]]
"""What is timed, by the kind and exit of its row."""


@dataclass(frozen=True)
class Row:
    """Times of a batch, in milliseconds.

    ``kind`` is exit (all images leave at exit ``exit``, from 1), policy (shares of the images leave at each), or static (the
    network cut off behind the exit, without the exits before it).  ``spread`` is half of the distance between the quartiles.
    """

    kind: str
    exit: int | None
    mean: float
    p50: float
    p95: float
    p99: float
    spread: float
    images_per_second: float


@dataclass(frozen=True)
class Combination:
    """All times of a runtime with a number of threads and a batch size, and what follows from them."""

    runtime: str
    threads: int
    batch: int
    precision: str
    rounds: int
    rows: list[Row]
    others: float
    """Share of the machine's processor time that other processes took meanwhile."""

    def row(self, kind: str, exit_: int | None = None) -> Row:
        """One of the rows; the exit counts from 1."""
        return next(row for row in self.rows if (row.kind, row.exit) == (kind, exit_))

    @property
    def exits(self) -> int:
        """Exits M."""
        return sum(row.kind == "exit" for row in self.rows)

    @property
    def routing(self) -> float:
        """What exits cost where no image leaves early, in milliseconds of a batch: heads, decisions, handing on; of medians."""
        return self.row("exit", self.exits).p50 - self.row("static", self.exits).p50

    @property
    def break_even(self) -> list[float | None]:
        """Per early exit: the share of images that must leave there, the others at the end, to be no slower than without exits.

        None where no share suffices.
        """
        last = self.row("exit", self.exits).p50
        shares: list[float | None] = []
        for number in range(1, self.exits):
            saved = last - self.row("exit", number).p50
            share = max(0.0, self.routing / saved) if saved > 0 else np.inf
            shares.append(share if share <= 1 else None)
        return shares

    @property
    def title(self) -> str:
        """What the times depend on, in words."""
        return f"{self.runtime}, {conditions(self.precision, self.threads, self.batch, 'cpu')}, {self.rounds} rounds"

    def verdict(self, accuracy: Sequence[float] | None, policy_accuracy: float | None) -> str:
        """Whether the policy is faster than a network without early exits that is as accurate, in words; empty without a policy.

        Means are compared: the median image of a policy is not what an image costs on average.

        Args:
            accuracy: of every exit, or None where it is not known: then that network is the whole one.
            policy_accuracy: of the policy, on the same images.
        """
        if not any(row.kind == "policy" for row in self.rows):
            return ""
        rivals = [self.exits]
        if accuracy is not None and policy_accuracy is not None:
            rivals += [number for number, top1 in enumerate(accuracy, start=1) if top1 >= policy_accuracy]
        rival = min(rivals, key=lambda number: self.row("static", number).mean)
        policy, static = self.row("policy").mean, self.row("static", rival).mean
        name = "the whole network" if rival == self.exits else f"the network cut off at exit {rival}, no less accurate,"
        if policy >= static:
            return f"early exit does not pay here: {name} takes {static:.2f} ms, the policy {policy:.2f} ms"
        return f"early exit pays here: {static / policy:.2f} times as fast as {name} without exits"


@dataclass(frozen=True)
class Subject:
    """What is measured: runtimes of one network, the share of images that its policy lets leave at each exit, and what is known of it."""

    runtimes: Sequence[Runtime]
    exits: int
    image_size: int
    shares: Sequence[float] | None
    accuracy: Sequence[float] | None = None
    policy_accuracy: float | None = None


def run(arguments: Sequence[str] | None = None) -> int:
    """The verb ``dist-train bench predict``."""
    known = _parser().parse_args(arguments)
    batches, threads = _numbers("--batch", known.batch), _numbers("--threads", known.threads)
    # Each count once: on one core, 1 and all are the same.
    threads = list(dict.fromkeys(count or len(os.sched_getaffinity(0)) for count in threads))
    found = []
    with _subject(known) as subject:
        for runtime in subject.runtimes:
            for count in threads:
                for batch in batches:
                    found.append(_measure(runtime, subject, count, batch, known.seconds))
                    print(f"{_text(found[-1], subject)}\n", flush=True)
    if known.json:
        write_whole(known.json, json.dumps(to_json(found, subject), indent=1) + "\n")
    if known.html:
        write_whole(known.html, _html(found, subject, known.path))
    return 0


def _parser() -> Parser:
    parser = Parser("dist-train bench predict", description=__doc__, allow_abbrev=False)
    parser.add_argument("path", metavar="RUN|EXPORT", help="run folder or checkpoint, or folder of an export")
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument("--budget", metavar="B", help="of a run: the policy is that of its report for this budget")
    policy.add_argument("--risk", metavar="NAME", help="of a run: the policy is the certified one of its report")
    policy.add_argument("--shares", metavar="S,S,...", help="of a run: share of images that leave at each exit")
    parser.add_argument("--batch", default="1,8,64", metavar="N,N,...", help="batch sizes (default: 1,8,64)")
    parser.add_argument("--threads", default="1,0", metavar="N,N,...", help="threads; 0 is all (default: 1,0)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="for each combination, or longer for 5 rounds (default: 20)",
    )
    parser.add_argument("--compile", action="store_true", help="of a run: also with torch.compile, which takes minutes")
    parser.add_argument("--json", type=writable, metavar="PATH", help="write the times there")
    parser.add_argument("--html", type=writable, metavar="PATH", help="write a page there")
    return parser


@contextlib.contextmanager
def _subject(known: Any) -> Iterator[Subject]:
    """The network of an export or of a run, for as long as its temporary programs exist."""
    if (Path(known.path) / policies.NAME).exists():
        if known.budget or known.risk or known.shares or known.compile:
            raise ConfigError(
                f"{known.path} is an export, which has its policy; --budget, --risk, --shares and --compile are for runs"
            )
        yield _exported(Path(known.path))
        return
    with tempfile.TemporaryDirectory() as folder:
        yield _of_run(known, Path(folder))


def _exported(folder: Path) -> Subject:
    check_installed()
    from dist_train.bench.exported import ExportRuntime  # which needs what check_installed looks for

    runtime = ExportRuntime(folder)
    policy, parity = runtime.policy, runtime.policy["parity"]
    labeled = parity["policy_top1"] is not None
    return Subject(
        [runtime],
        len(policy["stages"]),
        policy["preprocessing"]["crop"],
        parity["policy_shares"],
        parity["top1"] if labeled else None,
        parity["policy_top1"],
    )


def _of_run(known: Any, folder: Path) -> Subject:
    path = checkpoint.find(known.path)
    meta, config = checkpoint.read_meta(path)
    network = checkpoint.load_model(path)
    point = _point(known, network.num_exits)
    size = config.data.image_size
    staged, cut = network.staged(size), static_networks(network, size)
    runtimes: list[Runtime] = [TorchRuntime(staged, cut, point.policy)]
    if known.compile:
        runtimes.append(TorchRuntime(staged, cut, point.policy, compiled=True))
    if all(map(importlib.util.find_spec, EXPORTERS)):
        costs = [cost.macs for cost in exit_costs(network, size, lazy=True)]
        content = policies.content(point, costs, meta.classes, config, meta.progress.step, {})
        from dist_train.bench.exported import exported_runtimes

        runtimes += exported_runtimes(staged, size, content, folder)
        if importlib.util.find_spec("openvino") is None:
            print("without OpenVINO: pip install 'dist-train[openvino]'\n")
    else:
        print("without ONNX Runtime: pip install 'dist-train[export]'\n")
    return Subject(runtimes, network.num_exits, size, point.reference.shares or None)


def _point(known: Any, exits: int) -> OperatingPoint:
    """The policy, and the share of images that leave at each exit by it; without one, no shares."""
    if known.budget is not None:
        return point_for_budget(known.path, known.budget)
    if known.risk is not None:
        return point_for_risk(known.path, known.risk)
    shares = [] if known.shares is None else _shares(known.shares, exits)
    # Any thresholds will do: confidence is computed for its time, and the shares decide who leaves.
    return OperatingPoint(Thresholds([0.5] * (exits - 1)), Reference(shares, 0), {})


def _shares(text: str, exits: int) -> list[float]:
    try:
        shares = [float(word) for word in text.split(",")]
    except ValueError:
        shares = []
    # Written so that nan is refused.
    if len(shares) != exits or not (min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-6):
        raise ConfigError(f"--shares is {text!r}; give {exits} shares that sum to 1, one per exit, such as 0.5,0.3,0.2")
    return shares


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < (1 if option == "--batch" else 0):
        raise ConfigError(f"{option} is {text!r}; give whole numbers such as 1,8")
    return numbers


def _measure(runtime: Runtime, subject: Subject, threads: int, batch: int, seconds: float) -> Combination:
    """Every exit, the policy and every static network in turns, so that a slower moment of the machine meets all of them."""
    size = subject.image_size
    images = np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)
    runtime.prepare(images, threads)
    works: Works = {}
    for number in range(subject.exits):
        works["exit", number + 1] = partial(runtime.route, np.full(batch, number))
        works["static", number + 1] = partial(runtime.static, number)
    if subject.shares:
        # Goes on from call to call: with a batch of one, each call alone could only ever take one and the same exit.
        shares, first = subject.shares, itertools.count(step=batch)
        works["policy", None] = lambda: runtime.route(_exits(shares, next(first), batch))
    other_work = OtherWork()
    times = _in_turns(works, seconds)
    rows = [_row(kind, exit_, batch, times[kind, exit_]) for kind, exit_ in works]
    return Combination(runtime.name, threads, batch, runtime.precision, len(times["exit", 1]), rows, other_work.share())


def _in_turns(works: Works, seconds: float) -> dict[tuple[str, int | None], list[float]]:
    """Milliseconds of every round of each; the first round is not counted, it warms up."""
    times: dict[tuple[str, int | None], list[float]] = {key: [] for key in works}
    for work in works.values():
        work()
    start = time.perf_counter()
    for number in range(ROUNDS):
        if number >= FEWEST and time.perf_counter() - start > seconds:
            break
        for key, work in works.items():
            begin = time.perf_counter()
            work()
            times[key].append(1000 * (time.perf_counter() - begin))
    return times


def _exits(shares: Sequence[float], first: int, count: int) -> Exits:
    """Exits of the images ``first`` and following, from 0: any stretch of them comes as near to the shares as it can."""
    positions = np.arange(first + 1, first + count + 1) * GOLDEN % 1
    exits: Exits = np.searchsorted(np.cumsum(shares)[:-1], positions, side="right")
    return exits


def _row(kind: str, exit_: int | None, batch: int, times: Sequence[float]) -> Row:
    mean = float(np.mean(times))
    p25, p50, p75, p95, p99 = np.percentile(times, [25, 50, 75, 95, 99]).tolist()
    return Row(kind, exit_, mean, p50, p95, p99, (p75 - p25) / 2, 1000 * batch / mean)


def to_json(found: Sequence[Combination], subject: Subject) -> dict[str, Any]:
    """What ``--json`` writes, format 1; ``dist-train eval --cost`` reads it."""
    return {
        "format": 1,
        "machine": platform.processor() or platform.machine(),
        "exits": subject.exits,
        "shares": subject.shares,
        "top1": subject.accuracy,
        "policy_top1": subject.policy_accuracy,
        "combinations": [
            asdict(one)
            | {
                "routing": one.routing,
                "break_even": one.break_even,
                "verdict": one.verdict(subject.accuracy, subject.policy_accuracy),
            }
            for one in found
        ],
    }


def _table(one: Combination, title: str) -> Table:
    """A row per exit and static network, and the policy's."""
    names = {"exit": "all leave at exit", "static": "without exits, cut off at", "policy": "by the policy"}
    order = [row for kind in names for row in one.rows if row.kind == kind]
    rows = [
        [
            f"{names[row.kind]} {row.exit or ''}".rstrip(),
            f"{row.p50:.2f} ± {row.spread:.2f}",
            *(f"{value:.2f}" for value in (row.p95, row.p99, row.mean)),
            f"{row.images_per_second:.1f}",
        ]
        for row in order
    ]
    return Table(title, ["milliseconds of a batch", "p50", "p95", "p99", "mean", "images/s"], rows)


def _conclusions(one: Combination, subject: Subject) -> list[str]:
    """What follows, in lines."""
    even = "  ".join(
        f"{number}: {'never' if share is None else f'{100 * share:.0f} %'}"
        for number, share in enumerate(one.break_even, start=1)
    )
    lines = [
        f"routing overhead {one.routing:.2f} ms: what exits cost where no image leaves early",
        f"break-even: images that must leave at exit  {even}",
        one.verdict(subject.accuracy, subject.policy_accuracy),
        busy_warning(one.others),
    ]
    return [line for line in lines if line]


def _text(one: Combination, subject: Subject) -> str:
    return "\n".join([_table(one, one.title).text(), *_conclusions(one, subject)])


def _html(found: Sequence[Combination], subject: Subject, path: str) -> str:
    """The same as a page."""
    shares = ", ".join(f"{100 * share:.1f} %" for share in subject.shares or [])
    words = (
        "Milliseconds of a batch, at the percentiles of its rounds, ± half of the distance between the quartiles. Exits are timed "
        "as prediction computes, decisions included; beside them the network cut off behind an exit, without the exits before it."
    )
    parts = [paragraph(words)]
    if shares:
        parts.append(paragraph(f"By the policy these shares of the images leave at the exits: {shares}."))
    parts += [section(one.title, " ".join(_sentences(one, subject)), _table(one, "").html()) for one in found]
    return page(f"Latency of {path}", parts)


def _sentences(one: Combination, subject: Subject) -> list[str]:
    return [f"{line[0].upper()}{line[1:]}." for line in _conclusions(one, subject)]
