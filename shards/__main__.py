"""The command line of shards: parsing and printing only."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dist_train.arguments import Parser, positive
from dist_train.errors import INTERRUPTED, USER_ERROR, DataError, UserError
from shards import check, cifar, foreign, imagenet, info, make, parquet, sheet, sources, subset
from shards.images import KEEP, Encoding
from shards.progress import Progress
from shards.quarantine import QUARANTINE_FILE
from shards.reading import AS_IT_SHOWS, Reading
from shards.slurm import Array
from shards.source import Source
from shards.tree import refuse_inside

DESCRIPTION = "Make, check and index WebDataset shards, from which runs read their images in an exact order."
# Those that this process may use: in a job, fewer than the machine has.
CORES = len(os.sched_getaffinity(0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for a mistake of the user or faulty shards."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may have any bytes
    try:
        options = _parser().parse_args(arguments)
        code: int = options.run(options)
    except UserError as error:
        print(f"shards: {error}".replace("\n", " "), file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("shards: stopped; run the same command again to resume", file=sys.stderr)
        return INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m shards", description=DESCRIPTION)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_make(verbs)
    _add_index(verbs)
    checking = verbs.add_parser(
        "check",
        help="look through shards: tars against the index, every image decoded, duplicates",
        description=f"Look through shards. Training leaves out what is found, by {QUARANTINE_FILE} in the split's folder.",
    )
    checking.add_argument("folder", type=Path, metavar="FOLDER", help="a split, or the folder of the splits")
    checking.add_argument("--workers", type=positive, default=CORES, help="processes; default: the cores, %(default)s")
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
    _add_encoding(part)
    part.set_defaults(run=_subset, slurm=None)
    telling = verbs.add_parser("info", help="what is there")
    telling.add_argument("folder", type=Path, metavar="FOLDER", help="a split, or the folder of the splits")
    telling.set_defaults(run=_info)
    return parser


def _add_make(verbs: Any) -> None:
    making = verbs.add_parser(
        "make",
        help="write shards",
        description="Write shards; after an interruption, run the same command again to resume.",
    )
    kinds = making.add_subparsers(required=True, metavar="SOURCE")
    for kind, what, source in (
        ("digits", "the handwritten digits that scikit-learn ships", None),
        ("folder", "class folders of image files, also within train/ val/ test/, on disk or in a tar", "folder or tar"),
        ("imagenet", "ImageNet's original archives, or unpacked", "folder of the archives, or with train/ and val/"),
        (
            "parquet",
            "Parquet files with images and labels, as Hugging Face has them",
            "file, folder, or URL such as hf://datasets/...",
        ),
        ("cifar10", "CIFAR-10's official archive", "python or binary archive, or a folder with its files"),
        ("cifar100", "CIFAR-100's official archive", "python or binary archive, or a folder with its files"),
    ):
        one = kinds.add_parser(kind, help=what, description=f"Make shards of {what}.")
        if source:
            # A Path would take a slash from hf://.
            one.add_argument("source", type=str if kind == "parquet" else Path, metavar="SRC", help=source)
        one.add_argument("out", type=Path, metavar="OUT", help="folder for the shards, one folder per split")
        _add_reading_of(kind, one)
        _add_choice(one)
        _add_encoding(one)
        _add_cluster(one)
        one.set_defaults(run=_make, kind=kind, seed=0)


def _add_reading_of(kind: str, one: argparse.ArgumentParser) -> None:
    """Options of how a kind of source is read."""
    if kind == "folder":
        _add_reading(one)
    if kind == "parquet":
        one.add_argument(
            "--image-column", metavar="NAME", help="column with the images; default: the one that holds bytes"
        )
        one.add_argument(
            "--label-column",
            metavar="NAME",
            help="column with the classes; default: label, or the one that is known",
        )
    if kind == "imagenet":
        one.add_argument(
            "--val-labels",
            type=Path,
            metavar="FILE",
            help="classes of the validation images: the devkit, LOC_val_solution.csv, or one synset a line",
        )


def _add_cluster(one: argparse.ArgumentParser) -> None:
    cluster = one.add_argument_group("on a cluster")
    cluster.add_argument(
        "--slurm",
        type=positive,
        metavar="N",
        help="let N tasks of a SLURM array write the shards, each with --workers cores; OUT is on a shared file system",
    )
    cluster.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="flag of sbatch, such as partition=NAME or time=2:00:00; repeatable. SBATCH_PARTITION and the like work too",
    )


def _add_index(verbs: Any) -> None:
    parser = verbs.add_parser(
        "index",
        help="an index for a WebDataset made elsewhere, whose tars stay as they are",
        description="Write an index for the tars of a WebDataset; after an interruption, run the same command again to resume.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the tars, or with train/ val/ test/ of tars")
    parser.add_argument(
        "--out", type=Path, metavar="OUT", help="folder for the indices, one folder per split; default: FOLDER"
    )
    parser.add_argument(
        "--label-from",
        choices=foreign.SOURCES,
        help="file of a sample that has its label; default: the first of these that the first sample has",
    )
    parser.add_argument(
        "--label-key", metavar="FIELD", help="field of a sample's JSON that has its label; a.b is b in a"
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="names of the classes in the order of their numbers, one a line or as JSON; default: the labels themselves",
    )
    parser.add_argument("--workers", type=positive, default=CORES, help="processes; default: the cores, %(default)s")
    parser.set_defaults(run=_index)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    reading = parser.add_argument_group("how SRC is read, where it does not show")
    reading.add_argument(
        "--depth",
        type=positive,
        metavar="N",
        help="class folders lie N levels below SRC, or below its splits; what lies deeper belongs to them",
    )
    reading.add_argument(
        "--split",
        "--split-name",
        dest="splits",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="FOLDER is the split NAME (train, val or test), such as val=valid; repeatable, the other folders are left out",
    )
    reading.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="classes of the images: a CSV or text of image and class, or JSON in COCO's form; the folders do not count then",
    )
    reading.add_argument("--extra-classes", action="store_true", help="allow classes in val or test that train lacks")


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--per-class", type=positive, metavar="N", help="take only N images of every class of train, val's included"
    )
    parser.add_argument(
        "--val-per-class", type=positive, metavar="N", help="make a val split of N images per class of train"
    )
    parser.add_argument(
        "--labels-per-class",
        type=positive,
        metavar="N",
        help="keep the labels of N images of every class of train only",
    )


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-size",
        type=_shard_size,
        default="128MB",
        metavar="SIZE",
        help="samples per shard (1000) or megabytes of source images per shard (128MB); default: %(default)s",
    )
    parser.add_argument("--workers", type=positive, help=f"processes; default: the cores, {CORES}")
    parser.add_argument(
        "--max-size",
        type=positive,
        metavar="PIXELS",
        help="re-encode all as JPEG, upright, the shorter side at most so long; default: stored as they are",
    )
    parser.add_argument(
        "--quality",
        type=_quality,
        metavar="Q",
        help="re-encode all as JPEG of this quality, 1 to 95; default with --max-size: 90",
    )
    parser.add_argument(
        "--unusual",
        choices=("keep", "convert"),
        default="keep",
        help="CMYK, palette, 16 bit, alpha and animated images as they are, or as plain PNG; default: %(default)s",
    )


def _chosen(source: Source, options: argparse.Namespace) -> Source:
    return subset.choose(source, options.per_class, options.val_per_class, options.labels_per_class, options.seed)


def _make(options: argparse.Namespace) -> int:
    if options.sbatch and not options.slurm:
        raise DataError(f"--sbatch {options.sbatch[0]} is for an array; give --slurm N as well")
    reading = AS_IT_SHOWS
    if options.kind == "folder":
        refuse_inside(options.source, options.out)
        reading = Reading.of_options(options.depth, options.splits, options.labels, options.extra_classes)
    openers: dict[str, Callable[[Path], Source]] = {
        "digits": lambda _: sources.digits(),
        "folder": lambda scratch: sources.folder(options.source, scratch, reading),
        "imagenet": lambda _: imagenet.imagenet(options.source, options.val_labels),
        "parquet": lambda scratch: parquet.parquet(
            options.source, scratch, options.image_column, options.label_column, Progress()
        ),
        "cifar10": lambda _: cifar.cifar(options.source, 10),
        "cifar100": lambda _: cifar.cifar(options.source, 100),
    }
    return _pack(lambda scratch: _chosen(openers[options.kind](scratch), options), options)


def _pack(source: Callable[[Path], Source], options: argparse.Namespace) -> int:
    began = time.perf_counter()
    encoding = Encoding(options.max_size, options.quality, options.unusual)
    array = Array(options.slurm, options.workers, options.sbatch) if options.slurm else None
    workers = options.workers or CORES
    layouts: list[str] = []

    def opened(scratch: Path) -> Source:
        found = source(scratch)
        layouts.append(found.layout)
        return found

    made = make.make(opened, options.out, options.shard_size, workers, Progress(), encoding, array, with_sheet=True)
    for layout in filter(None, layouts):
        print(layout)
    for one in made:
        _describe(one.folder)
    images = sum(len(one.index) for one in made)
    seconds = time.perf_counter() - began
    print(f"{images} images in {seconds:.1f} s, {images / seconds:.0f} images/s")
    return 0


def _index(options: argparse.Namespace) -> int:
    made = foreign.index_folder(
        options.folder, options.out, options.classes, options.label_from, options.label_key, options.workers, Progress()
    )
    for one in made:
        _describe(one.folder)
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
    return USER_ERROR if any(one.faults or one.bad for one in checked) else 0


def _subset(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in ("per_class", "val_per_class", "labels_per_class")}
    rule = {name: value for name, value in given.items() if value}
    if not rule:
        raise DataError("nothing is chosen; give --per-class, --val-per-class or --labels-per-class")
    if options.copy:
        return _pack(lambda _: _chosen(subset.open_shards(options.source), options), options)
    if Encoding(options.max_size, options.quality, options.unusual) != KEEP:
        raise DataError("--max-size, --quality and --unusual are for new shards; give --copy as well")
    source = _chosen(subset.open_shards(options.source), options)
    for folder in subset.save_lists(source, options.source, options.out, {**rule, "seed": options.seed}):
        print("\n".join(info.describe(folder)))
    return 0


def _info(options: argparse.Namespace) -> int:
    for split in check.split_folders(options.folder):
        _describe(split)
    return 0


def _describe(split: Path) -> None:
    """Print what a split holds, and where a picture of it is."""
    lines = info.describe(split)
    try:
        picture = split / sheet.FILE
        lines.append(f"  some images of every class: {picture if picture.exists() else sheet.write(split)}")
    except OSError as error:
        lines.append(f"  no picture of its classes: {sheet.FILE} cannot be written ({error.strerror or error})")
    print("\n".join(lines))


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
