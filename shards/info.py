"""What a split holds, at a glance."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np

from shards.index import UNLABELED, Index
from shards.index_file import FILE
from shards.make import MANIFEST, read_manifest


def describe(folder: Path) -> list[str]:
    """Lines for a person: images, classes, shards, sizes, and whatever is unusual.

    Raises:
        DataError: there is no split, or a faulty one.
    """
    index = Index.load(folder)
    tree = json.loads((folder / FILE).read_bytes())
    whole = sum(shard.bytes for shard in index.shards)
    # A list uses a part of its shards, whose whole size would say nothing of it.
    megabytes = (int(index.size.sum()) if "of" in tree else whole) / 1e6
    lines = [
        f"{folder}: {len(index)} images, {len(index.classes)} classes, {len(index.shards)} shard{'s' if len(index.shards) != 1 else ''}, {megabytes:.1f} MB, "
        f"fingerprint {index.fingerprint[:12]}",
        f"  {_sizes(index)}",
        f"  {per_class(index)}",
    ]
    if "of" in tree:
        rule = ", ".join(f"{name} {value}" for name, value in tree["rule"].items())
        lines.append(f"  a list over the shards in {os.path.normpath(folder.resolve() / tree['of'])} ({rule})")
    lines += [f"  {note}" for note in index.quarantine_notes]
    if (folder / MANIFEST).exists():
        lines += _unusual(folder)
    return lines


def _sizes(index: Index) -> str:
    formats = ", ".join(f"{count} {ext.decode()}" for ext, count in sorted(Counter(index.ext.tolist()).items()))
    width, height = int(np.median(index.width)), int(np.median(index.height))
    return f"{formats}; {index.size.mean() / 1e3:.1f} kB and {width} x {height} pixels (median)"


def per_class(index: Index) -> str:
    """A line about the smallest and the largest class, empty ones, and images without a label."""
    counts = np.bincount(index.label[index.label >= 0], minlength=len(index.classes))
    if not index.classes:
        return f"{len(index)} images without a label, and no classes"
    low, high = int(counts.argmin()), int(counts.argmax())
    if counts[low] == counts[high]:
        text = f"{counts[low]} images of every class"
    else:
        text = f"{counts[low]} ({index.classes[low]}) to {counts[high]} ({index.classes[high]}) images per class"
    empty = int((counts == 0).sum())
    unlabeled = int((index.label == UNLABELED).sum())
    return (
        text
        + (f", {empty} classes have none" if empty else "")
        + (f", {unlabeled} without a label" if unlabeled else "")
    )


def _unusual(folder: Path) -> list[str]:
    manifest = read_manifest(folder)
    lines = []
    for what, name in (("skipped", "skipped"), ("turned into PNG", "converted")):
        if entries := manifest[name]:
            file, reason = entries[0]
            rest = "; ..." if len(entries) > 1 else ""
            lines.append(f"  {len(entries)} {what}, see {MANIFEST} ({file}: {reason}{rest})")
    if manifest["unusual"]:
        lines.append("  unusual: " + ", ".join(f"{count} {what}" for what, count in manifest["unusual"].items()))
    return lines
