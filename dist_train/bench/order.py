"""``dist-train bench order``: what it costs to plan an epoch, how well its order is mixed, and how it reads the shards.

Nothing is read: the order is a function of the number of samples and shards alone.
"""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.arguments import Parser, positive
from dist_train.bench import writable
from dist_train.data.passes import epoch_order
from dist_train.errors import ConfigError

DATASETS = ((1_281_167, 1282), (14_000_000, 14_000))
RANKS = (1, 8, 64, 1024)
MICRO_BATCH = 32
BATCH = 256
IMAGE_BYTES = 110_000
"""Mean size of an ImageNet JPEG."""

Ids = NDArray[np.int64]


def run(arguments: list[str]) -> int:
    """``dist-train bench order [--window W] [--samples N --shards S] [--json PATH]``."""
    parser = Parser("dist-train bench order", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--window", type=positive, default=16, metavar="W", help="shards shuffled together (data.shuffle_shards)"
    )
    parser.add_argument(
        "--samples", type=positive, metavar="N", help="default: ImageNet's, and 14 million in 14,000 shards"
    )
    parser.add_argument("--shards", type=positive, metavar="S")
    parser.add_argument("--json", type=writable, metavar="PATH", help="write the figures there as well")
    known = parser.parse_args(arguments)
    if (known.samples is None) != (known.shards is None):
        raise ConfigError("--samples and --shards belong together; give both or none")
    datasets = ((known.samples, known.shards),) if known.samples else DATASETS
    if any(shards > samples for samples, shards in datasets):
        raise ConfigError(f"--samples {known.samples} --shards {known.shards}: give as many samples as shards, or more")
    results = [measure(samples, shards, known.window) for samples, shards in datasets]
    for result in results:
        print(_text(result))
    if known.json:
        known.json.write_text(json.dumps(results, indent=1))
    return 0


def measure(samples: int, shards: int, window: int) -> dict[str, Any]:
    """One dataset of equal shards: seconds and peak bytes of a plan, its mixing, its reading by number of ranks."""
    sizes = np.diff(np.arange(shards + 1) * samples // shards)
    start = time.perf_counter()
    order = epoch_order(sizes, 0, 0, window)
    seconds = time.perf_counter() - start
    # A second plan for its memory: tracing every allocation would slow the one that is timed.
    tracemalloc.start()
    epoch_order(sizes, 0, 0, window)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shard = np.repeat(np.arange(shards), sizes)
    full = epoch_order(sizes, 0, 0, shards)
    return {
        "samples": samples,
        "shards": shards,
        "window": window,
        "seconds": seconds,
        "peak_megabytes": peak / 1e6,
        "spread": spread(shard[order], sizes) / spread(shard[full], sizes),
        "shards_per_batch": shards_per_batch(shard[order]),
        "shards_per_batch_full": shards_per_batch(shard[full]),
        "ranks": [reading(order, shard, ranks) for ranks in RANKS if ranks * MICRO_BATCH <= samples],
    }


def spread(shard_of_place: Ids, sizes: Ids) -> float:
    """Mean over the shards of the standard deviation of their samples' places in the order, in places."""
    places = np.arange(len(shard_of_place), dtype=np.float64)
    mean = np.bincount(shard_of_place, places) / sizes
    off = (places - mean[shard_of_place]) ** 2
    return float(np.sqrt(np.bincount(shard_of_place, off) / sizes).mean())


def shards_per_batch(shard_of_place: Ids) -> float:
    """Mean number of different shards in a global batch of 256."""
    whole = shard_of_place[: len(shard_of_place) // BATCH * BATCH].reshape(-1, BATCH)
    return float((np.diff(np.sort(whole, axis=1), axis=1) > 0).sum(axis=1).mean() + 1)


def reading(order: Ids, shard: Ids, ranks: int) -> dict[str, float]:
    """What one of a number of ranks reads in an epoch, at micro batches of 32 and one pass per update."""
    steps = len(order) // (ranks * MICRO_BATCH)
    read = order[: steps * ranks * MICRO_BATCH].reshape(steps, ranks, MICRO_BATCH).transpose(1, 0, 2).reshape(ranks, -1)
    shards = int(shard[-1]) + 1
    per_shard = np.bincount((np.arange(ranks)[:, None] * shards + shard[read]).ravel(), minlength=ranks * shards)
    breaks = np.flatnonzero(np.diff(read.ravel()) != 1)
    return {
        "ranks": ranks,
        "megabytes_per_shard_and_rank": float(per_shard.mean()) * IMAGE_BYTES / 1e6,
        "shards_opened_per_rank": float((per_shard.reshape(ranks, -1) > 0).sum(axis=1).mean()),
        "longest_run": int(np.diff(breaks, prepend=-1, append=read.size - 1).max()),
    }


def _text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['samples']} samples in {result['shards']} shards, window {result['window']}: planned in "
        f"{result['seconds']:.2f} s, {result['peak_megabytes']:.0f} MB at the peak",
        f"  samples of a shard spread over {100 * result['spread']:.2f} % of what a full permutation spreads them",
        f"  a batch of {BATCH} has samples of {result['shards_per_batch']:.1f} shards (full permutation: "
        f"{result['shards_per_batch_full']:.1f})",
        "   ranks  MB per shard and rank  shards opened per rank  longest run of neighbours, samples",
    ]
    for row in result["ranks"]:
        lines.append(
            f"  {row['ranks']:>6}  {row['megabytes_per_shard_and_rank']:>21.3f}  {row['shards_opened_per_rank']:>22.1f}  "
            f"{row['longest_run']:>34}"
        )
    return "\n".join(lines)
