"""The command line of shards: parsing and printing only."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dist_train.errors import DataError, UserError
from shards import check, cifar, imagenet, info, make, sources, subset
from shards.images import AS_IS, Storing
from shards.index import QUARANTINE_FILE
from shards.progress import Progress
from shards.slurm import Array
from shards.source import Source

CORES = len(os.sched_getaffinity(0))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for a mistake of the user or faulty shards."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except UserError as error:
        print(f"shards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"shards: stopped{'; the same command goes on' if options.run is _make else ''}", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m shards", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    making = verbs.add_parser(
        "make", help="write shards", description="Write shards; after an interruption the same command goes on."
    )
    kinds = making.add_subparsers(required=True, metavar="SOURCE")
    for kind, what, source in (
        ("digits", "the handwritten digits that scikit-learn ships", None),
        ("folder", "class folders of image files, also within train/ val/ test/, on disk or in a tar", "folder or tar"),
        ("imagenet", "ImageNet's original archives, or unpacked", "folder of the archives, or with train/ and val/"),
        ("cifar10", "CIFAR-10's official archive", "python or binary archive, or a folder with its files"),
        ("cifar100", "CIFAR-100's official archive", "python or binary archive, or a folder with its files"),
    ):
        one = kinds.add_parser(kind, help=what, description=f"Make shards of {what}.")
        if source:
            one.add_argument("source", type=Path, metavar="SRC", help=source)
        one.add_argument("out", type=Path, metavar="OUT", help="folder for the shards, one folder per split")
        if kind == "imagenet":
            one.add_argument(
                "--val-labels", type=Path, metavar="FILE",
                help="classes of the validation images: the devkit, LOC_val_solution.csv, or one synset a line",
            )  # fmt: skip
        _add_choice(one)
        _add_storing(one)
        cluster = one.add_argument_group("on a cluster")
        cluster.add_argument(
            "--slurm", type=_positive, metavar="N",
            help="let N tasks of a SLURM array write the shards, each with --workers cores; OUT is on a shared file system",
        )  # fmt: skip
        cluster.add_argument(
            "--sbatch", action="append", default=[], metavar="KEY=VALUE",
            help="flag of sbatch, such as partition=NAME or time=2:00:00; repeatable. SBATCH_PARTITION and the like work too",
        )  # fmt: skip
        one.set_defaults(run=_make, kind=kind, seed=0)
    checking = verbs.add_parser(
        "check",
        help="look through shards: tars against the index, every image decoded, duplicates",
        description=f"Look through shards. Training leaves out what is found, by {QUARANTINE_FILE} in the split's folder.",
    )
    checking.add_argument("folder", type=Path, metavar="FOLDER", help="a split, or the folder of the splits")
    checking.add_argument("--workers", type=_positive, default=CORES, help="processes; default: the cores, %(default)s")
    checking.set_defaults(run=_check)
    part = verbs.add_parser(
        "subset",
        help="a part of shards: fewer images, a val split, fewer labels",
        description="Choose by seed from train; the other splits stay whole. Without --copy no image is copied.",
    )
    part.add_argument("source", type=Path, metavar="SRC", help="folder of the splits")
    part.add_argument("out", type=Path, metavar="OUT", help="folder for the subset's splits")
    _add_choice(part)
    part.add_argument("--seed", type=int, default=0, help="which images are chosen; default: %(default)s")
    part.add_argument("--copy", action="store_true", help="write new shards instead of lists over the old ones")
    _add_storing(part)
    part.set_defaults(run=_subset, slurm=None)
    telling = verbs.add_parser("info", help="what is there")
    telling.add_argument("folder", type=Path, metavar="FOLDER", help="a split, or the folder of the splits")
    telling.set_defaults(run=_info)
    return parser


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--per-class", type=_positive, metavar="N", help="take only N images of every class of train, val's included"
    )
    parser.add_argument(
        "--val-per-class", type=_positive, metavar="N", help="make a val split of N images per class of train"
    )
    parser.add_argument(
        "--labels-per-class", type=_positive, metavar="N",
        help="keep the labels of N images of every class of train only",
    )  # fmt: skip


def _add_storing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-size", type=_shard_size, default="128MB", metavar="SIZE",
        help="samples per shard (1000) or megabytes of source images per shard (128MB); default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--workers", type=_positive, help=f"processes; default: the cores, {CORES}")
    parser.add_argument(
        "--max-size", type=_positive, metavar="PIXELS",
        help="re-encode all as JPEG, upright, the shorter side at most so long; default: stored as they are",
    )  # fmt: skip
    parser.add_argument(
        "--quality", type=_quality, metavar="Q",
        help="re-encode all as JPEG of this quality, 1 to 95; default with --max-size: 90",
    )  # fmt: skip
    parser.add_argument(
        "--odd", choices=("keep", "convert"), default="keep",
        help="CMYK, palette, 16 bit, alpha and animated images as they are, or as plain PNG; default: %(default)s",
    )  # fmt: skip


def _chosen(source: Source, options: argparse.Namespace) -> Source:
    return subset.choose(source, options.per_class, options.val_per_class, options.labels_per_class, options.seed)


def _make(options: argparse.Namespace) -> int:
    if options.sbatch and not options.slurm:
        raise DataError(f"--sbatch {options.sbatch[0]} is for an array; give --slurm N as well")
    openers: dict[str, Callable[[Path], Source]] = {
        "digits": lambda _: sources.digits(),
        "folder": lambda scratch: sources.folder(options.source, scratch),
        "imagenet": lambda _: imagenet.imagenet(options.source, options.val_labels),
        "cifar10": lambda _: cifar.cifar(options.source, 10),
        "cifar100": lambda _: cifar.cifar(options.source, 100),
    }
    return _pack(lambda scratch: _chosen(openers[options.kind](scratch), options), options)


def _pack(source: Callable[[Path], Source], options: argparse.Namespace) -> int:
    began = time.perf_counter()
    storing = Storing(options.max_size, options.quality, options.odd)
    array = Array(options.slurm, options.workers, options.sbatch) if options.slurm else None
    workers = options.workers or CORES
    made = make.make(source, options.out, options.shard_size, workers, Progress(), storing, array)
    for one in made:
        print("\n".join(info.describe(one.folder)))
    images = sum(len(one.index) for one in made)
    seconds = time.perf_counter() - began
    print(f"{images} images in {seconds:.1f} s, {images / seconds:.0f} images/s")
    return 0


def _check(options: argparse.Namespace) -> int:
    checked = []
    for split in check.split_folders(options.folder):
        one = check.check(split, options.workers, Progress())
        for fault in one.faults:
            print(f"shards: {fault}", file=sys.stderr)
        for entry in one.bad:
            print(f"shards: {split}: {entry.key}: {entry.why}", file=sys.stderr)
        one.index.save_quarantine(one.bad)
        faults = len(one.faults) + len(one.bad)
        counted = f"{faults} fault{'s' if faults > 1 else ''}" if faults else "no fault"
        print(f"{split}: {len(one.index)} images, {counted}")
        print(f"  {info.per_class(one.index)}")
        if one.bad:
            print(f"  {len(one.bad)} images are in {QUARANTINE_FILE}, training leaves them out")
        checked.append(one)
    for line in check.duplicates(checked):
        print(line)
    return 2 if any(one.faults or one.bad for one in checked) else 0


def _subset(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in ("per_class", "val_per_class", "labels_per_class")}
    rule = {name: value for name, value in given.items() if value}
    if not rule:
        raise DataError("nothing is chosen; give --per-class, --val-per-class or --labels-per-class")
    if options.copy:
        return _pack(lambda _: _chosen(subset.open_shards(options.source), options), options)
    if Storing(options.max_size, options.quality, options.odd) != AS_IS:
        raise DataError("--max-size, --quality and --odd are for new shards; give --copy as well")
    source = _chosen(subset.open_shards(options.source), options)
    for folder in subset.save_lists(source, options.source, options.out, {**rule, "seed": options.seed}):
        print("\n".join(info.describe(folder)))
    return 0


def _info(options: argparse.Namespace) -> int:
    for split in check.split_folders(options.folder):
        print("\n".join(info.describe(split)))
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 95:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 to 95")
    return int(text)


def _shard_size(text: str) -> make.ShardSize:
    try:
        return make.ShardSize.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
