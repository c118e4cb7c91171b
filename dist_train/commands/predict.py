"""``dist-train predict``: image files, each stopped at the exit that is confident of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_train.arguments import Parser
from dist_train.commands.policy import add_policy_options, chosen_point
from dist_train.errors import DataError
from dist_train.evaluation.thresholds import OperatingPoint
from dist_train.files import write_whole
from dist_train.precision import AUTOCAST
from dist_train.prediction.images import FilePrediction, Predictor, Saving, find_images
from dist_train.prediction.shares import ShareMonitor
from dist_train.prediction.stopping import Patience, Policy, at_exit
from dist_train.render.table import csv_text
from shards.source import shown


def run(arguments: list[str]) -> int:
    """Predict, and print or write a line per image."""
    known = _parser().parse_args(arguments)
    policy: Policy | None = None
    reference = None
    precision = known.precision
    if point := chosen_point(known):
        policy, reference = point.policy, point.reference
        if known.risk is not None:
            precision = _guaranteed(point, known.risk, known.precision)
    elif known.patience is not None:
        policy = Patience(known.patience)
    files = find_images(known.images)
    output = Path(known.output) if known.output else None
    if output and (output.is_dir() or not os.access(output.parent, os.W_OK)):  # said before the work, not after it
        raise DataError(f"{output}: cannot be written, it is a folder or in none; give another --output")
    predictor = Predictor(known.run, policy, known.batch, reference, precision, known.deadline, len(files))
    if known.exit is not None:
        # Only now: the number of exits is that of the network, which the predictor has loaded.
        predictor.policy = at_exit(known.exit, predictor.num_exits)
    done = []
    warned = False
    if not output:
        print(f"{'confidence':>10}  {'exit':>4}  {'ms':>8}  class  image")
    for p in predictor.run(files):
        done.append(p)
        if not output:
            print(f"{p.confidence:>10.4f}  {p.exit:>4}  {p.milliseconds:>8.2f}  {p.label}  {p.image}")
        warned = warned or _warn(predictor.monitor)
    for file, reason in predictor.unreadable:
        print(f"unreadable: {shown(str(file))}: {reason}", file=sys.stderr)
    if not done:
        raise DataError(f"none of the {len(files)} images can be read; see above")
    if output:
        _write_csv(output, done)
    print(_summary(predictor.saving(), len(done), len(predictor.unreadable)))
    return 0


def _guaranteed(point: OperatingPoint, risk: str, wanted: str | None) -> str:
    """The precision to compute in: the guarantee is of the network in the one in which it was evaluated."""
    evaluated: str = point.promise["precision"]
    if wanted not in (None, evaluated):
        print(f"warning: {risk} is guaranteed in {evaluated}, not in {wanted}", file=sys.stderr)
    return wanted or evaluated


def _warn(monitor: ShareMonitor | None) -> bool:
    """Say once, on standard error, that the images are of another kind than those of the report."""
    warning = monitor.warning() if monitor is not None else ""
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    return bool(warning)


def _parser() -> Parser:
    parser = Parser(
        "dist-train predict", description="Classify image files; each exits as soon as an exit is confident of it."
    )
    parser.add_argument("run", metavar="CHECKPOINT", help="run folder (its best checkpoint), or one of its checkpoints")
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="image files, or folders of them")
    policy = add_policy_options(parser)
    policy.add_argument("--patience", type=int, metavar="N", help="stop when N exits in a row kept the predicted class")
    policy.add_argument("--exit", type=int, metavar="N", help="stop at exit N (default: the last)")
    policy.add_argument(
        "--deadline",
        type=float,
        metavar="MS",
        help="stop at the last exit that a batch reaches within so many milliseconds here",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images computed together (default: 1)")
    parser.add_argument(
        "--precision",
        choices=("fp32", *AUTOCAST),
        help="compute at this precision (default: with --risk that of the guarantee, else of fp32 and that of the training the one "
        "that is faster here)",
    )
    parser.add_argument("--output", metavar="CSV", help="write one line per image there instead of printing it")
    return parser


def _write_csv(path: Path, predictions: Sequence[FilePrediction]) -> None:
    """Write one line per image, whole or not at all; raises DataError where it cannot be written."""
    header = ["image", "class", "confidence", "exit", "milliseconds"]
    rows = [[p.image, p.label, f"{p.confidence:.6f}", p.exit, f"{p.milliseconds:.3f}"] for p in predictions]
    try:
        write_whole(path, csv_text([header, *rows]))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); give another --output") from None


def _summary(saving: Saving, images: int, unreadable: int) -> str:
    """Where the images exited, what that saved, and what could not be read."""
    exits = "  ".join(f"{number}: {100 * share:.1f} %" for number, share in enumerate(saving.shares, start=1))
    less = 100 * (1 - saving.multiply_adds / saving.full_multiply_adds)
    return "\n".join(
        [
            f"{images} images" + (f", {unreadable} unreadable" if unreadable else "") + f"; left at exit  {exits}",
            f"{saving.multiply_adds / 1e6:.2f} M multiply-adds per image (counted lazily, what early exits compute) instead of "
            f"{saving.full_multiply_adds / 1e6:.2f} M with all exits: {less:.1f} % saved",
            f"{saving.milliseconds:.2f} ± {saving.spread:.2f} ms per image instead of {saving.full_milliseconds:.2f} ms "
            f"({saving.conditions})",
            *([f"warning: {saving.warning}"] if saving.warning else []),
        ]
    )
