"""``dist-train bench loss``: the fused objective against the same objective written pair by pair."""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.arguments import Parser
from dist_train.bench import writable
from dist_train.config import LossConfig
from dist_train.loss.objective import ExitDistillation

SHAPES = ((11, 64, 100), (5, 256, 1000), (7, 1024, 1000), (5, 8192, 1000), (11, 8192, 1000), (5, 1024, 21_841))
TEMPERATURE = 2.0
SECONDS = 10.0
"""Measuring time per shape and dtype, at most; at least three rounds are made."""
TURN = 0.02
"""Seconds that one way is repeated for before it is another one's turn."""
CPU_LIMIT = 10_000_000
"""Most logits in a shape that is measured without a GPU."""

Objective = Callable[[list[Tensor], Tensor], Tensor]


@dataclass
class LossRow:
    """One way of computing the objective at one shape: median of interleaved rounds, forward and backward."""

    exits: int
    batch: int
    classes: int
    dtype: str
    way: str
    milliseconds: float
    gpu_milliseconds: float | None
    """The same replayed as a CUDA graph, without the host, which takes longer than the GPU for small batches."""
    least_bytes: int
    """Every logit read once, every gradient written once."""
    share_of_copy: float
    """``least_bytes`` / time, of the bandwidth of a copy in the same rounds; on a GPU both without the host."""
    extra_bytes: int | None
    """Peak memory beyond the logits, the returned gradient included; None on the CPU."""
    speedup: dict[str, float]
    """Times faster than the other ways."""


def pairwise(logits: list[Tensor], targets: Tensor) -> Tensor:
    """The objective with all later exits as teachers, pair by pair, and the statistics that :class:`ExitStats` holds."""
    exits, stats = len(logits), []
    loss = torch.zeros((), device=targets.device)
    for m, student in enumerate(logits):
        student = student.float()
        ce = F.cross_entropy(student, targets)
        loss = loss + ce / exits
        with torch.no_grad():
            hits = student.topk(5).indices == targets[:, None]
            stats += [ce.detach(), hits[:, 0].sum(), hits.sum(), (~student.isfinite()).any(1).sum()]
        for teacher in logits[m + 1 :]:
            q = F.softmax(teacher.detach().float() / TEMPERATURE, dim=-1)
            kl = F.kl_div(F.log_softmax(student / TEMPERATURE, dim=-1), q, reduction="batchmean")
            stats.append(kl.detach())
            loss = loss + TEMPERATURE**2 * kl / (exits * (exits - 1 - m))
    with torch.no_grad():
        stats += [F.softmax(logits[-1].float() / TEMPERATURE, dim=-1).amax(1).sum(), (targets >= 0).sum()]
    return loss


def pairwise_liger(logits: list[Tensor], targets: Tensor) -> Tensor:
    """The same objective by Liger-Kernel's cross-entropy and divergence per pair; it has no statistics."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    exits, ce, divergence = len(logits), LigerCrossEntropyLoss(), LigerKLDIVLoss(reduction="batchmean")
    loss = torch.zeros((), device=targets.device)
    for m, student in enumerate(logits):
        # Its cross-entropy writes the gradient into its input.
        loss = loss + ce(student.clone(), targets) / exits
        for teacher in logits[m + 1 :]:
            q = F.softmax(teacher.detach().float() / TEMPERATURE, dim=-1)
            kl = divergence(F.log_softmax(student.float() / TEMPERATURE, dim=-1), q)
            loss = loss + TEMPERATURE**2 * kl / (exits * (exits - 1 - m))
    return loss


def fused(exits: int, device: torch.device) -> Objective:
    """The same objective by :class:`ExitDistillation`."""
    config = LossConfig(teachers="later", distill_loss="kl", temperature=TEMPERATURE, temperature_rule="constant")
    criterion = ExitDistillation.from_config(config, exits).to(device)
    return lambda logits, targets: criterion(logits, targets, labeled=len(targets)).loss


def bench_loss(json_path: str | Path | None = None, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> list[LossRow]:
    """Measure all shapes in fp32 and bf16, print a table, and write the rows to a JSON file.

    Without a GPU the shapes above 10 million logits are left out.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; forward and backward with all statistics, teachers: all later exits")
    print(
        f"{'exits x batch x classes':>24}  dtype     way             ms   GPU alone   least MB   of copy   extra MB   time / fused"
    )
    rows: list[LossRow] = []
    for shape in shapes:
        if device.type == "cpu" and shape[0] * shape[1] * shape[2] > CPU_LIMIT:
            print(f"{' x '.join(map(str, shape)):>24}  left out: no GPU")
            continue
        for dtype in (torch.float32, torch.bfloat16):
            rows += _measure(shape, dtype, device)
    if json_path is not None:
        document = {"device": name, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        Path(json_path).write_text(json.dumps(document, indent=1) + "\n")
    return rows


def run(argv: Sequence[str] | None = None) -> int:
    """The verb ``dist-train bench loss``."""
    parser = Parser(prog="dist-train bench loss", description=__doc__)
    parser.add_argument("--json", type=writable, metavar="PATH", help="write the measurements to this file")
    bench_loss(parser.parse_args(argv).json)
    return 0


def _measure(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> list[LossRow]:
    exits, batch, classes = shape
    torch.manual_seed(0)
    logits = [torch.randn(batch, classes, device=device, dtype=dtype).requires_grad_() for _ in range(exits)]
    targets = torch.randint(classes, (batch,), device=device)
    ways: dict[str, Objective] = {
        "pairs": pairwise,
        "compiled pairs": torch.compile(pairwise),
        "fused": fused(exits, device),
    }
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        ways["liger pairs"] = pairwise_liger
    steps = {way: _step(objective, logits, targets) for way, objective in ways.items()}
    source = torch.cat([z.detach().view(-1) for z in logits])
    destination = torch.empty_like(source)
    timed = {**steps, "copy": lambda: destination.copy_(source)}
    seconds = _interleave(timed, device)
    alone = {way: _gpu_alone(way, step, device) for way, step in timed.items()}
    least = 2 * source.numel() * source.element_size()
    # A copy moves as many bytes as the objective has to: it reads all logits and writes as much.
    rows = [
        LossRow(
            exits,
            batch,
            classes,
            str(dtype).removeprefix("torch."),
            way,
            1e3 * seconds[way],
            alone[way],
            least,
            (alone["copy"] or 1e3 * seconds["copy"]) / (alone[way] or 1e3 * seconds[way]),
            _extra_memory(step, device),
            {other: seconds[other] / seconds[way] for other in ways if other != way},
        )
        for way, step in steps.items()
    ]
    for row in rows:
        _print(row, seconds["fused"])
    return rows


def _step(objective: Objective, logits: list[Tensor], targets: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(objective(logits, targets), logits)


def _interleave(steps: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of each step over rounds that run all of them in turn, so that a busy machine slows all alike."""
    repeats = {}
    for name, step in steps.items():
        # Compiles the kernels and fills caches, which must not count in the number of repeats below.
        _seconds(step, device, 3)
        repeats[name] = max(1, round(TURN / _seconds(step, device, 1)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    while len(times["copy"]) < 3 or time.perf_counter() - start < SECONDS:
        for name, step in steps.items():
            times[name].append(_seconds(step, device, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Mean over so many calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def _gpu_alone(way: str, step: Callable[[], object], device: torch.device) -> float | None:
    """Median milliseconds of a step's kernels, replayed as a CUDA graph; None on a CPU, and for what cannot be recorded."""
    if device.type == "cpu" or way == "liger pairs":
        return None
    from dist_train.loss.gpu import triton

    return float(triton.testing.do_bench_cudagraph(step, rep=30, return_mode="median"))


def _extra_memory(step: Callable[[], object], device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _print(row: LossRow, fused: float) -> None:
    shape = f"{row.exits} x {row.batch} x {row.classes}"
    alone = "" if row.gpu_milliseconds is None else f"{row.gpu_milliseconds:.4f}"
    extra = "" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:.1f}"
    print(
        f"{shape:>24}  {row.dtype:<8}  {row.way:<14} {row.milliseconds:>8.3f}  {alone:>10}  {row.least_bytes / 1e6:>8.1f}  "
        f"{100 * row.share_of_copy:>6.1f} %   {extra:>8}   {row.milliseconds / (1e3 * fused):>6.1f}"
    )


if __name__ == "__main__":
    run()
