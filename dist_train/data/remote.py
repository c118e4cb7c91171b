"""Shards behind a URL: whole files brought by fsspec into a local folder, which all processes of a node share.

    CACHE/<hash of the split's URL>/index.json           fetched at every start
    CACHE/<hash of the split's URL>/HASH-NAME.tar        whole, and of the SHA-256 that begins with HASH, or absent
    CACHE/<hash of the split's URL>/.HASH-NAME.tar.lock  held by the process that fetches it
    CACHE/<hash of the split's URL>/.HASH-NAME.tar.N.tmp what it has of the N bytes, for which room is kept

The hash is that of the index, so that shards made anew behind the same URL are never mistaken for those of before.  Past the size limit the shards that were not used for longest are removed; who has one open can go on reading it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.config import DataConfig
from dist_train.errors import ConfigError, StorageError
from dist_train.files import flush
from dist_train.files import sha256 as sha256_of
from shards.index import Index, Shard

log = logging.getLogger("dist_train")

BESIDE = ("index.bin", "quarantine.json")
"""Files that belong to the index where they are there."""
_PAUSES = (0.0, 0.5, 2.0, 8.0)
"""Seconds before each attempt to fetch a file; the last failure ends the run, so they outlast a server's short refusals."""
_AT_ONCE = 4
"""Shards fetched ahead at the same time by one process."""


_MOST_FETCHES = 10
"""Per shard and epoch.  More are a cache that holds none of them until it is wanted again: hours of waiting, and fees."""

_OWN = re.compile(r"[0-9a-f]{16}/[0-9a-f]{16}-[^/]*\.tar")
_OWN_DRAFT = re.compile(r"[0-9a-f]{16}/\.[0-9a-f]{16}-[^/]*\.tar\.\d+\.tmp")
"""The shards in the cache, below its folder."""
_WHEN_IT_IS_BACK = "when it is back, run the same command again"


class DamagedShardError(OSError):
    """A shard that can be reached and is not what the index says: fetching or reading it once more would not help."""


class ShardCache:
    """The shards of a split behind a URL, fetched when they are wanted and ahead of that.  For any number of threads.

    Args:
        index: the split, its shards named as in the cache (:func:`dist_train.data.split.open_split` does it), or a mixture
            of such ones and of splits on this machine.
        urls: where its shards are, of a mixture one for every part that is behind one.
        data: folder and size of the cache, and the window.

    Raises:
        ConfigError: the shards of a window do not fit into the cache.
    """

    def __init__(self, index: Index, urls: Sequence[str], data: DataConfig) -> None:
        self._shards = index.shards
        root = local_folder(data, urls[0]).parent
        self._room_lock = root / ".room.lock"
        # The shards of a mixture have whole names, with the folder of their part; those that lie elsewhere are not fetched.
        places = {local_folder(data, url).resolve(): (url, file_system(url)) for url in urls}
        self._paths = [local_folder(data, urls[0]).resolve() / shard.name for shard in index.shards]
        self._places = [places.get(path.parent) for path in self._paths]
        self._limit = int(data.cache_gb * 1e9)
        fetched = (shard.bytes for shard, place in zip(index.shards, self._places) if place)
        largest = sorted(fetched, reverse=True)
        self._bytes = sum(largest)
        # One shard more than a window, so that the next one can come while all of a window are in use.
        needed = sum(largest[: data.shuffle_shards + 1])
        if needed > self._limit:
            raise ConfigError(
                f"data.cache_gb is {data.cache_gb:g}, but {data.shuffle_shards + 1} shards (data.shuffle_shards and one more) take "
                f"{needed / 1e9:.3g} GB; raise it, or lower data.shuffle_shards"
            )
        # Half of the room is for what comes next, half for what is in use.
        self._ahead = max(1, int(self._limit / 2 / max([1, *largest[:1]])))
        self._sequence: Sequence[int] = ()
        self._place: dict[int, int] = {}
        self._reached = self._next = 0
        self._damaged: dict[int, DamagedShardError] = {}
        self._moved = threading.Condition()
        self._closed: Future[None] = Future()
        self._threads: list[threading.Thread] = []

    @property
    def holds_all(self) -> bool:
        """Whether all shards fit at the same time."""
        return self._bytes <= self._limit

    def check_order(self, shards: NDArray[np.integer[Any]], at_once: int) -> None:
        """Refuse an epoch for which shards would be fetched again and again.

        Args:
            shards: of every view of the epoch, in their order.
            at_once: views of a global batch.

        Raises:
            ConfigError: they would come more than ten times on average.
        """
        kept: OrderedDict[int, int] = OrderedDict()
        used = fetched = volume = 0
        for first in range(0, len(shards), at_once):
            for shard in np.unique(shards[first : first + at_once]).tolist():
                if shard in kept:
                    kept.move_to_end(shard)
                    continue
                kept[shard] = self._shards[shard].bytes if self._places[shard] else 0
                used += kept[shard]
                volume += kept[shard]
                fetched += bool(kept[shard])
                while used > self._limit:
                    used -= kept.popitem(last=False)[1]
        if fetched > _MOST_FETCHES * sum(place is not None for place in self._places):
            raise ConfigError(
                f"data.cache_gb is {self._limit / 1e9:g}, with which an epoch in this order (class_balanced, labeled_fraction or weights) would "
                f"fetch {fetched:,} shards, {volume / 1e9:,.3g} GB; raise it to {self._bytes / 1e9:.3g}, which holds all of them"
            )

    def expect(self, shards: Sequence[int]) -> None:
        """Say in which order shards will be wanted; they are fetched ahead in it, as far as half of the cache reaches."""
        with self._moved:
            self._sequence, self._place = shards, {shard: place for place, shard in enumerate(shards)}
            self._reached = self._next = 0
            self._moved.notify_all()
        while len(self._threads) < _AT_ONCE:
            # Daemons: a process that ends does not wait for their downloads.
            self._threads.append(threading.Thread(target=self._fetch_ahead, name="fetch", daemon=True))
            self._threads[-1].start()

    def path(self, shard: int) -> Path:
        """Where a shard is on this machine; waits for it, until the cache is closed.

        Raises:
            DamagedShardError: what can be fetched is not what the index says; it is not fetched again.
            StorageError: it cannot be fetched, or the cache was closed.
            OSError: the cache's own folder cannot be used.
        """
        with self._moved:
            self._reached = max(self._reached, self._place.get(shard, 0))
            self._moved.notify_all()
        if shard in self._damaged:
            raise self._damaged[shard]
        if self._places[shard] is None or self._used(shard):
            return self.local(shard)
        # A download cannot be interrupted.  In a thread of its own, nobody has to wait for it once the cache is closed.
        obtained: Future[Path] = Future()
        threading.Thread(target=self._fulfil, args=(obtained, shard), name="fetch", daemon=True).start()
        either: tuple[Future[Any], ...] = (obtained, self._closed)
        wait(either, return_when=FIRST_COMPLETED)
        if not obtained.done():
            raise StorageError(f"{self._url(shard)}: the cache was closed while it was fetched")
        return obtained.result()

    def local(self, shard: int) -> Path:
        """The file in which a shard is, or will be."""
        return self._paths[shard]

    def _url(self, shard: int) -> str:
        """Where a shard comes from."""
        place = self._places[shard]
        assert place is not None
        return f"{place[0]}/{self._paths[shard].name.removeprefix(_prefix(self._shards[shard]))}"

    def close(self) -> None:
        """End the fetching ahead, and the waiting for what is being fetched, without waiting for it: a stop is urgent."""
        with self._moved:
            if not self._closed.done():
                self._closed.set_result(None)
            self._moved.notify_all()

    def _fetch_ahead(self) -> None:
        while True:
            with self._moved:
                self._moved.wait_for(
                    lambda: (
                        self._closed.done() or self._next < min(len(self._sequence), self._reached + 1 + self._ahead)
                    )
                )
                if self._closed.done():
                    return
                shard = self._sequence[self._next]
                self._next += 1
            # Whoever reads it is told of a failure then.
            with contextlib.suppress(OSError, StorageError):
                self._obtain(shard, wait=False)

    def _fulfil(self, obtained: Future[Path], shard: int) -> None:
        try:
            obtained.set_result(self._obtain(shard, wait=True))
        except Exception as error:  # any: who waits for it raises it
            obtained.set_exception(error)

    def _obtain(self, shard: int, wait: bool) -> Path:
        target = self.local(shard)
        if self._places[shard] is None or self._used(shard):
            return target
        with _lock(target.with_name(f".{target.name}.lock"), wait) as mine:
            # Without waiting, a shard that another process fetches already is left to it.
            if mine and shard in self._damaged:  # another thread has found that out while this one waited
                raise self._damaged[shard]
            # Who fetches ahead and comes too late, the shard being read and perhaps removed by now, leaves it to the readers.
            late = not wait and self._place.get(shard, 0) < self._reached
            if mine and not late and not self._used(shard):
                try:
                    self._fetch(shard, target)
                except DamagedShardError as error:
                    self._damaged[shard] = error
                    raise
        return target

    def _used(self, shard: int) -> bool:
        """Whether the file is there, which its time then tells the other processes to be in use."""
        path = self.local(shard)
        try:
            os.utime(path)
            # A machine that lost power can leave a file that has its name and not yet its bytes.
            return path.stat().st_size == self._shards[shard].bytes
        except FileNotFoundError:
            return False

    def _fetch(self, shard: int, target: Path) -> None:
        expected, place = self._shards[shard], self._places[shard]
        assert place is not None
        draft = target.with_name(f".{target.name}.{expected.bytes}.tmp")
        # Left by a process that was killed, it would be counted beside what is wanted now.
        draft.unlink(missing_ok=True)
        try:
            self._make_room(expected.bytes, draft)
            try:
                fetch(place[1], self._url(shard), draft, expected.sha256)
            except (FileNotFoundError, PermissionError) as error:  # the index names it
                raise StorageError(f"{error}; {_WHEN_IT_IS_BACK}") from None
            flush(draft)  # after a loss of power, the name would stand for what is not on the disk
            # Who makes room would else count it neither among the drafts nor among the shards, or in both.
            with self._room():
                os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)

    def _room(self) -> contextlib.AbstractContextManager[bool]:
        """Hold what is counted as it is."""
        return _lock(self._room_lock)

    def _make_room(self, wanted: int, draft: Path) -> None:
        """Remove what was not used for longest until there is room for the draft, which is begun."""
        root = self._room_lock.parent
        with self._room():
            kept = []
            for path in root.glob("*/*.tar"):
                # Whatever else lies in the folder that data.cache names is not the cache's.
                if not _OWN.fullmatch(path.relative_to(root).as_posix()):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    kept.append((status.st_mtime_ns, status.st_size, path))
            drafts = [
                path for path in root.glob("*/.*.tar.*.tmp") if _OWN_DRAFT.fullmatch(path.relative_to(root).as_posix())
            ]
            coming = sum(map(_reserved, drafts))
            excess = sum(size for _, size, _ in kept) + coming + wanted - self._limit
            for _, size, path in sorted(kept):
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= size
            # Under the lock, so that the next one who makes room counts it.
            draft.touch()


def named_as_cached(index: Index) -> Index:
    """The index of a split behind a URL, with its shards named as in the cache: ``folder / name`` is the file, as elsewhere."""
    return replace(index, shards=tuple(replace(shard, name=_prefix(shard) + shard.name) for shard in index.shards))


def _prefix(shard: Shard) -> str:
    return f"{shard.sha256[:16]}-"


def _reserved(draft: Path) -> int:
    """Bytes that an unfinished file will take; one whose process has died is removed."""
    name, _, size = draft.name.removesuffix(".tmp").rpartition(".")
    with _lock(draft.with_name(f"{name}.lock"), wait=False) as abandoned:
        if abandoned:
            draft.unlink(missing_ok=True)
            return 0
    return int(size)


def fetch(files: Any, url: str, target: Path, sha256: str | None = None) -> None:
    """Bring a file, in several attempts, and check it.

    Raises:
        FileNotFoundError: it is not there.
        PermissionError: the server forbids it, as some say of what is not there.
        DamagedShardError: it has another hash each time.
        StorageError: anything else, which may be over when the same command is run again.
    """
    for attempt, pause in enumerate(_PAUSES, start=1):
        time.sleep(pause)
        damaged = False
        try:
            files.get_file(files._strip_protocol(url), str(target))
            found = sha256_of(target) if sha256 else None
        except FileNotFoundError:
            raise FileNotFoundError(f"{url}: is not there") from None
        except Exception as error:  # every driver has its own kinds
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
                raise StorageError(
                    f"{target}: cannot be written ({error.strerror}); free space, or lower data.cache_gb"
                ) from None
            if _is_forbidden(error):
                raise PermissionError(f"{url}: the server forbids it (403)") from None
            fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            if found == sha256:
                return
            damaged = True
            fault = f"it has SHA-256 {str(found)[:12]}, the index says {str(sha256)[:12]}"
        if attempt < len(_PAUSES):
            log.warning("%s: %s; trying again", url, fault)
    target.unlink(missing_ok=True)
    if damaged:
        raise DamagedShardError(f"{url}: cannot be used ({fault})")
    raise StorageError(f"{url}: cannot be fetched ({fault}); check the URL and the network; {_WHEN_IT_IS_BACK}")


def _is_forbidden(error: Exception) -> bool:
    """Whether a server answered 403, in the words of the drivers of https, s3 and gs, in this order."""
    return (
        getattr(error, "status", None) == 403
        or (isinstance(error, PermissionError) and error.filename is None)  # else it is about a file of this machine
        or (isinstance(error, OSError) and str(error).startswith("Forbidden"))
    )


def file_system(url: str) -> Any:
    """The fsspec file system behind a URL; raises ConfigError for one of an unknown kind, or without its driver."""
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


def local_folder(data: DataConfig, url: str) -> Path:
    """Folder of the cache for the shards behind a URL."""
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
