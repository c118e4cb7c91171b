"""The command line of shards: parsing and printing only."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dist_train.errors import UserError
from shards import check, make, sources


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
        print("shards: stopped; nothing is left of the unfinished splits", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m shards", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    making = verbs.add_parser("make", help="write shards")
    kinds = making.add_subparsers(required=True, metavar="SOURCE")
    digits = kinds.add_parser("digits", help="the handwritten digits that scikit-learn ships")
    folder = kinds.add_parser("folder", help="class folders of image files, also within train/ val/ test/")
    folder.add_argument("source", type=Path, metavar="SRC", help="folder of class folders, or of train/ val/ test/")
    for parser_of_kind in (digits, folder):
        parser_of_kind.add_argument("out", type=Path, metavar="OUT", help="folder for the shards, one folder per split")
        parser_of_kind.add_argument(
            "--shard-size", type=_shard_size, default="128MB", metavar="SIZE",
            help="samples per shard (1000) or megabytes of images per shard (128MB); default: %(default)s",
        )  # fmt: skip
        parser_of_kind.add_argument(
            "--workers",
            type=_positive,
            default=len(os.sched_getaffinity(0)),
            help="processes; default: the cores, %(default)s",
        )
        parser_of_kind.add_argument(
            "--per-class",
            type=_positive,
            metavar="N",
            help="take only N images of every class of train, val's included",
        )
        parser_of_kind.add_argument(
            "--labels-per-class",
            type=_positive,
            metavar="N",
            help="keep the labels of N images of every class of train only",
        )
    folder.add_argument(
        "--val-per-class", type=_positive, metavar="N", help="make a val split of N images per class of train"
    )
    digits.set_defaults(run=_make_digits)
    folder.set_defaults(run=_make_folder)
    checking = verbs.add_parser(
        "check", help="compare shards with their index: sizes, hashes, offsets, labels, image headers"
    )
    checking.add_argument("folder", type=Path, metavar="FOLDER", help="a split, or the folder of the splits")
    checking.set_defaults(run=_check)
    return parser


def _make_digits(options: argparse.Namespace) -> int:
    return _make(sources.digits(), options, val_per_class=None)


def _make_folder(options: argparse.Namespace) -> int:
    return _make(sources.folder(options.source), options, options.val_per_class)


def _make(source: sources.Source, options: argparse.Namespace, val_per_class: int | None) -> int:
    if options.per_class:
        source = source.few(options.per_class)
    if val_per_class:
        source = source.hold_out(val_per_class)
    if options.labels_per_class:
        source = source.labeled(options.labels_per_class)
    began = time.perf_counter()
    progress = _progress if sys.stderr.isatty() else None
    made = make.make(source, options.out, options.shard_size, options.workers, progress)
    for one in made:
        index = one.index
        megabytes = sum(shard.bytes for shard in index.shards) / 1e6
        print(
            f"{one.folder}: {len(index)} images, {len(index.classes)} classes, {len(index.shards)} shards, "
            f"{megabytes:.1f} MB, fingerprint {index.fingerprint[:12]}"
        )
        for what, entries in (("skipped", one.skipped), ("turned into PNG", one.converted)):
            if entries:
                name, reason = entries[0]
                print(
                    f"  {len(entries)} {what}, see {make.MANIFEST} ({name}: {reason}{'; ...' if len(entries) > 1 else ''})"
                )
    images = sum(len(one.index) for one in made)
    seconds = time.perf_counter() - began
    print(f"{images} images in {seconds:.1f} s, {images / seconds:.0f} images/s")
    return 0


def _progress(split: str, done: int, total: int) -> None:
    print(f"\r{split}: {done} of {total} images", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _check(options: argparse.Namespace) -> int:
    faults = 0
    for split in check.split_folders(options.folder):
        found = 0
        for fault in check.check(split):
            print(f"shards: {fault}", file=sys.stderr)
            found += 1
        print(f"{split}: {f'{found} faults' if found else 'no fault'}")
        faults += found
    return 2 if faults else 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _shard_size(text: str) -> make.ShardSize:
    try:
        return make.ShardSize.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
