"""Making that was killed resumes with the same command, and gives the bytes of one that was not."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from dist_train.errors import DataError
from shards.__main__ import main
from shards.make import drafts_in
from tests.common import LIMIT, tree

WORDS = ["--val-per-class", "4", "--max-size", "24"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 100 images, and a file that is none."""
    folder = tmp_path_factory.mktemp("source")
    random_numbers = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number in range(100):
            noise = random_numbers.integers(0, 255, (128, 160, 3)).astype(np.uint8)
            Image.fromarray(noise).save(folder / name / f"{number}.png")
    (folder / "cat" / "text.jpg").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(["make", "folder", str(source), str(out), "--shard-size", "4", *WORDS]) == 0
    return tree(out)


def test_killed_at_ten_random_moments(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out, moments = tmp_path / "out", random.Random(0)

    def finished() -> int:
        return len(list(out.glob(".making/*/*/shard-*.json")))

    command = [sys.executable, "-m", "shards", "make", "folder", str(source), str(out), "--shard-size", "4", *WORDS]
    seen = []
    for turn in range(10):
        process = subprocess.Popen([*command, "--workers", str(1 + turn % 3)], stderr=subprocess.PIPE)
        enough = finished() + moments.choice((0, 1, 1, 2))
        while finished() < enough and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.02 if enough else 0.3))
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
        assert set(os.listdir(out) if out.exists() else []) <= {".making"}
        seen.append(finished())
    assert len({*seen, 50}) > 4, f"no kill came amid the shards: {seen}"
    subprocess.run([*command, "--workers", "2"], check=True, capture_output=True)
    assert tree(out) == whole


def test_a_worker_that_is_killed_is_one_line_and_the_same_command_goes_on(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["make", "folder", str(source), str(out), "--shard-size", "4", *WORDS]
    process = subprocess.Popen(
        [sys.executable, "-m", "shards", *words, "--workers", "2"], stderr=subprocess.PIPE, text=True
    )
    while not list(out.glob(".making/*/*/shard-*.json")):
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    workers[0].kill()
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1
    assert "a worker process was killed, perhaps for want of memory; run the same command again" in errors
    kept = len(list(out.glob(".making/*/*/shard-*.json")))
    assert kept > 0
    assert main(words) == 0
    assert tree(out) == whole


def die_at(step: int) -> None:
    """Let this process kill itself before its n-th call that makes something lasting."""
    calls = itertools.count(1)

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    for name in ("replace", "rename", "fsync", "unlink", "mkdir"):
        setattr(os, name, wrapped(getattr(os, name)))


def test_killed_at_every_step(source: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    for name in ("cat", "dog"):
        (few / name).mkdir(parents=True)
        for number in range(4):
            os.link(source / name / f"{number}.png", few / name / f"{number}.png")
    words = ["--shard-size", "3", "--val-per-class", "1", "--workers", "1"]
    assert main(["make", "folder", str(few), str(tmp_path / "whole"), *words]) == 0
    expected = tree(tmp_path / "whole")
    for step in range(1, 200):
        arguments = ["make", "folder", str(few), str(tmp_path / f"out{step}"), *words]
        child = os.fork()
        if child == 0:
            die_at(step)
            os._exit(main(arguments))
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            assert step > 30
            break
        found = {path.name for path in (tmp_path / f"out{step}").glob("[!.]*")}
        assert found <= {"train", "val"}
        for split in found:  # what has its final name is whole
            part = tree(tmp_path / f"out{step}" / split)
            assert part == tree(tmp_path / "whole" / split)
        if found != {"train", "val"} or list((tmp_path / f"out{step}").glob(".ma*")):
            assert main(arguments) == 0
        assert tree(tmp_path / f"out{step}") == expected, f"killed at step {step}"


def test_other_options_do_not_take_over_what_was_begun(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["make", "folder", str(source), str(out), "--shard-size", "4", *WORDS]
    process = subprocess.Popen([sys.executable, "-m", "shards", *words, "--quality", "50", "--workers", "1"])
    while not list(out.glob(".making/*/*/shard-*.json")) and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert main(words) == 0
    assert tree(out) == whole


def test_two_at_once_are_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    (tmp_path / "out" / ".making").mkdir(parents=True)
    with open(tmp_path / "out" / ".making" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["make", "folder", str(source), str(tmp_path / "out")]) == 2
    assert "another process is making shards there" in capsys.readouterr().err
    assert (tmp_path / "out" / ".making" / "lock").exists()


def test_a_lock_that_went_with_its_folder_keeps_others_out_all_the_same(tmp_path: Path) -> None:
    """One waits for the lock while its holder removes the folder: what it gets is the lock of the new folder."""
    out, found = tmp_path / "out", []

    def wait() -> None:
        with drafts_in(out) as drafts:
            with pytest.raises(DataError, match="another process is making shards there"), drafts_in(out):
                pass
            found.append((drafts / "lock").exists())

    with drafts_in(out) as drafts:
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.3)
        shutil.rmtree(drafts)
    waiting.join()
    assert found == [True]
