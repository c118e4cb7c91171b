"""Batches on the device: the samples of the order read ahead, decoded ahead, and the unreadable ones dealt with."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.config import Config, DataConfig
from dist_train.data import order
from dist_train.data.augment import parameters
from dist_train.data.decode import Columns, Decoder, is_out_of_memory, machine_fault, words_of
from dist_train.data.mix import mix
from dist_train.data.reader import ShardReader
from dist_train.data.remote import DamagedShardError, ShardCache
from dist_train.data.unreadable import BadSample, UnreadableImages, fault_of
from dist_train.distributed.group import Group
from dist_train.errors import DataError, DeviceError
from dist_train.loss import LabelMix
from shards.images import Unreadable, as_stored
from shards.index import UNLABELED, Index

NO_ID = -1


@dataclass(frozen=True)
class MicroBatch:
    """Images for one forward pass, on the device.

    ``images`` float32 [N, 3, S, S], channels_last, normalised; ``labels`` int64 [N], -100 without a label; ``ids`` int64 [N],
    the samples' places in the index, -1 for an image that could not be read in evaluation (its label is -100).  ``targets``
    is what the loss takes: the labels, or two labels per image where images are mixed.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    targets: torch.Tensor | LabelMix


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's micro batches of one global batch, made as they are iterated, once.

    ``number`` counts the global batches of the epoch from 0; ``labeled`` is the number of samples with a label in the whole
    global batch, over all ranks.
    """

    number: int
    labeled: int
    micro_batches: Iterator[MicroBatch]

    def __iter__(self) -> Iterator[MicroBatch]:
        return self.micro_batches


@dataclass(frozen=True)
class _Fetched:
    """A micro batch before decoding: its places in the epoch's order, its views, and what the decoder takes."""

    positions: NDArray[np.int64]
    views: NDArray[np.int64]
    columns: Columns


class Loader:
    """One split for one rank: in training the epochs of :mod:`dist_train.data.order`, in evaluation every sample once.

    ``bad`` holds the samples that could not be read.  In training each is replaced by the next readable sample of the epoch's
    order, which depends on the order and the files alone, so that resumed runs do the same; in evaluation it is masked
    (label -100, id -1).

    Args:
        index: the split.
        folder: where its shards are, a folder or a URL; of a mixture those of its parts.
        data: how images are varied and normalised; ``max_unreadable`` unreadable ones are tolerated.
        train: training (augmented, shuffled) or evaluation.
        seed: of the order and the augmentation.
        global_batch, micro_batch: samples per update over all ranks, and per forward pass of one rank.
        rank, world_size: this process, and how many there are.
        device: where the batches are wanted.
        threads: decoding threads; ``data.io_threads`` more read.
    """

    def __init__(
        self,
        index: Index,
        folder: Path | str | Sequence[Path | str],
        data: DataConfig,
        *,
        train: bool,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
        threads: int,
    ) -> None:
        self.bad = UnreadableImages(data.max_unreadable, "replaced" if train else "not counted")
        self.order = (
            order.Order(index.shard_sizes, index.label, data, seed, global_batch, weight=index.weight)
            if train
            else None
        )
        self._index = index
        places = [folder] if isinstance(folder, Path | str) else folder
        self._places = " and ".join(map(str, places))
        self._data = data
        self._train = train
        self._seed = seed
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._rank, self._world_size = rank, world_size
        self._device = device
        self._sizes = np.stack([index.height, index.width], axis=1).astype(np.int64)
        self._labeled = index.label != UNLABELED
        self._epoch = 0
        self._order = np.arange(len(index))  # views, see order.py
        urls = [place for place in places if isinstance(place, str)]
        self._cache = ShardCache(index, urls, data) if urls else None
        if self._cache and self.order and not self.order.reads_shards_once and not self._cache.holds_all:
            self._cache.check_order(index.shard[self.order.epoch(0) % len(index)], global_batch)
        # Of a shard that the cache removes, the disk space is free only when it is closed here.
        keep = {"keep_open": 2 * data.shuffle_shards} if self._cache else {}
        self._reader = ShardReader(index, index.folder or Path(places[0]), data.io_threads, self._cache, **keep)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._running: Generator[Any, None, None] | None = None
        self._resized = True
        first = self._parameters(self._order[:1])
        # Where all images have the size that they would be resized to, leaving that step out makes small ones a third faster.
        self._resized = "size" in first and not np.array_equal(
            self._sizes, np.broadcast_to(first["size"], self._sizes.shape)
        )
        steps = tuple(self._parameters(self._order[:1]))
        self._decoder = Decoder(data, steps, micro_batch, device, threads, depth=data.prefetch)
        # For images of a micro batch that was refused: again on the device, and on the CPU to tell whose fault it is.
        self._spare = Decoder(data, steps, 1, device, threads=1, depth=1)
        self._witness = Decoder(data, steps, 1, torch.device("cpu"), threads=1, depth=1)

    @classmethod
    def of_run(cls, config: Config, index: Index, group: Group, *, split: str | None = None) -> Loader:
        """The loader for this rank of a run, of the images that it trains on, or of a split to evaluate."""
        ranks = group.ranks
        return cls(
            index,
            [config.data.location(split)] if split else config.data.training_locations,
            config.data,
            train=split is None,
            seed=config.seed,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=group.device,
            threads=config.data.decode_threads or ranks.threads,
        )

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[GlobalBatch]:
        """The global batches of a training epoch from ``start_batch`` on.

        An epoch may be left midway; starting another pass ends the one before.

        Raises:
            DataError: while iterating, when more than ``max_unreadable`` images could not be read.
        """
        assert self.order is not None, "an evaluation has no epochs"
        self._end_pass()
        self._epoch = epoch
        self._order = self.order.epoch(epoch)
        numbers = range(start_batch, self.order.steps_per_epoch)
        if self._cache and numbers:
            mine = np.concatenate([part for number in numbers for part in self._parts(number)])
            self._expect(self._cache, self._order[mine])
        self._running = batches = self._global_batches(numbers)
        return batches

    @property
    def images(self) -> int:
        """Images of the split; their ids are the numbers below it."""
        return len(self._index)

    @property
    def common_batches(self) -> int:
        """Micro batches of an evaluation that every rank has; some may have one more."""
        return len(self._order) // self._world_size // self._micro_batch

    def evaluation(self, samples: NDArray[np.int64] | None = None) -> Iterator[MicroBatch]:
        """This rank's share of the split, or of these samples of it; over all ranks every one comes once, and a share may be empty.

        Raises:
            DataError: while iterating, when more than ``max_unreadable`` images could not be read.
        """
        assert not self._train, "training goes by epochs"
        self._end_pass()
        self.bad.clear()  # what could not be read in an earlier pass may be back
        share = order.rank_slice(self._order if samples is None else samples, self._rank, self._world_size)
        if self._cache:
            self._expect(self._cache, share)
        self._running = batches = self._micro_batches(iter(order.micro_batches(share, self._micro_batch)))
        return batches

    def encoded(self, sample: int) -> bytes:
        """The file of an image, as it is stored; raises OSError."""
        return self._reader.read(sample).tobytes()

    def close(self) -> None:
        """End what runs, stop the reading thread and close the shards."""
        self._end_pass()
        if self._cache:
            self._cache.close()  # first, so that no reading thread waits for a download
        self._thread.shutdown(cancel_futures=True)
        self._reader.close()

    def _expect(self, cache: ShardCache, views: NDArray[np.int64]) -> None:
        """Have the shards of these views fetched ahead, in the order in which they are first wanted."""
        shards, first = np.unique(self._index.shard[views % len(self._index)], return_index=True)
        cache.expect(shards[np.argsort(first)].tolist())

    def _end_pass(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _global_batches(self, numbers: range) -> Generator[GlobalBatch, None, None]:
        # One stream of micro batches through all global batches, so that those of the next ones are read and decoded while the
        # network is busy with this one.  It is cut into global batches by counting: each takes as many as its parts are.
        micro_batches = self._micro_batches(part for number in numbers for part in self._parts(number))
        try:
            for number in numbers:
                mine = itertools.islice(micro_batches, len(self._parts(number)))
                views = order.global_batch_views(self._order, number, self._global_batch)
                yield GlobalBatch(number, int(self._labeled[views % len(self._index)].sum()), mine)
                # What its user did not take of this global batch must not come in the next one (a deque of no length takes all
                # that is left, and keeps nothing).
                deque(mine, maxlen=0)
            # All have come, but the stream is at its end only once it was asked for another one.  The decoder keeps its pipeline
            # for the next epoch only then, and would else build a new one.
            deque(micro_batches, maxlen=0)
        finally:
            micro_batches.close()

    def _parts(self, number: int) -> list[NDArray[np.int64]]:
        """Places in the order of this rank's micro batches of a global batch."""
        positions = order.batch_positions(len(self._order), number, self._global_batch)
        return order.micro_batches(order.rank_slice(positions, self._rank, self._world_size), self._micro_batch)

    def _micro_batches(self, parts: Iterator[NDArray[np.int64]]) -> Generator[MicroBatch, None, None]:
        """Read, decode and deliver; ``parts`` are places in the order, one array per micro batch.

        A part goes through two queues: ``reading`` until its bytes are there, then ``decoding`` until its images are.  The one
        thread of the loader reads part after part; DALI, which runs ahead by ``prefetch``, takes them by calling ``source``.
        What comes out of DALI is a tensor, or an error, and does not say of which part it is.  It is of the oldest one in
        ``decoding``, because of three things: ``source`` gives the parts in their order and appends each before DALI has it;
        the decoder yields exactly one result per part, also where it fails, and in the order in which it was given them; and
        each result takes one part out, here.  All of this is in the thread that iterates.
        """
        decoding: deque[_Fetched] = deque()
        reading: deque[Future[_Fetched]] = deque()

        def read_ahead() -> None:
            # One more than DALI is ahead, so that the next part is being read while DALI is given this one.
            for part in itertools.islice(parts, self._data.prefetch + 1 - len(reading)):
                reading.append(self._thread.submit(self._fetch, part))

        def source() -> Iterator[Columns]:
            read_ahead()
            while reading:
                decoding.append(reading.popleft().result())
                read_ahead()
                yield decoding[-1].columns

        results = self._decoder.run(source())
        try:
            for result in results:
                fetched = decoding.popleft()
                if isinstance(result, torch.Tensor):
                    ids = fetched.views % len(self._index)
                    yield self._batch(result, fetched.views, ids)
                else:
                    self._check_memory(result, fetched.views, fetched.columns["raw"])
                    yield self._decode_singly(fetched)
        finally:
            # Left midway, by an error or because another pass begins: nobody takes what was read or decoded ahead.
            results.close()
            for future in reading:
                future.cancel()

    def _fetch(self, positions: NDArray[np.int64]) -> _Fetched:
        views = self._order[positions]
        return _Fetched(positions, views, self._columns(views))

    def _columns(self, views: NDArray[np.int64]) -> Columns:
        samples = (views % len(self._index)).tolist()
        # The decoder refuses what is empty, which leads to the same treatment as an image that is damaged.
        raw = self._reader.read_all(samples, failed=lambda sample: np.empty(0, dtype=np.uint8))
        return {"raw": raw, **self._parameters(views)}

    def _parameters(self, views: NDArray[np.int64]) -> dict[str, NDArray[np.int32] | NDArray[np.float32]]:
        sizes = self._sizes[views % len(self._index)]
        columns = parameters(self._data, self._train, self._seed, self._epoch, views, sizes)
        return columns if self._resized else {name: column for name, column in columns.items() if name != "size"}

    def _batch(self, images: torch.Tensor, views: NDArray[np.int64], ids: NDArray[np.int64]) -> MicroBatch:
        known = np.where(ids == NO_ID, UNLABELED, self._index.label[ids])
        labels, samples = (torch.from_numpy(array).to(self._device, non_blocking=True) for array in (known, ids))
        if self._train and (self._data.mixup or self._data.cutmix):
            images, targets = mix(self._data, self._seed, self._epoch, views, images, known)
            return MicroBatch(images, labels, samples, targets)
        return MicroBatch(images, labels, samples, labels)

    def _decode_singly(self, fetched: _Fetched) -> MicroBatch:
        """A micro batch that the decoder refused, image by image, with the bad ones replaced or masked."""
        ids, images = fetched.views % len(self._index), []
        # The view itself first: the decoder has refused all of the micro batch, most often for one image.
        for row, position in enumerate(fetched.positions.tolist()):
            candidates = order.replacements(self._order, position, self._labeled) if self._train else iter(())
            for view in itertools.chain([int(fetched.views[row])], candidates):
                image = self._decode_one(view)
                if image is not None:
                    ids[row] = view % len(self._index)
                    break
            else:
                if self._train:
                    raise DataError(f"no image can be read; check {self._places} with `python -m shards check`")
                ids[row] = NO_ID
                size = self._data.image_size
                image = torch.zeros(1, 3, size, size, device=self._device)
            images.append(image)
        together = torch.cat(images).contiguous(memory_format=torch.channels_last)
        return self._batch(together, fetched.views, ids)

    def _decode_one(self, view: int) -> torch.Tensor | None:
        """A view's image [1, 3, S, S], or None, and the sample noted, if it cannot be read."""
        columns = self._columns(np.array([view]))
        said = ""
        if len(columns["raw"][0]):
            (result,) = self._spare.run([columns])
            if isinstance(result, torch.Tensor):
                return result.clone()  # the decoder uses its memory again for the next image
            self._check_memory(result, np.array([view]), columns["raw"])
            # What the CPU decodes is not damaged: then it is the GPU that cannot, and would not the next image either.
            if self._spare.on_gpu and isinstance(next(self._witness.run([columns])), torch.Tensor):
                raise DeviceError(machine_fault(result))
            said = words_of(result)
        self._note_bad(view % len(self._index), columns["raw"][0], said)
        return None

    def _check_memory(self, error: RuntimeError, views: NDArray[np.int64], raw: Sequence[NDArray[np.uint8]]) -> None:
        """Raise DeviceError where memory ran out, unless an image asked for it: one that claims another size than in the index."""
        if not is_out_of_memory(error):
            return
        for sample, data in zip((views % len(self._index)).tolist(), raw):
            try:
                image = as_stored(data.tobytes())
                if (image.width, image.height) != (self._index.width[sample], self._index.height[sample]):
                    return
            except Unreadable:
                return
        raise DeviceError(machine_fault(error))

    def _note_bad(self, sample: int, raw: NDArray[np.uint8], said: str) -> None:
        """Note an image that could not be read; ``said`` is what the decoder says."""
        if sample not in self.bad:
            key = f"{self._index.key[sample].decode()}.{self._index.ext[sample].decode()}"
            shard = self._index.shards[self._index.shard[sample]].name
            self.bad.note(sample, BadSample(shard, key, self._reason(sample, raw, said)))

    def _reason(self, sample: int, raw: NDArray[np.uint8], said: str) -> str:
        reason = None
        if not len(raw):
            try:
                self._reader.read(sample)
            except DamagedShardError as error:
                reason = str(error)
        reason = reason or fault_of(raw) or f"the decoder cannot read it ({said})"
        return f"{reason} (the shard was changed while it was in use)" if self._reader.changed(sample) else reason
