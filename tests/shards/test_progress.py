"""Reading ahead where the disk is slow, and the line that says what limits."""

from __future__ import annotations

import threading
import time
import types
from pathlib import Path

import pytest

from shards.processes import Work
from shards.progress import Progress, limit
from shards.readahead import ReadAhead
from shards.source import Item


@pytest.mark.parametrize("seconds", [0.0, 0.004])
def test_items_come_in_order_with_their_bytes_or_errors(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]  # of its own, for on a busy machine anything may take long
    monkeypatch.setattr("shards.readahead.time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    items = [Item(f"{n}", 0, 100_000) for n in range(200)]
    threads = set()

    def read(item: Item) -> bytes:
        time.sleep(seconds)
        clock[0] += seconds
        threads.add(threading.current_thread().name)
        if item.name.endswith("7"):
            raise FileNotFoundError(item.name)
        return item.name.encode()

    source = ReadAhead(items, read)
    found = []
    before = threading.active_count()
    for pair in source:
        found.append(pair)
        clock[0] += 0.001  # packing
    assert [item for item, _ in found] == items
    assert all(
        str(data) == item.name if item.name.endswith("7") else data == item.name.encode() for item, data in found
    )
    assert source.bytes == sum(len(item.name) for item in items if not item.name.endswith("7"))
    assert (len(threads) > 2) == bool(seconds)  # one alone, where reading costs nothing
    assert threading.active_count() == before


def test_a_loop_that_is_left_leaves_no_thread() -> None:
    items = [Item(f"{n}", 0, 600_000) for n in range(50)]
    before = threading.active_count()
    for _ in ReadAhead(items, lambda item: time.sleep(0.01) or b""):  # type: ignore[func-returns-value]
        break
    assert threading.active_count() == before


def test_the_line_says_what_limits(capsys: pytest.CaptureFixture[str]) -> None:
    cases = ((0.9, 0.0, "waits for reading"), (0.1, 0.8, "waits for writing"), (0.2, 0.2, "limited by the processor"))
    for reading, writing, words in cases:
        work = Work(1000, 110_000_000, 2.0, 2 * reading, 2 * writing)
        assert limit([work]) == words
        progress = Progress()
        progress._printed -= 60
        progress("train", 1000, 3000, work)
        line = capsys.readouterr().err
        assert line.startswith("train: 1000 of 3000 images, 500/s, 55 MB/s, " + words + ", 0:04 left"), line


def test_an_empty_shard_reads_nothing(tmp_path: Path) -> None:
    assert list(ReadAhead([], lambda _: b"")) == []
