"""Shards behind a URL: whole files brought by fsspec into a local folder, which all processes of a node share.

    CACHE/<hash of the split's URL>/index.json      fetched at every start
    CACHE/<hash of the split's URL>/NAME.tar        whole, and checked against the index, or absent
    CACHE/<hash of the split's URL>/.NAME.tar.lock  held by the process that fetches it
    CACHE/<hash of the split's URL>/.NAME.tar.N.tmp what it has of the N bytes, for which room is kept

Past the size limit the shards that were not used for longest are removed; who has one open can go on reading it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_train.config import DataConfig
from dist_train.errors import ConfigError, DataError
from shards.index import FILE, Index, file_sha256

log = logging.getLogger("dist_train")

_BESIDE = ("index.bin", "quarantine.json")
"""Files that belong to the index where they are there."""
_PAUSES = (0.0, 0.5, 2.0)
"""Seconds before each attempt to fetch a file."""
_FAILED_FOR = 60.0
"""Seconds for which a shard that could not be fetched is not tried again."""
_AT_ONCE = 4
"""Shards fetched ahead at the same time by one process."""


def open_index(data: DataConfig, split: str) -> Index:
    """The index of a split, fetched first where ``data.shards`` is a URL.

    Raises:
        DataError: no index there, or one that cannot be read.
        ConfigError: a URL of an unknown kind, or one whose driver is not installed.
    """
    place = data.location(split)
    if isinstance(place, Path):
        return Index.load(place)
    folder = _local(data, place)
    folder.mkdir(parents=True, exist_ok=True)
    files = _file_system(place)
    for name in (FILE, *_BESIDE):
        draft = folder / f".{name}.{os.getpid()}.tmp"
        try:
            _fetch(files, f"{place}/{name}", draft)
        except FileNotFoundError:
            if name == FILE:
                raise DataError(f"{place}: has no {FILE}; give the URL of a folder that `shards make` wrote") from None
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{error}; check the URL and the network") from None
        else:
            os.replace(draft, folder / name)
    return Index.load(folder)


class ShardCache:
    """The shards of a split behind a URL, fetched when they are wanted and ahead of that.  For any number of threads.

    Args:
        index: the split, from :func:`open_index`.
        url: where its shards are.
        data: folder and size of the cache, and the window.

    Raises:
        ConfigError: the shards of a window do not fit into the cache.
    """

    def __init__(self, index: Index, url: str, data: DataConfig) -> None:
        self._shards, self._url = index.shards, url
        self._folder = _local(data, url)
        self._files = _file_system(url)
        self._limit = int(data.cache_gb * 1e9)
        largest = sorted((shard.bytes for shard in index.shards), reverse=True)
        # One shard more than a window, so that the next one can come while all of a window are in use.
        needed = sum(largest[: data.window + 1])
        if needed > self._limit:
            raise ConfigError(
                f"data.cache_gb is {data.cache_gb:g}, but {data.window + 1} shards (data.window and one more) take "
                f"{needed / 1e9:.3g} GB; raise it, or lower data.window"
            )
        # Half of the room is for what comes next, half for what is in use.
        self._ahead = max(1, int(self._limit / 2 / max(1, largest[0])))
        self._sequence: Sequence[int] = ()
        self._place: dict[int, int] = {}
        self._reached = self._next = 0
        self._failed: dict[int, tuple[float, OSError]] = {}
        self._moved = threading.Condition()
        self._closed = False
        self._threads: list[threading.Thread] = []

    def expect(self, shards: Sequence[int]) -> None:
        """Say in which order shards will be wanted; they are fetched ahead in it, as far as half of the cache reaches."""
        with self._moved:
            self._sequence, self._place = shards, {shard: place for place, shard in enumerate(shards)}
            self._reached = self._next = 0
            self._moved.notify_all()
        while len(self._threads) < _AT_ONCE:
            self._threads.append(threading.Thread(target=self._fetch_ahead, name="fetch", daemon=True))
            self._threads[-1].start()

    def path(self, shard: int) -> Path:
        """Where a shard is on this machine; waits for it.

        Raises:
            OSError: it cannot be fetched, or is not what the index says.
        """
        with self._moved:
            self._reached = max(self._reached, self._place.get(shard, 0))
            self._moved.notify_all()
            since, error = self._failed.get(shard, (-_FAILED_FOR, OSError()))
        if time.monotonic() - since < _FAILED_FOR:
            raise error
        return self._obtain(shard, wait=True)

    def close(self) -> None:
        """End the fetching ahead."""
        with self._moved:
            self._closed = True
            self._moved.notify_all()
        for thread in self._threads:
            thread.join()

    def _fetch_ahead(self) -> None:
        while True:
            with self._moved:
                self._moved.wait_for(
                    lambda: self._closed or self._next < min(len(self._sequence), self._reached + 1 + self._ahead)
                )
                if self._closed:
                    return
                shard = self._sequence[self._next]
                self._next += 1
            # Whoever reads it is told of a failure then.
            with contextlib.suppress(OSError):
                self._obtain(shard, wait=False)

    def _obtain(self, shard: int, wait: bool) -> Path:
        target = self._folder / self._shards[shard].name
        if self._used(target):
            return target
        with _lock(target.with_name(f".{target.name}.lock"), wait) as mine:
            # Without waiting, a shard that another process fetches already is left to it.
            if mine and not self._used(target):
                try:
                    self._fetch(shard, target)
                except OSError as error:
                    with self._moved:
                        self._failed[shard] = time.monotonic(), error
                    raise
        return target

    @staticmethod
    def _used(path: Path) -> bool:
        """Whether the file is there, which its time then tells the other processes to be in use."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, shard: int, target: Path) -> None:
        expected = self._shards[shard]
        draft = target.with_name(f".{target.name}.{expected.bytes}.tmp")
        try:
            self._make_room(expected.bytes, draft)
            _fetch(self._files, f"{self._url}/{expected.name}", draft, expected.sha256)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)

    def _make_room(self, wanted: int, draft: Path) -> None:
        """Remove what was not used for longest until there is room for the draft, which is begun."""
        root = self._folder.parent
        with _lock(root / ".room.lock"):
            kept = []
            for path in root.glob("*/*.tar"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    kept.append((status.st_mtime_ns, status.st_size, path))
            coming = sum(_reserved(path) for path in root.glob("*/.*.tar.*.tmp"))
            excess = sum(size for _, size, _ in kept) + coming + wanted - self._limit
            for _, size, path in sorted(kept):
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= size
            draft.touch()


def _reserved(draft: Path) -> int:
    """Bytes that an unfinished file will take; one whose process has died is removed."""
    name, _, size = draft.name.removesuffix(".tmp").rpartition(".")
    with _lock(draft.with_name(f"{name}.lock"), wait=False) as abandoned:
        if abandoned:
            draft.unlink(missing_ok=True)
            return 0
    return int(size)


def _fetch(files: Any, url: str, target: Path, sha256: str | None = None) -> None:
    """Bring a file, in several attempts, and check it; raises OSError with what went wrong in the last one."""
    for attempt, pause in enumerate(_PAUSES, start=1):
        time.sleep(pause)
        try:
            files.get_file(files._strip_protocol(url), str(target))
            found = file_sha256(target) if sha256 else None
        except FileNotFoundError:
            raise
        except Exception as error:  # every driver has its own kinds
            fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            if found == sha256:
                return
            fault = f"it has SHA-256 {str(found)[:12]}, the index says {str(sha256)[:12]}"
        if attempt < len(_PAUSES):
            log.warning("%s: %s; trying again", url, fault)
    target.unlink(missing_ok=True)
    raise OSError(f"{url}: cannot be fetched ({fault})")


def _file_system(url: str) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        try:
            import aiohttp
        except ImportError:
            raise ConfigError(f"{url}: needs aiohttp; pip install aiohttp") from None
        # The usual limit of five minutes is for the whole file, and a shard may well take longer.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}
    try:
        files, _ = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url}: cannot be opened ({error}); data.shards takes s3://, gs:// or https://") from None
    return files


def _local(data: DataConfig, url: str) -> Path:
    root = data.cache or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dist_train"
    return root / hashlib.sha256(url.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock among the node's threads and processes; gives whether it is held.  A process that dies lets go of it."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
