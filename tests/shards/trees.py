"""Trees of images for tests, written by name, and what shards hold of them."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from shards.index import Index

Files = Mapping[str, "bytes | str | None"]


@cache
def picture(name: str) -> bytes:
    """A small JPEG that is another one for every name."""
    seed = zlib.crc32(name.encode(errors="surrogateescape"))
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def lay(root: Path, files: Files) -> None:
    """Write a tree; None stands for the picture of that name, and a name with a slash at its end for a folder."""
    for name, content in files.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        data = picture(name) if content is None else content
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def pictures(*patterns: str) -> dict[str, None]:
    """Names with ``{a,b}`` spelled out."""
    found = list(patterns)
    while any("{" in name for name in found):
        found = [
            name.replace(match[0], word, 1) if match else name
            for name in found
            for match in [re.search(r"\{(.*?)\}", name)]
            for word in (match[1].split(",") if match else [""])
        ]
    return dict.fromkeys(found)


def stored(out: Path) -> dict[str, dict[bytes, str]]:
    """By split the class of every image, by the image's bytes."""
    found: dict[str, dict[bytes, str]] = {}
    for path in sorted(out.glob("*/index.json")):
        index = Index.load(path.parent)
        tars = [(path.parent / shard.name).read_bytes() for shard in index.shards]
        rows = zip(index.shard, index.offset, index.size, index.label)
        found[path.parent.name] = {tars[s][o : o + n]: index.classes[label] for s, o, n, label in rows}
    return found
