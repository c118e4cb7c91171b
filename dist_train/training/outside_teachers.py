"""Teachers from outside of the network: the moving average of its own weights, another run, or a network of a library."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_train.config import AVERAGED, Config, DataConfig
from dist_train.distributed.group import Group
from dist_train.errors import CheckpointError, ConfigError
from dist_train.files import sha256
from dist_train.hub import is_address
from dist_train.models import network_of_library
from dist_train.models.named import is_named
from dist_train.precision import autocast
from dist_train.training import checkpoint

log = logging.getLogger("dist_train")


class OutsideTeachers:
    """The networks that ``loss.outside_teachers`` names, on this rank's device, in evaluation mode; none of them trains.

    Attributes:
        fingerprints: by name, the SHA-256 of the weights of every teacher that is a run; on rank 0.
    """

    def __init__(
        self,
        names: Sequence[str],
        config: Config,
        classes: Sequence[str],
        group: Group,
        averaged: nn.Module | None = None,
    ) -> None:
        """Load those of these names; all ranks must call.  ``averaged`` is what :func:`share_averages` gave.

        Raises:
            UserError: a teacher that cannot be built or read, or does not classify these images into these classes.
        """
        self._autocast = partial(autocast, config.train.precision, group.device)
        # Looked up once, for all ranks alike: a teacher that still trains has another best checkpoint a moment later.
        places = group.on_rank0(lambda: {run.name: run.place() for run in _runs(names)})
        self.fingerprints: dict[str, str] = {}
        if group.ranks.rank == 0:
            self.fingerprints = {name: sha256(_weights(place)) for name, place in places.items()}
        self._networks = []
        for name in names:
            if averaged is not None and name == AVERAGED:
                network = averaged
            elif name in places:
                log.info("loss.outside_teachers: %s teaches as of %s", name, places[name])
                network = checkpoint.load_model(places[name])
            else:
                network = _build(name, config.data.image_size, len(classes))
            self._networks.append(network.to(group.device).eval().requires_grad_(False))

    @torch.no_grad()
    def logits(self, images: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What each teacher gives, of one with exits the last one: [N, K] in ``dtype``, for images [N, 3, H, W]."""
        if not self._networks:
            return ()
        with self._autocast():
            # The operator takes one dtype for all, and under autocast networks end in different ones.
            return tuple(_last(network(images)).to(dtype) for network in self._networks)


def share_averages(network: nn.Module, averages: Mapping[str, Tensor]) -> nn.Module:
    """Let a network have the very tensors of the moving average, by name, so that it is always up to date."""
    # With duplicates: the averages have every name of the state dict, also both of a weight that two layers share.
    own = dict([*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)])
    for name, tensor in averages.items():
        own[name].data = tensor
    return network


def check_teachers(config: Config, stage: int, classes: Sequence[str]) -> None:
    """Refuse, without loading weights, teachers that are not there or were trained for other images or classes.

    Args:
        config: the run's.
        stage: its ZeRO stage.
        classes: of its data.

    Raises:
        UserError: names the teacher and what differs.
    """
    if AVERAGED in config.loss.outside_teachers and stage == 3:
        raise ConfigError(
            "loss.outside_teachers has averaged, whose weights train.zero_stage 3 divides among the processes; use stage 0, 1 or 2"
        )
    for run in _runs(config.loss.outside_teachers):
        run.check(config.data, classes)


def try_teachers(config: Config, classes: Sequence[str]) -> None:
    """Build the teachers that are no runs, and show each an image of zeros.

    Raises:
        ConfigError: one cannot be found or built, or does not classify these images into these classes.
    """
    known = {AVERAGED, *(run.name for run in _runs(config.loss.outside_teachers))}
    for name in config.loss.outside_teachers:
        if name not in known:
            _build(name, config.data.image_size, len(classes))


def teacher_folders(config: Config) -> list[Path]:
    """Where the teachers that are runs or weights on a disk are."""
    return [Path(run.name) for run in _runs(config.loss.outside_teachers) if not is_address(run.name)]


def teacher_bytes(config: Config, classes: Sequence[str]) -> int:
    """What the weights of all teachers take in memory; the averages, which the run has anyway, take nothing more.

    Raises:
        UserError: as :func:`check_teachers` and :func:`try_teachers`.
    """
    runs = _runs(config.loss.outside_teachers)
    # A safetensors file is its tensors behind a small header.
    total = sum(run.weights().stat().st_size for run in runs)
    for name in config.loss.outside_teachers:
        if name not in {AVERAGED, *(run.name for run in runs)}:
            network = _build(name, config.data.image_size, len(classes))
            total += sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    return total


def teacher_fingerprints(config: Config) -> dict[str, str]:
    """By name, the SHA-256 of the weights of every teacher that is a run, as it is now."""
    return {run.name: sha256(run.weights()) for run in _runs(config.loss.outside_teachers)}


@dataclass(frozen=True)
class _Run:
    """A teacher that was trained by this project: a run folder, a checkpoint, a folder of weights, or ``hf://ORG/NAME``."""

    name: str

    def place(self) -> str:
        """Its checkpoint, or its repository, which every node fetches for itself."""
        try:
            return self.name if is_address(self.name) else str(checkpoint.find(self.name))
        except CheckpointError as error:
            raise CheckpointError(f"loss.outside_teachers: {error}") from None

    def weights(self) -> Path:
        """The file of the weights that it teaches with."""
        return _weights(self.place())

    def check(self, data: DataConfig, classes: Sequence[str]) -> None:
        meta, config = checkpoint.read_meta(checkpoint.find(self.place()))
        if list(meta.classes) != list(classes):
            raise ConfigError(
                f"loss.outside_teachers has {self.name}, which knows {len(meta.classes)} classes, {', '.join(meta.classes[:3])} "
                f"...; these data have {len(classes)}, {', '.join(classes[:3])} ...; give a teacher of the same classes"
            )
        for field in ("image_size", "mean", "std"):
            theirs, ours = getattr(config.data, field), getattr(data, field)
            if theirs != ours:
                raise ConfigError(
                    f"loss.outside_teachers has {self.name}, which was trained with data.{field} {theirs}, and here it is "
                    f"{ours}; both networks see the same images, so set the same, or give another teacher"
                )


def _runs(names: Sequence[str]) -> list[_Run]:
    """Those of the teachers that are neither the averages nor a network of a library or of one's own code."""
    return [
        _Run(name)
        for name in names
        if name != AVERAGED and (is_address(name) or Path(name).exists() or not (":" in name or is_named(name)))
    ]


def _weights(place: str) -> Path:
    return checkpoint.evaluated_weights(checkpoint.find(place))


def _build(name: str, image_size: int, classes: int) -> nn.Module:
    try:
        network = network_of_library(name, classes, image_size).eval()
        with torch.no_grad():
            # One image suffices: in evaluation mode batch norms take their running statistics.
            given = _last(network(torch.zeros(1, 3, image_size, image_size)))
    except ConfigError as error:
        raise ConfigError(f"loss.outside_teachers: {error}") from None
    except Exception as error:  # their own code, on images that it may not take
        text = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ConfigError(
            f"loss.outside_teachers: {name} fails on images of {image_size} x {image_size} pixels: {text}; give a network that "
            "takes them"
        ) from None
    if given.shape != (1, classes):
        raise ConfigError(
            f"loss.outside_teachers has {name}, which gives {list(given.shape)} for one image; it must be [1, {classes}], "
            "a logit per class of these data"
        )
    return network


def _last(output: object) -> Tensor:
    """The logits in what a network gives: the last exit's, or those of a transformers output."""
    output = getattr(output, "logits", output)
    last = output[-1] if isinstance(output, tuple | list) else output
    if not isinstance(last, Tensor):
        raise ConfigError(f"a teacher gives a {type(last).__name__}; it must give logits [N, K], or those of its exits")
    return last
