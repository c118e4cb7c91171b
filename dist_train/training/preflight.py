"""The checks before a run: whatever is wrong is found here, before a process group exists."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.nn import GroupNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from dist_train.config import Config, accumulation_steps
from dist_train.config_file import load_config
from dist_train.data.order import Order
from dist_train.data.split import KeptQuarantine, open_split, open_training
from dist_train.distributed.group import Group, Ranks
from dist_train.distributed.lock import RunLock
from dist_train.errors import ConfigError, DataError, StorageError, UserError
from dist_train.loss import ExitDistillation
from dist_train.models import MultiExitNetwork, build_model, load_pretrained
from dist_train.models.cost import cost_columns
from dist_train.models.parts import exit_parts, part_of, trained_parts
from dist_train.training.outside_teachers import check_teachers, teacher_folders, try_teachers
from dist_train.training.resume import ResumePoint, has_ended, resume_point
from dist_train.training.zero import chosen_stage
from shards.index import Index
from shards.index_file import FILE


@dataclass(frozen=True)
class Preflight:
    """A run that can start: its data, its untrained network, its batch arithmetic."""

    config: Config
    train: Index
    val: Index
    model: MultiExitNetwork
    accumulation_steps: int
    """Forward passes accumulated per update on every rank."""
    steps_per_epoch: int
    zero_stage: int
    """As it was chosen, where the configuration says auto."""

    @cached_property
    def costs(self) -> dict[str, list[float]]:
        """Per kind of cost, that of every exit, see :func:`dist_train.models.cost.cost_columns`."""
        return cost_columns(self.model, self.config.data.image_size)


def preflight(config: Config, ranks: Ranks) -> Preflight:
    """Check a configuration against the device, the shards and the run folder, and build the network.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    # In the order of cost: what takes no reading comes first, the network last.
    check_device(config, ranks.device)
    steps = accumulation_steps(config.train, ranks.world_size)
    val, train = _open_data(config)
    if train.classes != val.classes:
        raise DataError(
            f"{config.data.shards}: {config.data.train} and {config.data.val} have different classes; make them together"
        )
    # An order knows without reading how long an epoch is: none, if a global batch is larger than the split.
    batch = config.train.global_batch
    order = Order(train.shard_sizes, train.label, config.data, config.seed, batch, weight=train.weight)
    if order.steps_per_epoch == 0:
        raise ConfigError(
            f"train.global_batch is {config.train.global_batch}, but {config.data.train_name} has only {order.pass_size} images; "
            "use a smaller one, or data.last_batch: wrap"
        )
    model = build_model(config.model, len(train.classes), config.data.image_size)
    # For its checks: what is given per exit has to fit the number of exits.
    ExitDistillation.from_config(config.loss, model.num_exits)
    if config.loss.distill_loss == "dkd" and len(train.classes) < 2:
        raise ConfigError("loss.distill_loss is dkd, which needs two classes or more; use kl")
    _check_norms(model, config, ranks.world_size)
    _check_writable(config.folder)
    stage = chosen_stage(config, model, ranks.world_size)
    if not has_ended(config, order.steps_per_epoch):  # a run that is done needs no teachers
        with _mounted(config, teacher_folders):
            check_teachers(config, stage, train.classes)
    return Preflight(config, train, val, model, steps, order.steps_per_epoch, stage)


def check_device(config: Config, device: torch.device) -> None:
    """Raise ConfigError for a precision, ZeRO stage or option that the device cannot do."""
    train = config.train
    if (
        train.precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ConfigError("train.precision is bf16, which this GPU does not have; use fp16 or fp32")
    if config.data.decoder == "gpu" and device.type == "cpu":
        raise ConfigError("data.decoder is gpu, but there is no GPU here; set auto or cpu")
    if train.sync_bn and device.type == "cpu":
        raise ConfigError("train.sync_bn is true, which needs a GPU; set it to false")


def check_start(path: str, overrides: Sequence[str], processes: int) -> None:
    """What a launcher checks, once, before it starts processes: preflight, and where the run would resume.

    Args:
        path: the configuration.
        overrides: of its fields.
        processes: of the whole run.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    config = load_config(path, *overrides)
    # Here, so that it is said once, and before the ranks have spent time on their imports.
    RunLock(config.folder).refuse_if_held()
    check_processes(config, Ranks(0, processes, 0, processes))


def check_processes(config: Config, ranks: Ranks) -> tuple[Preflight, ResumePoint | None]:
    """:func:`preflight`, and the checkpoint that the run would resume from, which must be one of this run.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    ready = preflight(config, ranks)
    resume = resume_point(config, ready.train, ready.val)
    # A resumed run takes its weights from the checkpoint: the pretrained file may be gone by then.
    if resume is None:
        load_first_weights(config, ready.model)
    if not has_ended(config, ready.steps_per_epoch):
        try_teachers(config, ready.train.classes)
    return ready, resume


def check_same_data(group: Group, ready: Preflight) -> None:
    """Refuse ranks that read other images, as of copies of the shards on the nodes' own disks; all ranks must call.

    The order of an epoch follows from the images, so each rank would make one of its own, and images would come twice or never.

    Raises:
        DataError: names the first host whose data differ from rank 0's.
    """
    found = []
    for index in (ready.train, ready.val):
        content = hashlib.sha256(index.fingerprint.encode())
        for column in (index.shard, index.offset):  # without those that are left out as unreadable
            content.update(np.ascontiguousarray(column).tobytes())
        found.append((content.hexdigest(), len(index)))
    seen = group.gather((socket.gethostname(), *found))

    def compare() -> None:
        assert seen is not None  # on rank 0
        host, *first = seen[0]
        for rank, (other, *theirs) in enumerate(seen):
            for name, mine, its in zip((ready.config.data.train_name, ready.config.data.val), first, theirs):
                if mine != its:
                    raise DataError(
                        f"{name} has {mine[1]} images for rank 0 on {host}, and {its[1]} or others for rank {rank} on {other}; give all nodes "
                        "the same shards and the same quarantine.json"
                    )

    group.on_rank0(compare)


def load_first_weights(config: Config, model: MultiExitNetwork) -> None:
    """Put the weights of ``model.pretrained``, if there are any, into the network of a run that begins.

    Raises:
        UserError: they cannot be read, or do not fit.
    """
    with _mounted(config, _weight_files):
        load_pretrained(model, config.model)


def _open_data(config: Config) -> tuple[Index, Index]:
    """The indices of what the run validates and trains on."""
    kept = KeptQuarantine(config.folder).read()
    with _mounted(config, _data_files):
        val = open_split(config.data, config.data.val, kept)
        return val, open_training(config.data, val.classes, kept)


def _data_files(config: Config) -> list[Path]:
    places = [config.data.location(config.data.val), *config.data.training_locations]
    return [place / FILE for place in places if isinstance(place, Path)]


def _weight_files(config: Config) -> list[Path]:
    pretrained = config.model.pretrained
    return [pretrained] if isinstance(pretrained, Path) else []


@contextlib.contextmanager
def _mounted(config: Config, files: Callable[[Config], list[Path]]) -> Iterator[None]:
    """Raise StorageError, which is tried again, where a file is gone that this run has found before, and UserError if not.

    Args:
        config: the run's.
        files: what a configuration needs in this block.
    """
    try:
        yield
    except UserError:
        gone = [file for file in files(config) if not file.exists()]
        if not gone or gone[0] not in _known(config, files):
            raise
        raise StorageError(
            f"{gone[0]}: is not there, but it was when this run was submitted or last started; run the same command again when "
            "its file system is mounted"
        ) from None


def _known(config: Config, files: Callable[[Config], list[Path]]) -> list[Path]:
    """What earlier starts, or the submission, of this run have found."""
    found = []
    for name in ("config.yaml", "slurm/submitted.yaml"):
        with contextlib.suppress(UserError):
            found += files(load_config(config.folder / name))
    return found


def _check_norms(model: MultiExitNetwork, config: Config, world_size: int) -> None:
    """Refuse a norm that gets a single value, which has no variance: of one image, or of whatever a pass in training sees."""
    # Those of a batch get more in training, unless it is of one image, and none in evaluation.
    if config.train.micro_batch > 1 and not any(isinstance(one, GroupNorm | _InstanceNorm) for one in model.modules()):
        return
    size = config.data.image_size
    maps = f"a norm of this network gets a single value on images of {size} x {size} pixels, which has no variance"
    # Tried, because only the network knows; on a copy, because a pass in training mode moves the statistics.
    trial = copy.deepcopy(model)
    if not (_normalises(trial.eval(), 1, size) and _normalises(trial.train(), 2, size)):
        raise ConfigError(f"data.image_size is {size}, but {maps}; set a larger data.image_size, or take another norm")
    # Norms over all ranks get the images of the others as well.  What a regime freezes is in evaluation mode.
    alone = config.train.micro_batch == 1 and not (config.train.sync_bn and world_size > 1)
    # An epoch of the first stage and one of the last: no regime has more than two.
    trained = [trained_parts(config.model, epoch) for epoch in (0, config.train.epochs)]
    parts = exit_parts(trial)
    for name, module in trial.named_modules():
        module.training = not name or any(part_of(name, parts) in stage for stage in trained)
    if alone and not _normalises(trial, 1, size):
        raise ConfigError(
            f"train.micro_batch is 1, but {maps}; set train.micro_batch to 2 or more, or a larger data.image_size"
        )


@torch.no_grad()
def _normalises(model: MultiExitNetwork, images: int, size: int) -> bool:
    try:
        model(torch.zeros(images, 3, size, size))
    except ValueError as error:
        if not str(error).startswith("Expected more than 1"):  # value per channel, or spatial element
            raise
        return False
    return True


def _check_writable(folder: Path) -> None:
    # The folder may not exist yet: the nearest one above it that does decides.
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(
            f"{existing}: is a file; the run folder {folder} cannot be created there; set --runs or --name"
        )
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"{existing}: is not writable, the run folder {folder} cannot be created there; set --runs")
